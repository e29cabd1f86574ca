"""Train one stage of the emoji model: `python -m tools.emoji.train clip|vae|unet --minutes M`.

The stages hand weights on through `build/emoji-train/weights/`, in this order: clip and vae (in any order, or
side by side), then unet. Start again with the same arguments after an interruption: a stage goes on where its
newest checkpoint ends. Under `torchrun --nproc-per-node N` a stage trains on N GPUs.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.emoji import checkpoint, clip, unet, vae
from tools.emoji import tokenizer as bpe
from tools.emoji.architecture import SIZES, Sizes, build_text, build_vae
from tools.emoji.data import SEED, load
from tools.emoji.export import load_weights
from tools.emoji.loop import Draw, HandOn, Plan, Trainer, train
from tools.emoji.pool import CAPTIONS_PER_IMAGE, Pool, load_tokenizer, make_pool
from tools.emoji.ranks import Ranks, join, say

RATES = {"clip": 1e-3, "vae": 1.5e-3, "unet": 8e-4}
WARMUPS = {"clip": 200, "vae": 200, "unet": 500}
BATCHES = {"clip": 1024, "vae": 64, "unet": 256}
AVERAGES = {"clip": 0.998, "vae": 0.998, "unet": 0.9995}
DECAYS = {"clip": 0.1, "vae": 0.0, "unet": 0.01}
ENCODE_BATCH = 128


@dataclass(frozen=True)
class Run:
    """What every stage needs besides its plan."""

    sizes: Sizes
    vocabulary: int
    pool: Pool
    empty_ids: Tensor
    weights: Path
    batch: int
    ranks: Ranks


def clip_stage(run: Run) -> tuple[nn.Module, Callable[[], Draw], HandOn]:
    """Return the contrastive objective, its draw and what it hands on: both towers."""

    def hand_on(average: dict[str, Tensor], state: dict[str, float]) -> None:
        for name in ("text", "vision"):
            checkpoint.write_weights(run.weights / name, checkpoint.under(f"{name}.", average), state)

    return clip.Contrast(run.sizes, run.vocabulary), lambda: clip.make_draw(run.pool, run.batch), hand_on


def vae_stage(run: Run) -> tuple[nn.Module, Callable[[], Draw], HandOn]:
    """Return the reconstruction objective, its draw and what it hands on: the standardized autoencoder."""

    def hand_on(average: dict[str, Tensor], state: dict[str, float]) -> None:
        model = build_vae(run.sizes).to(run.ranks.device).eval()
        load_weights(model, checkpoint.under("vae.", average))
        vae.standardize(model, run.pool.pixels, ENCODE_BATCH)
        checkpoint.write_weights(run.weights / "vae", dict(model.named_parameters()), state)

    return vae.Reconstruct(run.sizes), lambda: vae.make_draw(run.pool, run.batch, run.sizes), hand_on


def unet_stage(run: Run) -> tuple[nn.Module, Callable[[], Draw], HandOn]:
    """Return the denoising objective, its draw over precomputed states, and what it hands on."""

    def hand_on(average: dict[str, Tensor], state: dict[str, float]) -> None:
        checkpoint.write_weights(run.weights / "unet", checkpoint.under("unet.", average), state)

    def prepare() -> Draw:
        text = build_text(run.sizes, run.vocabulary).to(run.ranks.device).eval()
        load_weights(text, checkpoint.read_weights(run.weights / "text"))
        decoder = build_vae(run.sizes).to(run.ranks.device).eval()
        load_weights(decoder, checkpoint.read_weights(run.weights / "vae"))
        data = unet.condition(run.pool, decoder, text, run.empty_ids, ENCODE_BATCH)
        say(run.ranks, f"unet: latents of mean {data.mean.mean():.3f}, deviation {data.mean.std():.3f}, "
                       f"posterior deviation {data.deviation.mean():.3f}")  # fmt: skip
        return unet.make_draw(data, run.batch)

    return unet.Denoise(run.sizes), prepare, hand_on


STAGES = {"clip": clip_stage, "vae": vae_stage, "unet": unet_stage}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--minutes", type=float, help="train this long; the learning rate falls to zero by then"
    )
    length.add_argument("--steps", type=int, help="train this many steps")
    parser.add_argument(
        "--stop-after", type=int, help="interrupt after this many steps, leaving a checkpoint"
    )
    parser.add_argument("--data", type=Path, default=Path("build/emoji-data"))
    parser.add_argument("--out", type=Path, default=Path("build/emoji-train"))
    parser.add_argument("--size", choices=SIZES, default="shipped")
    parser.add_argument("--batch", type=int, help="examples a step on each GPU")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument(
        "--captions", type=int, default=CAPTIONS_PER_IMAGE, help="captions drawn for each image"
    )
    parser.add_argument("--images", type=int, help="train on the first images only, for a rehearsal")
    parser.add_argument("--log-steps", type=int, default=200)
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--compile", action="store_true", help="compile the objective with torch.compile")
    parser.add_argument(
        "--from-weights", type=Path, help="with no checkpoint, start from this folder of weights"
    )
    return parser.parse_args()


def start_from(trainer: Trainer, stage: str, weights: Path) -> None:
    """Start `trainer` from weights that `stage` handed on earlier, on whatever machine."""
    names = {"clip": ("text", "vision"), "vae": ("vae",), "unet": ("unet",)}[stage]
    current = {name: p.detach().cpu() for name, p in trainer.named.items()}
    state: dict[str, float] = {}
    for name in names:
        tensors, state = checkpoint.read(weights / name)
        current.update({f"{name}.{key}": value.float() for key, value in tensors.items()})
    trainer.start_from(current, int(state["step"]), state["seconds"])


def main() -> None:
    """Train the stage that the command line names."""
    arguments = parse()
    ranks = join()
    sizes = SIZES[arguments.size]
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(arguments.data)
    pool = make_pool(load(arguments.data), tokenizer, held_out=False, seed=SEED, captions=arguments.captions)
    if arguments.images is not None:
        pool = pool.first(arguments.images)
    run = Run(
        sizes=sizes,
        vocabulary=tokenizer.get_vocab_size(),
        pool=pool.to(ranks.device),
        empty_ids=torch.tensor(next(bpe.encode(tokenizer, [""]))),
        weights=arguments.out / "weights",
        batch=arguments.batch or BATCHES[arguments.stage],
        ranks=ranks,
    )
    plan = Plan(
        stage=arguments.stage,
        learning_rate=arguments.rate or RATES[arguments.stage],
        warmup_steps=WARMUPS[arguments.stage],
        weight_decay=DECAYS[arguments.stage],
        ema_decay=AVERAGES[arguments.stage],
        steps=arguments.steps,
        minutes=arguments.minutes,
        stop_after=arguments.stop_after,
        save_seconds=arguments.save_seconds,
        log_steps=arguments.log_steps,
        seed=SEED,
        compiled=arguments.compile,
    )
    objective, prepare, hand_on = STAGES[arguments.stage](run)
    objective.to(ranks.device)
    if ranks.device.type == "cuda" and arguments.stage != "clip":
        objective.to(memory_format=torch.channels_last)
    trainer = Trainer(plan, objective, arguments.out / "checkpoints" / arguments.stage, ranks)
    if arguments.from_weights is not None and trainer.step == 0:
        start_from(trainer, arguments.stage, arguments.from_weights)
    say(
        ranks,
        f"{arguments.stage}: {len(pool)} images, {ranks.world} x {run.batch} a step from step {trainer.step}",
    )
    train(trainer, prepare(), hand_on)
    ranks.leave()


if __name__ == "__main__":
    main()
