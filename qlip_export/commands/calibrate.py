"""`qlip-export calibrate`: what a policy is trained from, and the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip_export.commands.options import (
    Blocks,
    GuidanceOption,
    HeightOption,
    JsonOption,
    PromptsOption,
    SchedulerOption,
    WidthOption,
    numbers,
    validated,
)
from qlip_export.errors import QlipError


def calibrate(
    model: Annotated[str, typer.Option(help="Name of the zoo, a diffusers folder, or a Hub id.")],
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Calibrate weights of the right shapes, drawn from --seed: tells speed and memory, no more.",
        ),
    ] = False,
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
    prompts: PromptsOption = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Sampling steps of a run.")] = 25,
    height: HeightOption = None,
    width: WidthOption = None,
    scheduler: SchedulerOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of noise, training and random weights.")] = 0,
    groups: Annotated[int, typer.Option(help="Timestep groups of the policy.")] = 5,
    forced_steps: Annotated[int, typer.Option(help="First steps that run as for the best prompt.")] = 2,
    batch_size: Annotated[
        int, typer.Option(help="Images at a time, drawn or trained on: what memory holds.")
    ] = 32,
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
        Path | None,
        typer.Option("-o", "--out", help="Where results go.", show_default="calibration/MODEL[-random]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure activation ranges, learn 4-bit weights, train the policy; each stage is kept when done."""
    from qlip_export.progress import progress_for_terminal, waiting
    from qlip_export.prompts import CALIBRATION, GENERIC_PROMPTS, own_prompts, read_prompts
    from qlip_export.zoo import find_model

    with waiting("loading torch"):
        from qlip_export.calibrate.options import CalibrateOptions
        from qlip_export.calibrate.stages import Calibration

    options = validated(
        CalibrateOptions,
        stages=tuple(stages.split(",")),
        bit_options=numbers(bit_options, "--bit-options"),
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
    found, checkpoint = find_model(model, random_weights=seed if random_weights else None)
    if out is None and random_weights:
        out = Path("calibration") / f"{found.name}-random"
    if out is None and found.calibration is not None:
        raise QlipError(
            f"{model} brings its calibration; a new one does not go over it unasked",
            expected="-o FOLDER",
            fix=f"-o calibration/my-{found.name}, then build --calibration with it",
        )
    source = prompts or own_prompts(found.calibration, CALIBRATION)
    texts = read_prompts(source) if source else list(GENERIC_PROMPTS)
    with progress_for_terminal() as progress:
        report = Calibration(checkpoint, texts, options, out or Path("calibration") / found.name).run(
            progress
        )
    if as_json:
        print(report.model_dump_json())
        return
    if report.random_weights is not None:
        print(f"random weights of seed {report.random_weights}: for speed and memory, not for use")
    for stage, file in report.files.items():
        memory = f", {report.gpu_bytes[stage] / 1e9:.2f} GB of the GPU" if stage in report.gpu_bytes else ""
        took = "there already" if stage in report.reused else f"{report.seconds[stage]:.1f} s{memory}"
        print(f"{stage:8} {file} ({took})")
    for name, value in report.measured.items():
        print(f"{name:8} {value:.6g}")
