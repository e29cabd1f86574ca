"""What a build would be, from the configs alone: nothing is downloaded, no weight is made.

Counts are exact: the denoiser runs once on the meta device, where a tensor is a shape. The size of the weight
file is exact too, but for alignment. Memory and seconds are estimates: see the constants below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from pydantic import Field

from qlip_export.capture import Shapes, denoiser_family, make_denoiser, shapes_of
from qlip_export.checkpoint import Checkpoint
from qlip_export.families import Family
from qlip_export.memory import weight_bytes
from qlip_export.random_weights import module_of
from qlip_export.spec import Container, Frozen, Granularity, ImageSize, Unit, WeightBits, container_of
from qlip_export.text_encoders import PART_WEIGHTS, parts_of
from qlip_export.zoo import ZooModel

# Fitted to a build of BK-SDM-Tiny and to exports of FLUX with few blocks: `python -m benchmarks.memory`.
EXPORT_BASE = 5.5e8
"""Bytes of a process that has loaded torch, diffusers and the ONNX libraries."""
EXPORT_LAYER = 2e5
"""Bytes of the exporter's graph for each Conv2d or Linear: its nodes and those around it."""
EXPORT_WEIGHT = 8
"""Bytes for each number of the largest parameter while it is put on its grid: FP32, reading, codes."""

COMPILE_WEIGHT = 13
"""Bytes for each weight of the largest engine while OpenVINO compiles it: 2.9 GB for BK-SDM-Tiny."""

RUN_ENGINE = 11_000_000
"""Bytes that a loaded engine of OpenVINO takes beside its weights: graph, kernels, what it computes in.

Emoji's engines at 8, 16 and 32 bits take 163, 168 and 198 MB where this makes 148, 162 and 188.
"""

CAPTURE_SECONDS = 0.2
"""Of a core, for each Conv2d or Linear that is captured."""
WEIGHTS_PER_SECOND = 16e6
"""Read, put on a grid and written by a core."""
COMPILED_PER_SECOND = 32e6
"""Weights of all engines that OpenVINO compiles on a core."""

GROUPS = 5
"""Timestep groups of a policy, unless `calibrate` is told otherwise."""

_NOT_BUILT = ("encoder.down_blocks", "encoder.mid_block", "encoder.conv", "quant_conv")
"""Parts of a VAE that only read images."""


class BlockPlan(Frozen):
    """A block of the denoiser."""

    name: str
    layers: int = Field(description="Conv2d and Linear")
    parameters: int
    macs: int = Field(
        description="multiply-accumulates of Conv2d and Linear, one image, one step, no guidance"
    )


class SizePlan(Frozen):
    """What differs in a further size of images and batches."""

    height: int
    width: int
    batch_size: int
    macs_per_step: int = Field(description="of Conv2d and Linear, one image, no guidance")
    run_memory_bytes: dict[int, int] = Field(description="estimate by bits")


class Plan(Frozen):
    """What `qlip-export plan` tells."""

    model: str
    family: str
    height: int = Field(description="of images, pixels")
    width: int
    batch_size: int
    guided: bool = Field(description="each step runs an unconditional half as well: twice the MACs")
    bits: tuple[int, ...]
    weight_bits: WeightBits
    granularity: Granularity
    parameters: int = Field(description="of the denoiser")
    layers: int = Field(description="Conv2d and Linear of the denoiser")
    quantized_layers: int = Field(description="K: those whose activations follow the bit options")
    macs_per_step: int = Field(description="of Conv2d and Linear, one image, no guidance")
    blocks: tuple[BlockPlan, ...]
    precision: Unit
    engines: int = Field(
        description="of denoiser, text encoders and VAE decoder, in all sizes; by layer at most so many"
    )
    component_engines: dict[str, int] = Field(
        description="of each text encoder and the VAE decoder; large text encoders are cut between layers"
    )
    component_parameters: dict[str, int] = Field(description="of text encoders and VAE decoder")
    denoiser_bytes: dict[int, int] = Field(description="by weight bits: all parameters at that many bits")
    weight_file_bytes: int = Field(
        description="of the denoiser at these weight bits, shared by all bit options"
    )
    engine_bytes: dict[int, int] = Field(description="by activation bits: weights in the type computed in")
    packed_engine_bytes: dict[int, int] = Field(description="the same where the backend keeps packed weights")
    export_memory_bytes: int = Field(description="estimate of the peak of `export`")
    build_memory_bytes: int = Field(description="estimate of the peak of `build` with OpenVINO")
    run_memory_bytes: dict[int, int] = Field(
        description="estimate by bits, with OpenVINO: weights, graphs and kernels of all engines, activations"
    )
    export_seconds: int = Field(description="estimate for one core of a server")
    build_seconds: int = Field(description="the same, with OpenVINO's compilation")
    other_sizes: tuple[SizePlan, ...] = Field(
        default=(), description="further sizes, which share the weight file; blocks are those of the first"
    )


