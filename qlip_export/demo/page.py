"""The page, in Gradio: controls, queue, and nothing that loads from elsewhere but what Gradio itself does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from PIL import Image

from qlip_export.demo.studio import SEEDS, Studio
from qlip_export.errors import QlipError
from qlip_export.prompts import EMOJI_PROMPTS, GENERIC_PROMPTS, read_prompts
from qlip_export.report.policy import LEVELS
from qlip_export.zoo import EMBEDDED, calibration_of

CONCEPTS = 2
"""Concepts whose ladders of richness are offered."""

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.bitmap .legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin-bottom: .4rem; }
.bitmap i { display: inline-block; width: .9em; height: .9em; border-radius: 3px; margin-right: .35em;
  vertical-align: -.1em; }
.bitmap .scroll { overflow-x: auto; }
.bitmap table { border-collapse: separate; border-spacing: 1px; font-size: .7rem; width: 100%; border: 0; }
.bitmap th { text-align: right; padding: 0 .5em 0 0; font-weight: 400; white-space: nowrap; border: 0; }
.bitmap td { min-width: 1.25rem; height: 1.25rem; padding: 0; text-align: center; color: #1d2129; border: 0;
  border-radius: 2px; }
.bitmap td.ahead { opacity: .3; }
@media (max-width: 640px) {
  .bitmap table { table-layout: fixed; }
  .bitmap th { width: 8em; }
  .bitmap td { min-width: 0; font-size: 0; }
}
#status { min-height: 1.5rem; }
#images .grid-wrap { max-height: none !important; overflow: visible; }
#images .grid-container { grid-template-columns: repeat(auto-fill, minmax(140px, 256px)) !important;
  grid-template-rows: auto !important; grid-auto-rows: auto !important; }
"""

Shown = tuple[Any, str, str]


def build_page(studio: Studio) -> gr.Blocks:
    """Return the page; it is not served yet."""
    manifest = studio.pipeline.bundle.manifest

    def draw(prompt: str, choice: str, seed: float | None, count: float, size: str) -> Iterator[Shown]:
        shown: tuple[Image.Image, ...] | None = None
        for view in studio.draw(prompt or "", choice, seed, count, size):
            # Images travel only when they are new ones.
            yield gr.skip() if view.images is shown else list(view.images), view.status, view.bits
            shown = view.images

    with gr.Blocks(title=f"{manifest.model.name}: qlip-export", analytics_enabled=False) as page:
        gr.Markdown(
            f"# {manifest.model.name}\n"
            f"{len(manifest.sampler.steps)} steps, {manifest.quantization.weight_bits}-bit weights, engines "
            f"of {studio.pipeline.target.name}. The text decides the bits of every block at every step, "
            "before the first one; the same seed at uniform bits shows what they change."
        )
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(label="Prompt", lines=2, placeholder="What to draw", elem_id="prompt")
                choice = gr.Radio(studio.choices, value=studio.choices[0], label="Activation bits")
                sizes = [*studio.sizes]
                size = gr.Radio(sizes, value=sizes[0], label="Size of images", visible=len(sizes) > 1)
                with gr.Row():
                    seed = gr.Number(
                        value=0, precision=0, minimum=0, maximum=SEEDS, label="Seed", min_width=120
                    )
                    count = gr.Slider(
                        1,
                        max(2, studio.limits.images),
                        value=1,
                        step=1,
                        label="Images",
                        min_width=120,
                        visible=studio.limits.images > 1,
                    )
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=3):
                status = gr.Markdown("", elem_id="status")
                images = gr.Gallery(
                    label="Images",
                    columns=2,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    elem_id="images",
                    show_label=False,
                )
        bits = gr.HTML("", elem_id="bits")
        inputs, outputs = [prompt, choice, seed, count, size], [images, status, bits]
        common: dict[str, Any] = {"concurrency_limit": 1, "show_progress": "minimal"}
        button.click(draw, inputs, outputs, **common)
        prompt.submit(draw, inputs, outputs, **common)
        for title, prompts in examples(studio):
            chosen = gr.Examples([[text] for text in prompts], [prompt], label=title)
            chosen.load_input_event.then(draw, inputs, outputs, **common)
    page.queue(max_size=studio.limits.waiting, default_concurrency_limit=1)
    return page


def examples(studio: Studio) -> list[tuple[str, list[str]]]:
    """Return titled prompts: ladders of richness where the model has them, else prompts plain and rich."""
    model = studio.pipeline.bundle.manifest.model
    calibration = calibration_of(model)
    file = calibration / "richness.txt" if calibration is not None else None
    if file is not None and file.is_file():
        lines = read_prompts(file)
        ladders = [lines[i : i + len(LEVELS)] for i in range(0, CONCEPTS * len(LEVELS), len(LEVELS))]
        return [(f"{ladder[0]}, told ever more richly", ladder) for ladder in ladders]
    prompts = EMOJI_PROMPTS if model.source in EMBEDDED else GENERIC_PROMPTS
    return [("Plain and rich prompts", list(prompts))]


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Serve the page in the background and return its address.

    Raises:
        QlipError: The port is taken, or the host is not of this machine.
    """
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        raise QlipError(
            f"cannot serve on {host}:{port}", found=str(error).splitlines()[0], fix="another --port or --host"
        ) from error
    return str(address)
