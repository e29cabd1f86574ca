"""`qlip-export evaluate`: the policy against uniform bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip_export.commands.options import (
    BundleArgument,
    GuidanceOption,
    JsonOption,
    PromptsOption,
    TargetOption,
    ThisBatchOption,
    ThisHeightOption,
    ThisWidthOption,
    numbers,
    validated,
)


def evaluate(
    bundle: BundleArgument,
    prompts: PromptsOption = None,
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
    height: ThisHeightOption = None,
    width: ThisWidthOption = None,
    batch_size: ThisBatchOption = None,
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

    options = validated(
        EvaluateOptions,
        prompts=prompts,
        samples=samples,
        metrics=tuple(metrics.split(",")) if metrics is not None else None,
        compare=numbers(compare, "--compare") if compare is not None else None,
        baseline=baseline,
        device=device,
        backend=backend,
        height=height,
        width=width,
        batch_size=batch_size,
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
