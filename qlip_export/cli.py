"""The command line. Heavy imports live inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import enum
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from qlip_export.backends import BACKENDS
from qlip_export.commands.demo import demo
from qlip_export.commands.plan import plan
from qlip_export.commands.report import report
from qlip_export.errors import QlipError

if TYPE_CHECKING:
    from PIL.Image import Image

    from qlip_export.runtime import TextToImage

app = typer.Typer(
    name="qlip-export",
    help="Compile text-to-image diffusion models into block engines at several precisions.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

BundleArgument = Annotated[Path, typer.Argument(help="Folder of a bundle.", show_default=False)]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON result on stdout, all else on stderr.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of an engine.", show_default="all")
]


class Granularity(str, enum.Enum):
    """What has bits of its own in an engine."""

    block = "block"
    layer = "layer"


class Blocks(str, enum.Enum):
    """Where the denoiser is cut."""

    coarse = "coarse"
    fine = "fine"
    whole = "whole"


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Entry of the command line."""
    if version:
        from qlip_export import __version__

        print(__version__)
        raise typer.Exit


ModelOption = Annotated[
    str,
    typer.Option(help="Name of the zoo (emoji, bk-sdm-tiny, sd-v1-4, ...), a diffusers folder, or a Hub id."),
]
BitsOption = Annotated[str, typer.Option(help="Activation bit options, increasing.")]
WeightBitsOption = Annotated[int, typer.Option(help="Weight bits: 4, 8, or 32 for weights as they are.")]
BlocksOption = Annotated[
    Blocks, typer.Option(help="Where to cut: coarse, fine (ResNets, transformers), whole.")
]
HeightOption = Annotated[
    int | None, typer.Option(help="Height of images, pixels.", show_default="the model's own")
]
WidthOption = Annotated[int | None, typer.Option(help="Width of images.", show_default="the model's own")]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model from the Hub.", show_default="main")
]
LoraOption = Annotated[
    list[str] | None, typer.Option(help="PATH[:SCALE] of a LoRA (diffusers, PEFT) to fuse; repeatable.")
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Build from configs alone, to measure speed and memory.")
]
WeightSeedOption = Annotated[int, typer.Option(help="Seed of random weights.")]
BatchSizeOption = Annotated[int, typer.Option(help="Images per batch, static.")]
StepsOption = Annotated[int, typer.Option(help="Sampling steps.")]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        help="dpmsolver++, ddim, euler, pndm or flow-match-euler.", show_default="the model family's own"
    ),
]
GuidanceOption = Annotated[
    float | None, typer.Option(help="Guidance scale.", show_default="the model family's own")
]
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
TargetOption = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Whose engines of the bundle to run.",
        show_default="auto: the first whose library and device are here",
    ),
]


