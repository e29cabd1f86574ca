"""The command line. Heavy imports live inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qlip_export.commands.build import build, compile_, export
from qlip_export.commands.calibrate import calibrate
from qlip_export.commands.demo import demo
from qlip_export.commands.evaluate import evaluate
from qlip_export.commands.generate import generate
from qlip_export.commands.options import BundleArgument, JsonOption, TargetOption
from qlip_export.commands.plan import plan
from qlip_export.commands.report import report
from qlip_export.errors import QlipError

app = typer.Typer(
    name="qlip-export",
    help="Compile text-to-image diffusion models into block engines at several precisions.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
    from qlip_export.progress import progress_for_terminal, waiting

    with waiting("loading"):
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
    print(f"bundle:  {out / 'emoji'} (built in {report.build.seconds:.0f} s)")
    print(f"images:  {report.sheet}")
    for setting, seconds in report.seconds_per_image.items():
        print(f"         {seconds:.2f} s an image ({setting})")
    print(f'try:     qlip-export generate {out / "emoji"} "a rocket in noto style" --explain')
    if not report.validation.passed:
        raise typer.Exit(1)


# In the order in which `--help` lists them.
app.command()(build)
app.command()(export)
app.command("compile")(compile_)
app.command()(generate)
app.command()(inspect)
app.command()(validate)
app.command()(evaluate)
app.command()(calibrate)
app.command()(quickstart)
app.command()(report)
app.command()(demo)
app.command()(plan)


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


if __name__ == "__main__":
    main()
