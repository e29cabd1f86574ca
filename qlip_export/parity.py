"""Cases for polygraphy: a block's real inputs, what the reference made of them, and how to compare.

Whoever has the hardware can hold any runner that polygraphy knows (ONNX Runtime, TensorRT) against the
outputs saved here, without this package.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qlip_export.errors import QlipError
from qlip_export.files import explained_os_errors
from qlip_export.spec import Frozen

Arrays = Mapping[str, NDArray[Any]]

REFERENCE = "reference"
"""Name of the runner in saved outputs; the line that the next runner is compared with."""


class OutputRow(Frozen):
    """One output of an engine against the reference; the worst of the compared steps counts in each field."""

    name: str
    max: float = Field(description="largest absolute error")
    mean: float = Field(description="mean absolute error")
    median: float = Field(description="median absolute error")
    error: float = Field(description="relative L2 error")
    cosine: float


def save_case(
    folder: Path, name: str, onnx: Path, inputs: Sequence[Arrays], outputs: Sequence[Arrays], tolerance: float
) -> str:
    """Write ``NAME.inputs.json`` and ``NAME.outputs.json``; return the command that runs ``onnx`` on them.

    The command holds the mean absolute error of every output against ``tolerance`` times that output's root
    mean square, which follows from a relative L2 error of at most ``tolerance``.

    Args:
        folder: Made if it is not there.
        name: Of the case.
        onnx: The graph to run.
        inputs: Feeds, in the dtypes of the graph's inputs.
        outputs: What the reference made of each, in the dtypes of the graph's outputs.
        tolerance: Largest relative L2 error.

    Raises:
        QlipError: polygraphy is not installed, or the folder cannot be written.
    """
    try:
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise QlipError("saving cases needs polygraphy", fix='pip install "qlip-export[validate]"') from error

    with explained_os_errors(folder), G_LOGGER.verbosity(G_LOGGER.ERROR):
        folder.mkdir(parents=True, exist_ok=True)
        save_json([dict(arrays) for arrays in inputs], str(folder / f"{name}.inputs.json"))
        run_results(REFERENCE, outputs).save(str(folder / f"{name}.outputs.json"))
    sizes = {
        name: float(np.sqrt(np.mean([np.square(o[name], dtype=np.float64) for o in outputs])))
        for name in outputs[0]
    }
    command = ["polygraphy", "run", str(onnx), "--onnxrt"]
    command += ["--load-inputs", str(folder / f"{name}.inputs.json")]
    command += ["--load-outputs", str(folder / f"{name}.outputs.json")]
    command += ["--atol", *(f"{output}:{tolerance * size:.3g}" for output, size in sizes.items())]
    command += ["--rtol", f"{tolerance:g}", "--check-error-stat", "mean"]
    return shlex.join(command)


def run_results(runner: str, cases: Sequence[Arrays]) -> Any:
    """Return what a runner made of several cases, as polygraphy's ``RunResults``."""
    from polygraphy.comparator import IterationResult, RunResults

    return RunResults([(runner, [IterationResult(dict(outputs), runner_name=runner) for outputs in cases])])


def for_engine(command: str, engine: Path, *, rtx: bool) -> str:
    """Return a command of `save_case` for an engine of TensorRT or TensorRT-RTX instead of the graph."""
    words = shlex.split(command)
    words[2] = str(engine)
    at = words.index("--onnxrt")
    words[at : at + 1] = ["--trt", "--model-type", "engine"]
    return ("POLYGRAPHY_USE_TENSORRT_RTX=1 " if rtx else "") + shlex.join(words)