@app.command()
def build(
    model: ModelOption,
    bits: BitsOption = "8,16,32",
    weight_bits: WeightBitsOption = 4,
    blocks: BlocksOption = Blocks.coarse,
    backend: Annotated[str, typer.Option(help="auto, or a name that `compile` takes.")] = "auto",
    batch_size: BatchSizeOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
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


@app.command()
def export(
    model: ModelOption,
    bits: BitsOption = "8,16,32",
    weight_bits: WeightBitsOption = 4,
    blocks: BlocksOption = Blocks.coarse,
    batch_size: BatchSizeOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
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
    options["lora"] = tuple(options["lora"] or ())
    options |= {"bits": _numbers(options["bits"]), "precision": options.pop("granularity").value}
    options["granularity"] = options.pop("blocks").value
    if options.get("max_engine_bytes") is not None:
        options["max_engine_bytes"] = _bytes(options["max_engine_bytes"], "--max-engine-bytes")
    validated = _validated(BuildOptions, **options)
    with progress_for_terminal() as progress:
        report = run(validated, out or Path("engines") / Path(model).resolve().name, progress)
    if as_json:
        print(report.model_dump_json())
        return
    sizes = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in report.bytes.items() if size)
    if report.variants:
        print_variants(report)
    print(f"{report.bundle}: {report.blocks} blocks at {' / '.join(map(str, report.bits))} bits")
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


@app.command("compile")
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
    from qlip_export.progress import progress_for_terminal
    from qlip_export.timing import time_target

    options = _validated(
        CompileOptions,
        optimization_level=optimization_level,
        workspace=workspace,
        timing_cache=timing_cache,
        hardware_compat=hardware_compat,
        version_compat=version_compat,
        tf32=tf32,
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


@app.command()
def generate(
    bundle: BundleArgument,
    prompt: Annotated[list[str], typer.Argument(help="One prompt or several.", show_default=False)],
    bits: Annotated[
        int | None,
        typer.Option(
            help="Activation bits of all blocks and steps.",
            show_default="by the bundle's policy; without one, the largest up to 16",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed; image i uses SEED + i.", show_default="random")
    ] = None,
    guidance: GuidanceOption = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to steer away from.", show_default="nothing")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="PNG file, or a folder for several prompts.",
            show_default="image.png or images/",
        ),
    ] = None,
    backend: TargetOption = "auto",
    threads: ThreadsOption = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help="Most memory that engines may take, e.g. 600MB; they come and go as the run needs.",
            show_default="all engines of a run stay loaded",
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Draw the bits of each block and step.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make images from prompts, at the bits that each prompt needs."""
    from qlip_export.display import print_schedules
    from qlip_export.progress import Silent, progress_for_terminal
    from qlip_export.runtime import TextToImage
    from qlip_export.runtime.budget import parse_budget

    if not prompt or not all(p.strip() for p in prompt):
        raise QlipError(
            "a prompt is empty", expected="text", fix='e.g. qlip-export generate BUNDLE "a red apple"'
        )
    budget = None if memory_budget is None else parse_budget(memory_budget)
    pipeline = TextToImage.load(bundle, backend=backend, threads=threads)
    if bits is not None:
        pipeline.bundle.bits(bits)
    _say_which(pipeline, backend)
    files = _image_paths(out, len(prompt))
    manifest = pipeline.bundle.manifest
    batches = -(-len(prompt) // manifest.shapes.batch_size)
    names = iter(files)

    def save(image: Image, record: dict[str, Any]) -> None:
        record["file"] = _save_image(image, next(names))

    with progress_for_terminal() if sys.stderr.isatty() else Silent() as progress:
        progress.stage("sample", len(manifest.sampler.steps) * batches)
        result = pipeline(
            prompt,
            seed=seed,
            guidance=guidance,
            negative_prompt=negative_prompt,
            bits=bits,
            memory_budget=budget,
            on_step=lambda done, total: progress.item(f"step {done} of {total}"),
            on_image=save,
        )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if explain:
        print_schedules(pipeline.bundle, result.records, stderr=as_json)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    for record in result.records:
        seconds = record["seconds"]
        quality = "" if record["q"] is None else f"q {record['q']:.3f}, "
        print(
            f"{record['file']}  seed {record['seed']}, {quality}{record['fab']:.2f} bits on average, "
            f"{seconds['total']:.2f} s ({1000 * sum(seconds['steps']) / len(seconds['steps']):.0f} ms a step)"
        )
    if "memory" in (last := result.records[-1]):
        used = {name: size / 1e6 for name, size in last["memory"].items()}
        print(
            f"memory of engines: at most {used['peak']:.0f} MB of {used['budget']:.0f}; "
            f"all at once would take {used['all_resident']:.0f}, the least is {used['smallest']:.0f}"
        )


@app.command()
def inspect(
    bundle: BundleArgument,
    memory: Annotated[bool, typer.Option("--memory", help="Account for every byte instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle holds: blocks, variants, layers, precisions, policy, sizes."""
    from qlip_export.bundle import Bundle
    from qlip_export.display import print_bundle, print_memory
    from qlip_export.memory import account

    opened = Bundle.open(bundle)
    if memory:
        rows = account(opened.manifest)
        if as_json:
            print(json.dumps({"memory": [row.model_dump() for row in rows]}))
        else:
            print_memory(rows)
    elif as_json:
        print(opened.manifest.model_dump_json())
    else:
        print_bundle(opened)


@app.command()
def validate(
    bundle: BundleArgument,
    model: Annotated[
        str | None,
        typer.Option(help="Model to compare images with.", show_default="the one the bundle was built from"),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Prompt of the run whose activations are used.")
    ] = "a red apple",
    seed: Annotated[int, typer.Option(help="Seed of that run.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Folder for inputs and reference outputs; prints polygraphy commands that use them."
        ),
    ] = None,
    backend: TargetOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare every engine with the captured graph on real activations, and the image with diffusers."""
    from qlip_export.display import print_validation
    from qlip_export.progress import progress_for_terminal
    from qlip_export.validate import validate as run

    with progress_for_terminal() as progress:
        report = run(
            bundle, prompt=prompt, seed=seed, model=model, progress=progress, save=save, backend=backend
        )
    if as_json:
        print(report.model_dump_json())
    else:
        print_validation(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    bundle: BundleArgument,
    prompts: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text, a prompt a line.", show_default="the model's own, or generic"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Images of each configuration.", show_default="256, or all prompts if fewer"),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Of fid, sfid, clip, fab, bitops, latency.", show_default="all that the device can measure"
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Uniform bits beside the policy.", show_default="all of the bundle"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Configuration that ratios refer to.", show_default="the largest up to 16 bits"),
    ] = None,
    device: Annotated[
        str, typer.Option(help="engines; or cpu or cuda for the fake-quantized model in torch.")
    ] = "engines",
    backend: TargetOption = "auto",
    reference: Annotated[
        str | None,
        typer.Option(
            help="What distances are measured to: a file of statistics, a folder of images, or fp32.",
            show_default="the model's own, or fp32",
        ),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(help="Weights of Inception-v3 for FID.", show_default="the model's vision tower"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model with the vision tower.", show_default="the one the bundle was built from"),
    ] = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed; image i uses SEED + i.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder that keeps images and features; the same command goes on."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the policy and uniform bits on the same prompts and noise, with 95 % intervals."""
    from qlip_export.display import print_evaluation
    from qlip_export.progress import progress_for_terminal, waiting

    with waiting("loading torch"):
        from qlip_export.evaluate import EvaluateOptions
        from qlip_export.evaluate import evaluate as run

    options = _validated(
        EvaluateOptions,
        prompts=prompts,
        samples=samples,
        metrics=tuple(metrics.split(",")) if metrics is not None else None,
        compare=_numbers(compare, "--compare") if compare is not None else None,
        baseline=baseline,
        device=device,
        backend=backend,
        reference=reference,
        inception=inception,
        model=model,
        guidance=guidance,
        seed=seed,
        out=out,
    )
    with progress_for_terminal() as progress:
        report = run(bundle, options, progress)
    if as_json:
        print(report.model_dump_json())
    else:
        print_evaluation(report)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Name of the zoo or a folder in the diffusers layout.")],
    stages: Annotated[str, typer.Option(help="Of ranges, weights, t2q, q2b.")] = "ranges,weights,t2q,q2b",
    bit_options: Annotated[str, typer.Option(help="What the policy chooses among.")] = "8,16,32",
    unit: Annotated[str, typer.Option(help="The policy decides for every block or layer.")] = "block",
    blocks: Annotated[Blocks, typer.Option(help="Where the blocks are cut.")] = Blocks.coarse,
    criterion: Annotated[
        str, typer.Option(help="What is predicted from the text: quality, complexity or length.")
    ] = "quality",
    parts: Annotated[
        str | None, typer.Option(help="Learned parts of Q2B, e.g. q,m.", show_default="all that fit")
    ] = None,
    cost: Annotated[str, typer.Option(help="What a choice costs: bits or latency.")] = "bits",
    lambda_bit: Annotated[
        float | None, typer.Option(help="Weight of the cost.", show_default="0.001")
    ] = None,
    target_fab: Annotated[
        float | None, typer.Option(help="Average bits to aim for, instead of a weight of the cost.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle whose engines are timed for --cost latency.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Real images for the quality score: a folder.", show_default="the drawn images"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text, a prompt a line.", show_default="the model's own, or generic"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Sampling steps of a run.")] = 25,
    height: HeightOption = None,
    width: WidthOption = None,
    scheduler: SchedulerOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of noise and training.")] = 0,
    groups: Annotated[int, typer.Option(help="Timestep groups of the policy.")] = 5,
    forced_steps: Annotated[int, typer.Option(help="First steps that run as for the best prompt.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Images drawn at a time.")] = 32,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Prompts at most, in every stage.", show_default="32, 256, 12000, 1500 of the four stages"
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Training steps of weights and q2b.", show_default="1500 a block, 500 for the policy"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where results go.", show_default="calibration/MODEL")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure activation ranges, learn 4-bit weights, train the policy; each stage is kept when done."""
    from qlip_export.progress import progress_for_terminal, waiting
    from qlip_export.prompts import GENERIC_PROMPTS, read_prompts
    from qlip_export.zoo import find_model

    with waiting("loading torch"):
        from qlip_export.calibrate.options import CalibrateOptions
        from qlip_export.calibrate.stages import Calibration

    options = _validated(
        CalibrateOptions,
        stages=tuple(stages.split(",")),
        bit_options=_numbers(bit_options, "--bit-options"),
        unit=unit,
        granularity=blocks.value,
        criterion=criterion,
        parts=None if parts is None else tuple(parts.split(",")),
        cost=cost,
        lambda_bit=lambda_bit,
        target_fab=target_fab,
        bundle=bundle,
        reference=reference,
        device=device,
        steps=steps,
        height=height,
        width=width,
        scheduler=scheduler,
        guidance=guidance,
        seed=seed,
        groups=groups,
        forced_steps=forced_steps,
        batch_size=batch_size,
        limit=limit,
        iterations=iterations,
    )
    found, checkpoint = find_model(model)
    if out is None and found.calibration is not None:
        raise QlipError(
            f"{model} brings its calibration; a new one does not go over it unasked",
            expected="-o FOLDER",
            fix=f"-o calibration/my-{found.name}, then build --calibration with it",
        )
    own = found.calibration / "prompts.txt" if found.calibration else None
    source = prompts or (own if own and own.is_file() else None)
    texts = read_prompts(source) if source else list(GENERIC_PROMPTS)
    with progress_for_terminal() as progress:
        report = Calibration(checkpoint, texts, options, out or Path("calibration") / found.name).run(
            progress
        )
    if as_json:
        print(report.model_dump_json())
        return
    for stage, file in report.files.items():
        print(f"{stage:8} {file}{' (there already)' if stage in report.reused else ''}")
    for name, value in report.measured.items():
        print(f"{name:8} {value:.6g}")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the bundle and the images.")] = (
        Path("engines")
    ),
) -> None:
    """Build the embedded emoji model, draw a dozen prompts uniformly and adaptively, validate."""
    from qlip_export.display import print_validation
    from qlip_export.progress import progress_for_terminal, waiting

    with waiting("loading torch"):
        from qlip_export.quickstart import quickstart as run
    with progress_for_terminal() as progress:
        report = run(out, progress)
    print_validation(report.validation)
    print(f"bundle:  {report.build.bundle} (built in {report.build.seconds:.0f} s)")
    print(f"images:  {report.sheet}")
    for setting, seconds in report.seconds_per_image.items():
        print(f"         {seconds:.2f} s an image ({setting})")
    print(f'try:     qlip-export generate {report.build.bundle} "a rocket in noto style" --explain')
    if not report.validation.passed:
        raise typer.Exit(1)


app.command()(report)
app.command()(demo)


def main() -> NoReturn:
    """Run the command line; errors that the user can mend are printed without a traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageError as error:
        error.show()
        if "--json" in sys.argv:
            print(json.dumps({"error": QlipError(error.format_message(), fix="see --help").as_dict()}))
        sys.exit(2)
    except ModuleNotFoundError as error:
        # Whoever only runs bundles has installed neither torch nor the ONNX tools.
        package = (error.name or "").split(".")[0]
        extra = next((name for name, packages in _EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        _fail(
            QlipError(
                f"this command needs {package}, which is not installed",
                fix=f'pip install "qlip-export[{extra}]"',
            )
        )
    except QlipError as error:
        _fail(error)


_UsageError: Any = typer.BadParameter.__base__
"""Wrong arguments, as click tells them; newer versions of typer carry a click of their own."""

_EXTRAS = {
    "export": (
        "torch",
        "diffusers",
        "transformers",
        "safetensors",
        "accelerate",
        "onnx",
        "onnx_ir",
        "onnxscript",
    ),
    "evaluate": ("torchmetrics", "sklearn", "scipy", "threadpoolctl"),
    "report": ("plotly", "jinja2"),
    "demo": ("gradio",),
}
"""Packages that a command may lack, by the extra that brings them."""


def _fail(error: QlipError) -> NoReturn:
    if "--json" in sys.argv:
        print(json.dumps({"error": error.as_dict()}))
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _validated(kind: Any, **values: Any) -> Any:
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise QlipError(f"{option}: {first['msg']}", found=str(first.get("input"))) from error


def _numbers(text: str, option: str = "--bits") -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise QlipError(f"{option} is no list of numbers", expected="e.g. 8,16,32", found=text) from error


def _bytes(text: str, option: str) -> int:
    """Return the bytes of e.g. 600MB: kB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = float(found[1]) * units.get(found[2], 0) if found else 0
    if size < 1:
        raise QlipError(f"{option} is no size", expected="e.g. 600MB, 1.5GB", found=text)
    return int(size)


def _say_which(pipeline: TextToImage, wanted: str) -> None:
    """Say whose engines run, where there was a choice and nobody made it."""
    if wanted == "auto" and len(pipeline.bundle.manifest.targets) > 1:
        print(f"engines: {pipeline.target.name} (--backend chooses)", file=sys.stderr)


def _image_paths(out: Path | None, count: int) -> list[Path]:
    """Choose the files before anything is computed, and make sure they can be written."""
    from qlip_export.files import explained_os_errors

    if count == 1 and not (out is not None and out.is_dir()):
        files = [out or Path("image.png")]
        if files[0].suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise QlipError(
                f"{files[0]} is no image file", expected="a name that ends in .png, .jpg or .webp"
            )
    else:
        folder = out or Path("images")
        files = [folder / f"{i:04d}.png" for i in range(count)]
    with explained_os_errors(files[0].parent):
        files[0].parent.mkdir(parents=True, exist_ok=True)
        probe = files[0].parent / f".{files[0].name}.part"
        probe.touch()
        probe.unlink()
    return files


def _save_image(image: Image, file: Path) -> str:
    from qlip_export.files import written_aside

    with written_aside(file) as aside:
        image.save(aside, format={"png": "PNG", "webp": "WEBP"}.get(file.suffix[1:].lower(), "JPEG"))
    return str(file)


app.command()(plan)


if __name__ == "__main__":
    main()
