"""Measure an exported model: reconstruction, retrieval, CLIP score and Fréchet distance.

`python -m tools.emoji.evaluate` writes `metrics.json` and picture grids to `--out`. All but the
PSNR is in the features of the model's own towers: comparable between versions of this model, not with others.
Under torchrun the guidance scales are shared out among the GPUs.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tools.emoji import augment, metrics
from tools.emoji import tokenizer as bpe
from tools.emoji.captions import STYLES
from tools.emoji.data import SEED, load
from tools.emoji.export import Networks, exported_networks
from tools.emoji.pool import Pool, load_tokenizer, make_pool
from tools.emoji.ranks import Ranks, join, say
from tools.emoji.sample import GUIDANCE, STEPS, grid, sample
from tools.emoji.vae import reconstruction_psnr

FRECHET_DRAWS = 5
HELD_OUT_SEEDS = 4
SAMPLE_SEED = 1_000_000
GRID_NAMES = (
    "volcano", "rainbow", "rocket", "red apple", "octopus", "sailboat", "grinning face", "robot", "castle",
    "sunflower", "pizza", "guitar",
)  # fmt: skip


@torch.no_grad()
def image_features(networks: Networks, pixels: Tensor, batch: int) -> Tensor:
    """Return the (images, projection) embeddings of (images, side, side, 3) uint8 pixels."""
    found = [networks.vision(pixel_values=augment.to_unit(part)).image_embeds for part in pixels.split(batch)]
    return torch.cat(found)


@torch.no_grad()
def text_features(networks: Networks, ids: Tensor, batch: int) -> Tensor:
    """Return the (captions, projection) embeddings of (captions, 77) token ids."""
    return torch.cat([networks.text(input_ids=part).text_embeds for part in ids.split(batch)])


def measure_real(
    networks: Networks, trained: Pool, held_out: Pool, batch: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Measure what needs no sampling; also return the image and text features of the trained pool."""
    images, texts = (
        image_features(networks, trained.pixels, batch),
        text_features(networks, trained.canonical, batch),
    )
    new_images = image_features(networks, held_out.pixels, batch)
    new_texts = text_features(networks, held_out.canonical, batch)
    seen = slice(0, len(trained), max(1, len(trained) // 512))
    psnr = reconstruction_psnr(networks.vae, held_out.pixels, batch)
    report = {
        "images_trained": len(trained),
        "images_held_out": len(held_out),
        "vae_psnr_held_out_db": float(psnr.mean()),
        "vae_psnr_held_out_worst_db": float(psnr.min()),
        "vae_psnr_trained_db": float(reconstruction_psnr(networks.vae, trained.pixels[seen], batch).mean()),
        "retrieval_at_1_trained": metrics.retrieval(texts, images, trained.concept, trained.concept),
        "retrieval_at_1_held_out_among_held_out": metrics.retrieval(
            new_texts, new_images, held_out.concept, held_out.concept
        ),
        "clip_score_real": metrics.clip_score(images, texts),
        "clip_score_real_held_out": metrics.clip_score(new_images, new_texts),
        "fid_two_halves_of_real": metrics.frechet_of_halves(images, images, FRECHET_DRAWS),
    }
    return report, images, texts


def measure_generated(
    networks: Networks,
    trained: Pool,
    held_out: Pool,
    features: tuple[Tensor, Tensor],
    empty: Tensor,
    guidance: float,
    steps: int,
    batch: int,
) -> dict[str, Any]:
    """Generate an image for every trained caption and four for every held-out one, and measure them."""
    real, texts = features
    started = time.monotonic()
    made = image_features(
        networks, sample(networks, trained.canonical, empty, guidance, SAMPLE_SEED, batch, steps), batch
    )
    seconds = time.monotonic() - started
    repeated = held_out.canonical.repeat(HELD_OUT_SEEDS, 1)
    new = image_features(
        networks, sample(networks, repeated, empty, guidance, SAMPLE_SEED, batch, steps), batch
    )
    score = metrics.clip_score(made, texts)
    return {
        "guidance": guidance,
        "steps": steps,
        "images": made.shape[0],
        "seconds": seconds,
        "clip_score": score,
        "clip_score_ratio": score / metrics.clip_score(real, texts),
        "clip_score_held_out": metrics.clip_score(new, text_features(networks, repeated, batch)),
        "fid": metrics.frechet(made, real),
        "fid_half_against_other_half": metrics.frechet_of_halves(made, real, FRECHET_DRAWS),
        "retrieval_at_1": metrics.retrieval(texts, made, trained.concept, trained.concept),
    }


def pictures(pool: Pool, names: tuple[str, ...]) -> list[list[int]]:
    """Return, style by style, the places in `pool` of the images whose concept has one of `names`."""
    rows = []
    for style in STYLES:
        wanted = [f"an emoji of {name} in {style.phrase}" for name in names]
        rows.append([pool.captions.index(caption) for caption in wanted if caption in pool.captions])
    return rows


def save_grid(networks: Networks, ids: Tensor, columns: int, empty: Tensor, steps: int, path: Path) -> None:
    """Generate one image a row of `ids` and save them in rows of `columns`, as PNG and as a smaller WebP."""
    made = sample(networks, ids, empty, GUIDANCE, SAMPLE_SEED, ids.shape[0], steps)
    picture = Image.fromarray(grid(list(made.split(columns))).cpu().numpy())
    picture.save(path.with_suffix(".png"), optimize=True)
    picture.save(path.with_suffix(".webp"), quality=88, method=6)


def save_grids(
    networks: Networks, trained: Pool, held_out: Pool, empty: Tensor, steps: int, out: Path
) -> None:
    """Save a grid of well-known trained concepts in every style, and one of held-out concepts."""
    rows = pictures(trained, GRID_NAMES)
    width = min(len(row) for row in rows)
    if width:
        known = torch.cat([trained.canonical[row[:width]] for row in rows])
        save_grid(networks, known, width, empty, steps, out / "grid")
    by_style = [held_out.canonical[held_out.style == number][5:17] for number in range(len(STYLES))]
    width = min(len(row) for row in by_style)
    if width:
        save_grid(
            networks,
            torch.cat([row[:width] for row in by_style]),
            width,
            empty,
            steps,
            out / "grid-held-out",
        )


def machine(ranks: Ranks) -> str:
    """Describe the machine that the numbers come from."""
    where = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{ranks.world} x {where}, torch {torch.__version__}"


def main() -> None:
    """Read the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("qlip_export/zoo/emoji"))
    parser.add_argument("--data", type=Path, default=Path("build/emoji-data"))
    parser.add_argument("--out", type=Path, default=Path("build/emoji-evaluation"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    parser.add_argument("--steps", type=int, default=STEPS, help="sampling steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, help="measure on the first images only, for a rehearsal")
    arguments = parser.parse_args()
    ranks = join()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(arguments.model)
    networks = exported_networks(arguments.model)
    for model in vars(networks).values():
        model.to(ranks.device).eval()
    dataset = load(arguments.data)
    trained, held_out = (
        make_pool(dataset, tokenizer, side, SEED, captions=1).to(ranks.device) for side in (False, True)
    )
    if arguments.images is not None:
        trained, held_out = trained.first(arguments.images), held_out.first(arguments.images)
    empty = torch.tensor(next(bpe.encode(tokenizer, [""])))
    report, images, texts = measure_real(networks, trained, held_out, arguments.batch)
    report["machine"] = machine(ranks)
    say(ranks, json.dumps(report, indent=1))
    if ranks.first:
        save_grids(networks, trained, held_out, empty, arguments.steps, arguments.out)
    for guidance in arguments.guidance[ranks.rank :: ranks.world]:
        found = measure_generated(
            networks, trained, held_out, (images, texts), empty, guidance, arguments.steps, arguments.batch
        )
        (arguments.out / f"guidance-{guidance:g}.json").write_text(json.dumps(found), encoding="utf-8")
    ranks.leave()
    if ranks.first:
        names = [arguments.out / f"guidance-{guidance:g}.json" for guidance in arguments.guidance]
        report["generated"] = [json.loads(name.read_text(encoding="utf-8")) for name in names]
        bpe.write_json(arguments.out / "metrics.json", report)
        say(ranks, json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