def plan_sizes(model: ZooModel, checkpoint: Checkpoint, sizes: Sequence[ImageSize], **options: Any) -> Plan:
    """Return the plan of a build with several sizes of images and batches; ``options`` as `plan` takes them.

    Raises:
        QlipError: As `plan`.
    """
    first, *others = (plan(model, checkpoint, **options, **dict(size)) for size in sizes)
    texts = sum(count for name, count in first.component_engines.items() if name != "vae")
    batches = {size.batch_size for size in (first, *others)}  # text encoders know no images
    engines = (first.engines - texts) * len(sizes) + texts * len(batches)
    capture, compiling = CAPTURE_SECONDS * first.layers, first.build_seconds - first.export_seconds
    exporting = int(first.export_seconds + capture * len(others))
    return first.model_copy(
        update={
            "engines": engines,
            "export_seconds": exporting,
            "build_seconds": exporting + compiling * len(sizes),
            "other_sizes": tuple(
                SizePlan(**{name: getattr(other, name) for name in SizePlan.model_fields}) for other in others
            ),
        }
    )


def plan(
    model: ZooModel,
    checkpoint: Checkpoint,
    *,
    bits: tuple[int, ...] = (8, 16, 32),
    weight_bits: WeightBits = 4,
    granularity: Granularity = "coarse",
    precision: Unit = "block",
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
) -> Plan:
    """Return the plan of a build.

    Raises:
        QlipError: The architecture is unknown, a config lacks something, the size or the bits do not fit.
    """
    for option in bits:
        container_of(option)
    family = denoiser_family(checkpoint)
    shapes = shapes_of(checkpoint, batch_size=batch_size, height=height, width=width)
    seen = _run_on_meta(checkpoint, family, shapes, granularity)
    sizes = {
        name: _sizes_of(checkpoint, name)
        for name in checkpoint
        if name.startswith("text_encoder") or name == "vae"
    }
    components = {name: sum(found.values()) for name, found in sizes.items()}
    parts = {name: _parts(name, found) for name, found in sizes.items()}
    parameters = sum(b.parameters for b in seen.blocks)
    engine_bytes = {b: _engine_bytes(seen, family, b, 32) for b in bits}
    weights = sum(components.values()) * Container.FLOAT.nbytes
    largest = max(*seen.weights.values(), *(n for found in sizes.values() for n in found.values()))
    exporting = int(EXPORT_BASE + EXPORT_LAYER * len(seen.weights) + EXPORT_WEIGHT * largest)
    largest_engine = max(*(b.parameters for b in seen.blocks), *(n for of in parts.values() for n in of))
    compiling = int(EXPORT_BASE + EXPORT_LAYER * len(seen.weights) + COMPILE_WEIGHT * largest_engine)
    everything = parameters + sum(components.values())
    seconds = CAPTURE_SECONDS * len(seen.weights) + everything / WEIGHTS_PER_SECOND
    compiled = parameters * len(bits) + sum(components.values())
    loaded = RUN_ENGINE * (len(seen.blocks) + sum(map(len, parts.values())))
    return Plan(
        model=model.name,
        family=family.name,
        height=shapes.image_height,
        width=shapes.image_width,
        batch_size=batch_size,
        guided=family.guided,
        bits=bits,
        weight_bits=weight_bits,
        granularity=granularity,
        parameters=parameters,
        layers=len(seen.weights),
        quantized_layers=sum(map(family.quantizes, seen.weights)),
        macs_per_step=sum(b.macs for b in seen.blocks),
        blocks=seen.blocks,
        precision=precision,
        engines=sum(_variants(b, family, precision, seen, granularity, len(bits)) for b in seen.blocks)
        + sum(map(len, parts.values())),
        component_engines={name: len(of) for name, of in parts.items()},
        component_parameters=components,
        denoiser_bytes={b: weight_bytes(parameters, b) for b in (4, 8, 16, 32)},
        weight_file_bytes=_weight_file_bytes(seen, parameters, weight_bits),
        engine_bytes=engine_bytes,
        packed_engine_bytes={b: _engine_bytes(seen, family, b, weight_bits) for b in bits},
        export_memory_bytes=exporting,
        build_memory_bytes=max(exporting, compiling),
        run_memory_bytes={
            b: size + weights + loaded + seen.activations * container_of(b).nbytes
            for b, size in engine_bytes.items()
        },
        export_seconds=int(seconds),
        build_seconds=int(seconds + compiled / COMPILED_PER_SECOND),
    )


