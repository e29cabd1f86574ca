"""`qlip-export build`, `export` and `compile`: from a model to a bundle with engines."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from qlip_export.backends import BACKENDS
from qlip_export.commands.options import (
    Blocks,
    BundleArgument,
    HeightOption,
    JsonOption,
    RevisionOption,
    SchedulerOption,
    SizesOption,
    StepsOption,
    WidthOption,
    numbers,
    validated,
)
from qlip_export.errors import QlipError


class Granularity(str, enum.Enum):
    """What has bits of its own in an engine."""

    block = "block"
    layer = "layer"


ModelOption = Annotated[
    str,
    typer.Option(help="Name of the zoo (emoji, bk-sdm-tiny, sd-v1-4, ...), a diffusers folder, or a Hub id."),
]
BitsOption = Annotated[str, typer.Option(help="Activation bit options, increasing.")]
WeightBitsOption = Annotated[int, typer.Option(help="Weight bits: 4, 8, or 32 for weights as they are.")]
BlocksOption = Annotated[
    Blocks, typer.Option(help="Where to cut: coarse, fine (ResNets, transformers), whole.")
]
LoraOption = Annotated[
    list[str] | None, typer.Option(help="PATH[:SCALE] of a LoRA (diffusers, PEFT) to fuse; repeatable.")
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Build from configs alone, to measure speed and memory.")
]
WeightSeedOption = Annotated[int, typer.Option(help="Seed of random weights.")]
BatchSizeOption = Annotated[int, typer.Option(help="Images per batch, static.")]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="Folder of calibration results.", show_default="the model's own")
]
PolicyOption = Annotated[
    str, typer.Option(help="Trained policy: auto (the default one that fits --bits), none, or its name.")
]
GranularityOption = Annotated[
    Granularity,
    typer.Option(
        help="block: an engine runs all its layers at one option. layer: engines for exactly the "
        "combinations that a policy by layer can ask for."
    ),
]
FuseOption = Annotated[
    bool, typer.Option("--fuse", help="Make one engine of neighbours that the policy never tells apart.")
]
MaxVariantsOption = Annotated[
    int | None,
    typer.Option(help="With --granularity layer: engines of a block at most.", show_default="no limit"),
]
TargetFabOption = Annotated[
    float | None,
    typer.Option(help="With --granularity layer: as few engines as give these average bits."),
]
WeightsOption = Annotated[
    str, typer.Option(help="auto (learned rounding where the calibration has it) or nearest.")
]
BundleOption = Annotated[
    Path | None, typer.Option("-o", "--out", help="Where the bundle goes.", show_default="engines/MODEL")
]


def build(
    model: ModelOption,
    bits: BitsOption = "8,16,32",
    weight_bits: WeightBitsOption = 4,
    blocks: BlocksOption = Blocks.coarse,
    backend: Annotated[str, typer.Option(help="auto, or a name that `compile` takes.")] = "auto",
    batch_size: BatchSizeOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    size: SizesOption = None,
    steps: StepsOption = 25,
    scheduler: SchedulerOption = None,
    calibration: CalibrationOption = None,
    policy: PolicyOption = "auto",
    weights: WeightsOption = "auto",
    revision: RevisionOption = None,
    lora: LoraOption = None,
    random_weights: RandomWeightsOption = False,
    seed: WeightSeedOption = 0,
    granularity: GranularityOption = Granularity.block,
    max_variants: MaxVariantsOption = None,
    max_engine_bytes: Annotated[
        str | None,
        typer.Option(help="With --granularity layer: of the denoiser's engines together, e.g. 600MB."),
    ] = None,
    target_fab: TargetFabOption = None,
    target_latency: Annotated[
        float | None,
        typer.Option(help="With --granularity layer: as few engines as give these seconds of denoising."),
    ] = None,
    fuse: FuseOption = False,
    out: BundleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a model and compile its engines into a bundle: `export` and `compile` in one."""
    options = dict(locals())
    _export(options.pop("out"), options.pop("as_json"), options)


