"""`qlip-export demo`: a bundle as a page to try."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.", show_default=False)],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other computers in.")
    ] = "127.0.0.1",
    max_prompt: Annotated[int, typer.Option(min=1, help="Characters of a prompt, at most.")] = 400,
    max_images: Annotated[int, typer.Option(min=1, max=16, help="Images of a request, at most.")] = 4,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait, at most.")] = 64,
    backend: Annotated[
        str,
        typer.Option(
            help="Whose engines of the bundle to run.",
            show_default="auto: the first whose library and device are here",
        ),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of an engine.", show_default="all")
    ] = None,
) -> None:
    """Serve a page where visitors type prompts and see image, q, FAB and the bits of every step."""
    from qlip_export.demo.studio import Limits, Studio
    from qlip_export.runtime import TextToImage

    pipeline = TextToImage.load(bundle, backend=backend, threads=threads)
    studio = Studio(pipeline, Limits(prompt=max_prompt, images=max_images, waiting=max_waiting))
    print(f"loading {bundle}", file=sys.stderr, flush=True)
    from qlip_export.demo.page import build_page, serve

    page = build_page(studio)
    address = serve(page, host, port)
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