class _Seen(Frozen):
    """What one call of the denoiser showed."""

    blocks: tuple[BlockPlan, ...]
    weights: dict[str, int]
    """Weights of each Conv2d and Linear, by layer."""
    channels: int
    """Output channels of all of them: as many scales."""
    activations: int
    """Numbers in the inputs and outputs of the layer with most of them."""


def _run_on_meta(checkpoint: Checkpoint, family: Family, shapes: Shapes, granularity: Granularity) -> _Seen:
    with torch.device("meta"):
        denoiser = make_denoiser(checkpoint, shapes)
    macs: dict[str, int] = {}
    order: dict[str, None] = {}
    activations = 0
    weights: dict[str, int] = {}
    channels = 0

    def watch(name: str) -> Any:
        def seen(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal activations, channels
            block = family.block_of(name, granularity)
            if block is not None:
                order.setdefault(block)
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and block is not None:
                macs[block] = macs.get(block, 0) + output.numel() * prod(module.weight.shape[1:])
                activations = max(activations, output.numel() + sum(x.numel() for x in inputs))
                weights[name] = module.weight.numel()
                channels += module.weight.shape[0]

        return seen

    module = denoiser.module
    for name, part in module.named_modules():
        if not list(part.children()):
            part.register_forward_hook(watch(name))
    with torch.no_grad(), torch.device("meta"):
        denoiser(*(torch.empty(shapes.of(i)) for i in family.inputs))
    held: dict[str, int] = {}
    layers: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        block = family.block_of(name.rpartition(".")[0], granularity)
        if block is not None:
            held[block] = held.get(block, 0) + parameter.numel()
    for name in weights:
        block = str(family.block_of(name, granularity))
        layers[block] = layers.get(block, 0) + 1
    images = shapes.denoiser_batch
    blocks = tuple(
        BlockPlan(name=b, layers=layers.get(b, 0), parameters=held.get(b, 0), macs=macs.get(b, 0) // images)
        for b in order
    )
    return _Seen(blocks=blocks, weights=weights, channels=channels, activations=activations)


def _variants(
    block: BlockPlan, family: Family, precision: Unit, seen: _Seen, granularity: Granularity, options: int
) -> int:
    """Return the number of engines of a block: one for each option, or the most that a policy can ask for.

    In a timestep group a layer changes its bits at ``options - 1`` values of q at most, so a block of k
    layers takes no more than ``1 + k (options - 1)`` patterns there.
    """
    if block.name in family.float32_blocks:
        return 1
    if precision == "block":
        return options
    own = (name for name in seen.weights if family.block_of(name, granularity) == block.name)
    return GROUPS * (1 + sum(map(family.quantizes, own)) * (options - 1))


def _parts(name: str, sizes: Mapping[str, int]) -> list[int]:
    """Return about how many parameters each engine of a component holds."""
    parts = max(1, len(parts_of(sizes))) if name.startswith("text_encoder") else 1
    return [min(PART_WEIGHTS, sum(sizes.values()))] * parts if parts > 1 else [sum(sizes.values())]


def _sizes_of(checkpoint: Checkpoint, name: str) -> dict[str, int]:
    """Return the sizes of a component's parameters, of those that are built, by name."""
    library, class_name = checkpoint.library_of(name), checkpoint.class_of(name)
    module = module_of(library, class_name, checkpoint.component(name).config, meta=True)
    return {n: p.numel() for n, p in module.named_parameters() if not n.startswith(_NOT_BUILT)}


def _weight_file_bytes(seen: _Seen, parameters: int, bits: WeightBits) -> int:
    """Return the bytes of codes, scales in FP32 and FP16, and of the rest in FP16 as checkpoints have it."""
    quantized = sum(seen.weights.values())
    if bits == 32:
        return 2 * parameters
    return weight_bytes(quantized, bits) + 6 * seen.channels + 2 * (parameters - quantized)


def _engine_bytes(seen: _Seen, family: Family, bits: int, weight_bits: WeightBits) -> int:
    """Return the bytes of the denoiser's weights as engines of one bit option hold them.

    Weights of fewer bits stay packed, but kernels that multiply INT8 want them in INT8.
    """
    container = container_of(bits)
    always = sum(b.parameters for b in seen.blocks if b.name in family.float32_blocks)
    inside = sum(b.parameters for b in seen.blocks) - always
    wide = 8 * container.nbytes
    stored = (
        wide if weight_bits == 32 else max(weight_bits, 8) if container is Container.INT8 else weight_bits
    )
    return weight_bytes(inside, stored) + Container.FLOAT.nbytes * always
