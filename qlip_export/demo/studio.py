"""What stands behind the page: requests with limits, drawn one at a time, told of step by step."""

from __future__ import annotations

import html
import queue
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from pydantic import Field

from qlip_export.bitmap import bit_map, colour, options_of
from qlip_export.errors import QlipError
from qlip_export.manifest import Manifest
from qlip_export.runtime import Previews, TextToImage
from qlip_export.runtime.schedule import Scheduler, block_bits
from qlip_export.spec import Frozen

ADAPTIVE = "adaptive"
SEEDS = 2**31 - 1
PREVIEWS = 4
"""Of an image, unless somebody says otherwise."""


class Limits(Frozen):
    """What a visitor may ask for. The number of steps is that of the bundle; nobody can raise it."""

    prompt: int = Field(default=400, ge=1, description="characters")
    images: int = Field(default=4, ge=1, description="of one request")
    waiting: int = Field(default=64, ge=1, description="requests in the queue")


@dataclass(frozen=True)
class View:
    """What the page shows at one moment of a request.

    Attributes:
        images: Those that are done, then those at work as their last preview foresees them.
        status: Where the request stands, Markdown.
        bits: The bit map, HTML.
        failed: Whether this is the end of a request that failed.
    """

    images: tuple[Image.Image, ...]
    status: str
    bits: str
    failed: bool = False


@dataclass
class _Run:
    """A request at work in a thread of its own: steps and images come through ``events``."""

    events: queue.SimpleQueue[tuple[str, Any]] = field(default_factory=queue.SimpleQueue)
    abandoned: threading.Event = field(default_factory=threading.Event)


class _AbandonedError(Exception):
    """The visitor has left: the run ends at its next step."""


class Studio:
    """A pipeline and what may be asked of it."""

    def __init__(self, pipeline: TextToImage, limits: Limits, previews: int = PREVIEWS) -> None:
        """Keep them; nothing is loaded yet. An image is shown ``previews`` times before it is done.

        The first size of images is that of ``pipeline``; a request may be for any other of the bundle.
        """
        self.pipeline, self.limits, self.previews = pipeline, limits, previews
        manifest = pipeline.bundle.manifest
        images = [size.shapes.image for size in pipeline.sizes()]
        self.sizes = {f"{width} x {height}": (height, width) for height, width in images}
        uniform = [f"{bits} bits" for bits in pipeline.bundle.uniform]
        self.choices = [ADAPTIVE, *uniform] if manifest.policy else uniform
        self._workers: list[threading.Thread] = []
        self._schedule = Scheduler(manifest.policy.table, manifest.blocks) if manifest.policy else None

    def draw(
        self, prompt: str, choice: str, seed: float | None, count: float, size: str | None = None
    ) -> Iterator[View]:
        """Yield what the page shows, from the first step to the image; a failure is the last view.

        Args:
            prompt: As typed.
            choice: One of ``choices``.
            seed: Of the first image; the next ones count up.
            count: Number of images.
            size: One of ``sizes``; the first if absent.
        """
        run = _Run()
        try:
            bits, first, number = self._checked(prompt, choice, seed, count)
            self._resize(size if size is not None else next(iter(self.sizes)), number)
            yield from self._watched(run, prompt.strip(), bits, first, number)
        except QlipError as error:
            yield _failure(error.problem, error.expected, error.fix)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            yield _failure(f"the server had a problem ({type(error).__name__})", None, "try again")
        finally:
            run.abandoned.set()

    def _checked(
        self, prompt: str, choice: str, seed: float | None, count: float
    ) -> tuple[int | None, int, int]:
        length = len(prompt.strip())
        if not length:
            raise QlipError("the prompt is empty", fix="say what to draw")
        if length > self.limits.prompt:
            raise QlipError(
                f"the prompt is too long: {length} characters",
                expected=f"at most {self.limits.prompt}",
                fix="shorten it",
            )
        if choice not in self.choices:
            raise QlipError(f"no such bits: {choice}", expected=" or ".join(self.choices))
        if not 1 <= count <= self.limits.images or count != int(count):
            raise QlipError("that number of images is not allowed", expected=f"1 to {self.limits.images}")
        if seed is None or not 0 <= seed <= SEEDS or seed != int(seed):
            raise QlipError("the seed is no whole number", expected=f"0 to {SEEDS}")
        return None if choice == ADAPTIVE else int(choice.split()[0]), int(seed), int(count)

    def _resize(self, size: str, count: int) -> None:
        """Make the pipeline one of this size: engines of another go, so that those of two never add up."""
        if size not in self.sizes:
            raise QlipError(f"no such size: {size}", expected=" or ".join(self.sizes))
        height, width = self.sizes[size]
        other = self.pipeline.at(height=height, width=width, images=count)
        if other is not self.pipeline:
            for worker in self._workers:
                worker.join()  # one whose visitor has left holds the engines until its step ends
        self.pipeline = other

    def _watched(self, run: _Run, prompt: str, bits: int | None, seed: int, count: int) -> Iterator[View]:
        manifest = self.pipeline.bundle.manifest
        steps = len(manifest.sampler.steps)
        planned = self._planned(prompt, bits)
        told = View((), "The whole run is known; loading its engines.", _html(manifest, planned, 0))
        yield told
        work = (run, self.pipeline, prompt, bits, seed, count)
        worker = threading.Thread(target=self._work, args=work, daemon=True)
        self._workers = [*(each for each in self._workers if each.is_alive()), worker]
        worker.start()
        images: tuple[Image.Image, ...] = ()
        while True:
            kind, value = run.events.get()
            if kind == "step":
                done = value % steps or steps
                of = f"image {len(images) + 1} of {count}, " if count > 1 else ""
                told = replace(
                    told,
                    status=f"Drawing: {of}step {done} of {steps}.",
                    bits=_html(manifest, planned, done),
                )
                yield told
            elif kind == "preview":
                told = replace(told, images=(*images, *value))
                yield told
            elif kind == "image":
                images = (*images, value)
                told = replace(told, images=images)
            elif kind == "error":
                raise value
            else:
                yield View(images, _told(value), _html(manifest, value[-1], steps))
                return

    def _work(
        self, run: _Run, pipeline: TextToImage, prompt: str, bits: int | None, seed: int, count: int
    ) -> None:
        def on_step(done: int, total: int) -> None:
            if run.abandoned.is_set():
                raise _AbandonedError
            run.events.put(("step", done))

        try:
            made = pipeline(
                [prompt] * count,
                seed=seed,
                bits=bits,
                on_step=on_step,
                on_image=lambda image, record: run.events.put(("image", image)),
                previews=Previews(self.previews, lambda images: run.events.put(("preview", images))),
            )
        except _AbandonedError:
            return
        except Exception as error:  # it belongs to the thread that waits
            run.events.put(("error", error))
        else:
            told = [record | {"warnings": made.warnings} for record in made.records]
            run.events.put(("done", told))

    def _planned(self, prompt: str, bits: int | None) -> dict[str, Any]:
        """Return the run's schedule before its first step, as the run time will tell it afterwards."""
        manifest = self.pipeline.bundle.manifest
        steps = len(manifest.sampler.steps)
        if bits is None and self._schedule is not None:
            patterns = self._schedule(self.pipeline.qualities([prompt]))
        else:
            patterns = [self.pipeline.chain.uniform(self.pipeline.bundle.bits(bits))] * steps
        return {
            "blocks": [block.name for block in manifest.blocks],
            "bits": [list(map(block_bits, manifest.blocks, pattern)) for pattern in patterns],
        }


