"""The contrastive stage: the text tower that conditions the denoiser and the vision tower that evaluates it.

CLIP's symmetric cross-entropy (https://arxiv.org/abs/2103.00020, section 2.3), except that every image that a
caption describes counts as its match: a caption without a style fits its concept in all four.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tools.emoji import augment
from tools.emoji.architecture import Sizes, build_text, build_vision
from tools.emoji.loop import Draw
from tools.emoji.pool import Pool, pick

MAX_SCALE = math.log(100)


class Contrast(nn.Module):
    """Both towers and the learned temperature; returns the contrastive loss of a batch."""

    def __init__(self, sizes: Sizes, vocabulary: int) -> None:
        """Build the towers with random weights."""
        super().__init__()
        self.text = build_text(sizes, vocabulary)
        self.vision = build_vision(sizes)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; `targets` (batch, batch) bool says which captions (rows) describe which images."""
        pictures = F.normalize(self.vision(pixel_values=images).image_embeds.float(), dim=-1)
        texts = F.normalize(self.text(input_ids=ids).text_embeds.float(), dim=-1)
        logits = self.scale.clamp(max=MAX_SCALE).exp() * texts @ pictures.T
        wanted = targets.float()
        by_text = F.cross_entropy(logits, wanted / wanted.sum(1, keepdim=True))
        by_image = F.cross_entropy(logits.T, wanted.T / wanted.T.sum(1, keepdim=True))
        return (by_text + by_image) / 2


def matches(concept: Tensor, style: Tensor, styled: Tensor) -> Tensor:
    """Return the (batch, batch) bool matrix: does caption i, drawn for image i, describe image j too."""
    same_concept = concept[:, None] == concept[None, :]
    same_style = style[:, None] == style[None, :]
    return same_concept & (same_style | ~styled[:, None])


def make_draw(pool: Pool, batch: int) -> Draw:
    """Return the function that draws a batch of augmented images, captions and their matches from `pool`."""

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        chosen = pick(len(pool), batch, generator)
        which = torch.randint(pool.ids.shape[1], (batch,), generator=generator, device=generator.device)
        images = augment.to_unit(pool.pixels[chosen])
        # No mirroring: arrows, hands and letters would change their meaning.
        images = augment.move(images, generator, zoom=0.15, shift=0.08)
        images = augment.soften(images, generator, noise=0.1)
        targets = matches(pool.concept[chosen], pool.style[chosen], pool.styled[chosen, which])
        return images, pool.ids[chosen, which].long(), targets

    return draw
