"""`qlip-export demo`: a bundle as a page to try."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qlip_export.commands.options import BundleArgument, TargetOption, ThreadsOption


def demo(
    bundle: BundleArgument,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other computers in.")
    ] = "127.0.0.1",
    max_prompt: Annotated[int, typer.Option(min=1, help="Characters of a prompt, at most.")] = 400,
    max_images: Annotated[int, typer.Option(min=1, max=16, help="Images of a request, at most.")] = 4,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait, at most.")] = 64,
    previews: Annotated[
        int, typer.Option(min=0, help="Images on the way, each at the cost of a run of the VAE decoder.")
    ] = 4,
    backend: TargetOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Serve a page where visitors type prompts and see image, q, FAB and the bits of every step."""
    from qlip_export.demo.studio import Limits, Studio
    from qlip_export.runtime import TextToImage

    pipeline = TextToImage.load(bundle, backend=backend, threads=threads)
    studio = Studio(pipeline, Limits(prompt=max_prompt, images=max_images, waiting=max_waiting), previews)
    print(f"loading {bundle}", file=sys.stderr, flush=True)
    from qlip_export.demo.page import build_page, serve

    page = build_page(studio)
    address = serve(page, host, port)
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