def _failure(problem: str, expected: str | None, fix: str | None) -> View:
    more = [part[0].upper() + part[1:] for part in (expected, fix) if part]
    parts = [f"**This did not work:** {problem}", *more]
    return View((), ". ".join(parts) + ".", "", failed=True)


def _told(records: Sequence[dict[str, Any]]) -> str:
    record = records[0]
    seconds = sum(r["seconds"]["total"] for r in records)
    quality = "" if record["q"] is None else f"q **{record['q']:.3f}**, "
    steps = record["seconds"]["steps"]
    lines = [
        f"{quality}FAB **{record['fab']:.2f}** bits, **{seconds:.2f} s** "
        f"({1000 * sum(steps) / len(steps):.0f} ms a step), {record['engine_switches']} engine switches, "
        f"seed {record['seed']}",
        *(f"Note: {warning}" for warning in record["warnings"]),
    ]
    return "\n\n".join(lines)


def _html(manifest: Manifest, record: dict[str, Any], done: int) -> str:
    """Return the map as a table; steps that are still to come are faint."""
    drawn, options = bit_map(manifest, record), options_of(manifest)
    legend = "".join(
        f'<span><i style="background:{colour(bits, options)}"></i>{bits} bits</span>' for bits in options
    )
    lines = []
    for block, row in zip(drawn.blocks, drawn.rows, strict=True):
        cells = "".join(
            f'<td class="{"" if step < done else "ahead"}" style="background:{colour(bits, options)}" '
            f'title="{html.escape(block)}, step {step + 1}: {bits:g} bits">{bits:.0f}</td>'
            for step, bits in enumerate(row)
        )
        lines.append(f"<tr><th>{html.escape(block)}</th>{cells}</tr>")
    return (
        f'<div class="bitmap"><div class="legend">{legend}<span>rows: blocks, columns: steps</span></div>'
        f'<div class="scroll"><table role="img" aria-label="{html.escape(drawn.words)}">{"".join(lines)}'
        "</table></div></div>"
    )
