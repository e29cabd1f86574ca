"""`qlip-export report`: a bundle as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip_export.commands.options import (
    BundleArgument,
    GuidanceOption,
    JsonOption,
    PromptsOption,
    TargetOption,
    ThisBatchOption,
    ThisHeightOption,
    ThisWidthOption,
)


def report(
    bundle: BundleArgument,
    prompts: PromptsOption = None,
    images: Annotated[int, typer.Option(min=1, max=24, help="Prompts that are drawn.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed; prompt i uses SEED + i.")] = 0,
    guidance: GuidanceOption = None,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Draw in FP32 with diffusers too.")
    ] = True,
    parity: Annotated[
        bool, typer.Option("--parity/--no-parity", help="Compare every engine with its graph.")
    ] = True,
    backend: TargetOption = "auto",
    height: ThisHeightOption = None,
    width: ThisWidthOption = None,
    batch_size: ThisBatchOption = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The page.")] = Path("report.html"),
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a bundle on one HTML page that works offline: images, bits, engines, parity, provenance."""
    from qlip_export.progress import progress_for_terminal
    from qlip_export.report.collect import ReportOptions, collect
    from qlip_export.report.page import write_page

    options = ReportOptions(
        prompts=prompts,
        images=images,
        seed=seed,
        guidance=guidance,
        backend=backend,
        height=height,
        width=width,
        batch_size=batch_size,
        reference=reference,
        parity=parity,
    )
    with progress_for_terminal() as progress:
        data = collect(bundle, options, progress)
    summary = write_page(data, out)
    if as_json:
        print(summary.model_dump_json())
    else:
        for note in summary.notes:
            print(f"note: {note}")
        print(f"{summary.file}: {summary.prompts} prompts, {summary.bytes / 1e6:.1f} MB")
    if show:
        typer.launch(str(out.resolve()))
