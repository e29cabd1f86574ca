"""`qlip-export report`: a bundle as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.", show_default=False)],
    prompts: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text, a prompt a line.", show_default="the model's own, or generic"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=24, help="Prompts that are drawn.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed; prompt i uses SEED + i.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale.", show_default="the model family's own")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Draw in FP32 with diffusers too.")
    ] = True,
    parity: Annotated[
        bool, typer.Option("--parity/--no-parity", help="Compare every engine with its graph.")
    ] = True,
    backend: Annotated[
        str,
        typer.Option(
            help="Whose engines of the bundle to run.",
            show_default="auto: the first whose library and device are here",
        ),
    ] = "auto",
    out: Annotated[Path, typer.Option("-o", "--out", help="The page.")] = Path("report.html"),
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON result on stdout, all else on stderr.")
    ] = False,
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
