"""`qlip-export plan`: what a build would be, before anything is downloaded or built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from qlip_export.commands.options import (
    HeightOption,
    JsonOption,
    RevisionOption,
    SizesOption,
    WidthOption,
    numbers,
)
from qlip_export.errors import QlipError

if TYPE_CHECKING:
    from qlip_export.plan import Plan


def plan(
    model: Annotated[
        str, typer.Option(help="Name of the zoo, a diffusers folder (configs suffice), or a Hub id.")
    ],
    bits: Annotated[str, typer.Option(help="Activation bit options, increasing.")] = "8,16,32",
    weight_bits: Annotated[int, typer.Option(help="Weight bits: 4, 8 or 32.")] = 4,
    blocks: Annotated[str, typer.Option(help="Where to cut: coarse, fine or whole.")] = "coarse",
    granularity: Annotated[
        str, typer.Option(help="Bits by block, or by layer: at most so many engines.")
    ] = "block",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    size: SizesOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what a build would be: blocks, layers, MACs, engines, bytes, memory, time; reads configs only."""
    from qlip_export.spec import Granularity, Unit, WeightBits, image_sizes

    options = numbers(bits)
    wanted = _one_of(get_args(WeightBits), weight_bits, "--weight-bits")
    cut = _one_of(get_args(Granularity), blocks, "--blocks")
    precision = _one_of(get_args(Unit), granularity, "--granularity")
    sizes = image_sizes(tuple(size or ()), height, width, batch_size)
    from qlip_export.progress import waiting
    from qlip_export.zoo import find_configs

    found, checkpoint = find_configs(model, revision=revision)
    with waiting("loading torch"):
        from qlip_export.plan import plan_sizes
    with waiting(f"counting {found.name}"):
        result = plan_sizes(
            found,
            checkpoint,
            sizes,
            bits=options,
            weight_bits=wanted,
            granularity=cut,
            precision=precision,
        )
    print(result.model_dump_json() if as_json else describe(result))


def _one_of(known: tuple[Any, ...], value: object, option: str) -> Any:
    if value not in known:
        raise QlipError(f"{option} is not known", expected=", ".join(map(str, known)), found=str(value))
    return value


def describe(plan: Plan) -> str:
    """Return a plan as text for a terminal."""
    halves = ", twice with guidance" if plan.guided else ""
    by_bits = ", ".join(f"{_size(n)} at {b} bits" for b, n in plan.denoiser_bytes.items())
    engines = ", ".join(f"{_size(n)} at {b}" for b, n in plan.engine_bytes.items())
    packed = ", ".join(f"{_size(n)} at {b}" for b, n in plan.packed_engine_bytes.items())
    running = ", ".join(f"{_size(n)} at {b}" for b, n in plan.run_memory_bytes.items())
    width = max(len(b.name) for b in plan.blocks)
    lines = [
        f"{plan.model} ({plan.family}), {plan.width}x{plan.height}, batch {plan.batch_size}",
        f"denoiser: {plan.parameters:,} parameters, {plan.layers} layers, {plan.quantized_layers} of them "
        f"with activations at {'/'.join(map(str, plan.bits))} bits",
        f"a step: {plan.macs_per_step / 1e9:,.1f} GMACs in Conv2d and Linear an image{halves}",
        f"{len(plan.blocks)} blocks, {'at most ' if plan.precision == 'layer' else ''}{plan.engines} engines",
        *(
            f"  {b.name:{width}} {b.layers:4} layers {b.parameters / 1e6:9,.1f} M {b.macs / 1e9:9,.1f} GMACs"
            for b in plan.blocks
        ),
        f"denoiser's parameters: {by_bits}",
        f"weight file at {plan.weight_bits} bits: {_size(plan.weight_file_bytes)}, shared by all bit options",
        f"engines by activation bits: {engines}",
        f"  where the backend keeps packed weights: {packed}",
        f"to export: about {_size(plan.export_memory_bytes)} of memory, {plan.export_seconds:,} s of a core",
        f"with OpenVINO's engines: about {_size(plan.build_memory_bytes)}, {plan.build_seconds:,} s",
        f"to run: about {running}",
        *(
            f"{other.width}x{other.height}, batch {other.batch_size}, with the same weights: "
            f"{other.macs_per_step / 1e9:,.1f} GMACs, about "
            + ", ".join(f"{_size(n)} at {b}" for b, n in other.run_memory_bytes.items())
            for other in plan.other_sizes
        ),
    ]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
