"""The engines of a report: what each takes, and what the sizes of a bundle cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from qlip_export.progress import Progress
from qlip_export.runtime import TextToImage
from qlip_export.spec import Frozen, variant_name

TIMING_REPEATS = 7


class EngineRow(Frozen):
    """One engine."""

    block: str
    variant: str
    container: str
    bytes: int
    milliseconds: float = Field(description="median of a call")


class SizeRow(Frozen):
    """One size of the bundle."""

    size: str = Field(description="WIDTHxHEIGHT[:BATCH]")
    engines: int = Field(description="of the denoiser")
    bytes: int = Field(description="of these")
    milliseconds: dict[int, float] = Field(description="of a step at uniform bits: the sum of its blocks")


def time_engines(pipeline: TextToImage, progress: Progress) -> tuple[EngineRow, ...]:
    """Return every engine of the denoiser, after timing all in turn."""
    bundle = pipeline.bundle
    blocks = bundle.manifest.blocks
    progress.stage("time", TIMING_REPEATS + 1)
    told = f"{sum(len(block.variants) for block in blocks)} engines in turn"
    times = pipeline.chain.time_blocks(TIMING_REPEATS, lambda: progress.item(told))
    rows = []
    for block in blocks:
        for name, variant in block.variants.items():
            engine = bundle.engine(pipeline.target.entry, variant.onnx)
            rows.append(
                EngineRow(
                    block=block.name,
                    variant=str(variant.bits) if variant.layers is None else name,
                    container=variant.container.value,
                    bytes=bundle.manifest.files[engine.path].size,
                    milliseconds=1000 * times[block.name][name],
                )
            )
    return tuple(rows)


def other_sizes(pipeline: TextToImage) -> Iterator[TextToImage]:
    """Yield the bundle's further sizes one by one: engines of only one stand beside those of the first."""
    for size in pipeline.sizes()[1:]:
        height, width = size.shapes.image
        yield pipeline.at(height=height, width=width, batch_size=size.shapes.batch_size)


def step_of(pipeline: TextToImage, engines: Sequence[EngineRow]) -> SizeRow:
    """Return what the engines of one size take together."""
    times = {(engine.block, engine.variant): engine.milliseconds for engine in engines}
    blocks = pipeline.bundle.manifest.blocks
    return SizeRow(
        size=pipeline.bundle.manifest.shapes.label,
        engines=len(engines),
        bytes=sum(engine.bytes for engine in engines),
        milliseconds={
            bits: sum(times[block.name, str(block.variants[variant_name(bits)].bits)] for block in blocks)
            for bits in pipeline.bundle.uniform
        },
    )