def export(
    model: ModelOption,
    bits: BitsOption = "8,16,32",
    weight_bits: WeightBitsOption = 4,
    blocks: BlocksOption = Blocks.coarse,
    batch_size: BatchSizeOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    size: SizesOption = None,
    steps: StepsOption = 25,
    scheduler: SchedulerOption = None,
    calibration: CalibrationOption = None,
    policy: PolicyOption = "auto",
    weights: WeightsOption = "auto",
    revision: RevisionOption = None,
    lora: LoraOption = None,
    random_weights: RandomWeightsOption = False,
    seed: WeightSeedOption = 0,
    granularity: GranularityOption = Granularity.block,
    max_variants: MaxVariantsOption = None,
    target_fab: TargetFabOption = None,
    fuse: FuseOption = False,
    out: BundleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a model into a bundle without engines, to be compiled on any machine."""
    options = dict(locals())
    _export(options.pop("out"), options.pop("as_json"), options)


def _export(out: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    """Build where the options name a backend, export where they do not, and tell what was done."""
    from qlip_export.display import print_variants
    from qlip_export.progress import progress_for_terminal, waiting

    with waiting("loading torch"):
        from qlip_export.build import BuildOptions, export_bundle
        from qlip_export.build import build as build_bundle

    run = build_bundle if "backend" in options else export_bundle
    model: str = options["model"]
    options |= {"lora": tuple(options["lora"] or ()), "sizes": tuple(options.pop("size") or ())}
    options |= {"bits": numbers(options["bits"]), "precision": options.pop("granularity").value}
    options["granularity"] = options.pop("blocks").value
    if options.get("max_engine_bytes") is not None:
        options["max_engine_bytes"] = _bytes(options["max_engine_bytes"], "--max-engine-bytes")
    checked = validated(BuildOptions, **options)
    with progress_for_terminal() as progress:
        report = run(checked, out or Path("engines") / Path(model).resolve().name, progress)
    if as_json:
        print(report.model_dump_json())
        return
    sizes = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in report.bytes.items() if size)
    if report.variants:
        print_variants(report)
    sizes_told = f", images of {', '.join(report.sizes)}" if len(report.sizes) > 1 else ""
    print(f"{report.bundle}: {report.blocks} blocks at {' / '.join(map(str, report.bits))} bits{sizes_told}")
    if report.unfused != report.blocks:
        print(f"  {report.unfused} blocks were fused into {report.blocks}")
    print(f"  policy: {report.policy or 'none, uniform bits only'}; weights: {report.weights}")
    if report.random_weights is not None:
        print(f"  random weights of seed {report.random_weights}: for speed and memory, not for images")
    where = (
        f"{report.backend} on {report.device}, {report.engines} engines" if report.backend else "no engines"
    )
    print(f"  {where}, {report.seconds:.0f} s")
    print(f"  {report.built} files made, {report.reused} reused; {sizes}")
    if report.backend:
        print(f'try: qlip-export generate {report.bundle} "a red apple"')
    else:
        print(f"next: qlip-export compile {report.bundle} --backend openvino")


def compile_(
    bundle: BundleArgument,
    backend: Annotated[str, typer.Option(help=f"auto, {', '.join(BACKENDS)}.")] = "auto",
    optimization_level: Annotated[
        int | None,
        typer.Option(help="TensorRT: 0 (fast build) to 5 (fast engine).", show_default="the library's"),
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option(help="TensorRT: MiB of GPU memory that an engine may use.", show_default="no limit"),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="TensorRT: file that keeps what was timed, for the next build.")
    ] = None,
    hardware_compat: Annotated[
        str | None,
        typer.Option(help="TensorRT: same-compute-capability or ampere-plus.", show_default="this GPU only"),
    ] = None,
    version_compat: Annotated[
        bool, typer.Option("--version-compat", help="TensorRT: engines for later versions, too.")
    ] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="TensorRT: let FP32 layers compute in TF32.")] = False,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MINxOPTxMAX",
            help="TensorRT, TensorRT-RTX: batch, height or width (images, pixels) that vary; repeatable.",
            show_default="all static",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="TensorRT-RTX: GPUs, e.g. sm86,sm89.", show_default="8.0, 8.6, 8.9 and 12.x"),
    ] = None,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Time every engine, where it runs here.")
    ] = True,
    keep_dominated: Annotated[
        bool,
        typer.Option("--keep-dominated", help="Run variants that were found slower than more precise ones."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add engines of a backend to a bundle, or bring them up to date; needs neither torch nor the model."""
    from qlip_export.backends.options import CompileOptions
    from qlip_export.compile import compile_bundle
    from qlip_export.display import print_dominated
    from qlip_export.extents import parse_profile
    from qlip_export.progress import progress_for_terminal
    from qlip_export.timing import time_target

    options = validated(
        CompileOptions,
        optimization_level=optimization_level,
        workspace=workspace,
        timing_cache=timing_cache,
        hardware_compat=hardware_compat,
        version_compat=version_compat,
        tf32=tf32,
        profile=parse_profile(profile or ()),
        target=tuple(target.split(",")) if target is not None else (),
    )
    with progress_for_terminal() as progress:
        report = compile_bundle(bundle, backend, progress, options)
        if timing:
            timed = time_target(bundle, report.target, progress, keep_dominated=keep_dominated)
            report = report.model_copy(update={"timing": timed})
    if as_json:
        print(report.model_dump_json())
        return
    print(f"{report.bundle}: {report.engines} engines of {report.backend} for {report.device}")
    print(
        f"  {report.built} made, {report.reused} there; {report.bytes / 1e6:.1f} MB, {report.seconds:.0f} s"
    )
    print_dominated(bundle, report.target)


def _bytes(text: str, option: str) -> int:
    from qlip_export.runtime.budget import parse_size

    size = parse_size(text, bare=True)
    if not size:
        raise QlipError(f"{option} is no size", expected="e.g. 600MB, 1.5GB", found=text)
    return size
