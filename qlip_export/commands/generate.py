"""`qlip-export generate`: images from prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip_export.commands.options import (
    BundleArgument,
    GuidanceOption,
    JsonOption,
    TargetOption,
    ThisHeightOption,
    ThisWidthOption,
    ThreadsOption,
)
from qlip_export.errors import QlipError

if TYPE_CHECKING:
    from PIL.Image import Image

    from qlip_export.runtime import TextToImage


def generate(
    bundle: BundleArgument,
    prompt: Annotated[list[str], typer.Argument(help="One prompt or several.", show_default=False)],
    bits: Annotated[
        int | None,
        typer.Option(
            help="Activation bits of all blocks and steps.",
            show_default="by the bundle's policy; without one, the largest up to 16",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed; image i uses SEED + i.", show_default="random")
    ] = None,
    guidance: GuidanceOption = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to steer away from.", show_default="nothing")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="PNG file, or a folder for several prompts.",
            show_default="image.png or images/",
        ),
    ] = None,
    height: ThisHeightOption = None,
    width: ThisWidthOption = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per batch, the same.", show_default="what wastes least")
    ] = None,
    backend: TargetOption = "auto",
    threads: ThreadsOption = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help="Most memory that engines on a CPU may take, e.g. 600MB; they come and go as needed.",
            show_default="all engines of a run stay loaded",
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Draw the bits of each block and step.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make images from prompts, at the bits that each prompt needs."""
    from qlip_export.display import print_schedules
    from qlip_export.progress import progress_for_terminal
    from qlip_export.runtime import TextToImage
    from qlip_export.runtime.budget import parse_budget

    if not prompt or not all(p.strip() for p in prompt):
        raise QlipError(
            "a prompt is empty", expected="text", fix='e.g. qlip-export generate BUNDLE "a red apple"'
        )
    budget = None if memory_budget is None else parse_budget(memory_budget)
    pipeline = TextToImage.load(
        bundle,
        backend=backend,
        threads=threads,
        height=height,
        width=width,
        batch_size=batch_size,
        images=len(prompt),
    )
    if bits is not None:
        pipeline.bundle.bits(bits)
    _say_which(pipeline, backend)
    files = _image_paths(out, len(prompt))
    manifest = pipeline.bundle.manifest
    batches = -(-len(prompt) // manifest.shapes.batch_size)
    names = iter(files)

    def save(image: Image, record: dict[str, Any]) -> None:
        record["file"] = _save_image(image, next(names))

    with progress_for_terminal() as progress:
        progress.stage("sample", len(manifest.sampler.steps) * batches)
        progress.detail("loading engines")

        def step(done: int, total: int) -> None:
            if done < total:
                progress.item(f"step {done + 1} of {total}")
            else:
                progress.detail("decoding")

        result = pipeline(
            prompt,
            seed=seed,
            guidance=guidance,
            negative_prompt=negative_prompt,
            bits=bits,
            memory_budget=budget,
            on_step=step,
            on_image=save,
        )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if explain:
        print_schedules(pipeline.bundle, result.records, stderr=as_json)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    for record in result.records:
        seconds = record["seconds"]
        quality = "" if record["q"] is None else f"q {record['q']:.3f}, "
        print(
            f"{record['file']}  seed {record['seed']}, {quality}{record['fab']:.2f} bits on average, "
            f"{seconds['total']:.2f} s ({1000 * sum(seconds['steps']) / len(seconds['steps']):.0f} ms a step)"
        )
    if "memory" in (last := result.records[-1]):
        used = {name: size / 1e6 for name, size in last["memory"].items()}
        print(
            f"memory of engines: at most {used['peak']:.0f} MB of {used['budget']:.0f}; "
            f"all at once would take {used['all_resident']:.0f}, the least is {used['smallest']:.0f}"
        )


def _say_which(pipeline: TextToImage, wanted: str) -> None:
    """Say whose engines run, where there was a choice and nobody made it."""
    if wanted == "auto" and len(pipeline.bundle.manifest.targets) > 1:
        print(f"engines: {pipeline.target.name} (--backend chooses)", file=sys.stderr)


def _image_paths(out: Path | None, count: int) -> list[Path]:
    """Choose the files before anything is computed, and make sure they can be written."""
    from qlip_export.files import explained_os_errors

    if count == 1 and not (out is not None and out.is_dir()):
        files = [out or Path("image.png")]
        if files[0].suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise QlipError(
                f"{files[0]} is no image file", expected="a name that ends in .png, .jpg or .webp"
            )
    else:
        folder = out or Path("images")
        files = [folder / f"{i:04d}.png" for i in range(count)]
    with explained_os_errors(files[0].parent):
        files[0].parent.mkdir(parents=True, exist_ok=True)
        probe = files[0].parent / f".{files[0].name}.part"
        probe.touch()
        probe.unlink()
    return files


def _save_image(image: Image, file: Path) -> str:
    from qlip_export.files import written_aside

    with written_aside(file) as aside:
        image.save(aside, format={"png": "PNG", "webp": "WEBP"}.get(file.suffix[1:].lower(), "JPEG"))
    return str(file)
