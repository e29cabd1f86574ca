"""Runners for polygraphy, and what its comparator finds between them.

The reference is an ONNX file of the bundle in polygraphy's own runner of ONNX Runtime. Engines run as the run
time runs them, through their backend, so that what is judged is what generates images; engines of TensorRT
too. Polygraphy's runner of TensorRT runs the same files by the commands of `qlip_export.parity`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from qlip_export.backends.base import Backend
from qlip_export.compiled import EngineEntry
from qlip_export.errors import QlipError
from qlip_export.parity import REFERENCE, Arrays, OutputRow, run_results


class Graph:
    """An ONNX file in ONNX Runtime, as written: no fusion may change what is computed."""

    def __init__(self, onnx: Path) -> None:
        """Load the file."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        kinds = {"tensor(float16)": np.float16, "tensor(int64)": np.int64}
        self._inputs = {i.name: kinds.get(i.type, np.float32) for i in self._session.get_inputs()}
        self._outputs = {o.name: kinds.get(o.type, np.float32) for o in self._session.get_outputs()}

    def feeds(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return the graph's inputs among ``arrays``, in its dtypes."""
        return {name: arrays[name].astype(dtype) for name, dtype in self._inputs.items()}

    def as_outputs(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return the graph's outputs among ``arrays``, in its dtypes."""
        return {name: arrays[name].astype(dtype) for name, dtype in self._outputs.items()}

    def __call__(self, cases: Sequence[Arrays]) -> list[dict[str, NDArray[np.float32]]]:
        """Run the graph on each of ``cases``; what comes out is float32."""
        feeds = [self.feeds(arrays) for arrays in cases]
        return _run(OnnxrtRunner(self._session, name=REFERENCE), feeds)


class EngineRunner(BaseRunner):  # type: ignore[misc]  # polygraphy has no types
    """An engine of a bundle, on its backend. It takes what its backend writes, and returns float32."""

    def __init__(self, backend: Backend, path: Path, entry: EngineEntry) -> None:
        """Nothing is loaded before the runner is activated."""
        super().__init__(name=backend.name)
        self._backend = backend
        self._path = path
        self._entry = entry

    def get_input_metadata_impl(self) -> Any:
        """See polygraphy's `BaseRunner`."""
        metadata = TensorMetadata()
        for port in self._entry.inputs:
            metadata.add(port.name, np.int64 if port.dtype == "int64" else np.float32, port.shape)
        return metadata

    def activate_impl(self) -> None:
        """Load the engine and bind its buffers."""
        backend, entry = self._backend, self._entry
        self._engine = backend.load(self._path, entry)
        self._buffers = {p.name: backend.allocate(p.shape, p.dtype) for p in (*entry.inputs, *entry.outputs)}
        for name, buffer in self._buffers.items():
            self._engine.bind(name, buffer)

    def infer_impl(self, feed_dict: Arrays) -> dict[str, NDArray[Any]]:
        """Run the engine once."""
        for port in self._entry.inputs:
            self._backend.write(self._buffers[port.name], feed_dict[port.name])
        started = time.perf_counter()
        self._engine.run()
        outputs = {p.name: self._backend.read(self._buffers[p.name]) for p in self._entry.outputs}
        self.inference_time = time.perf_counter() - started
        return outputs

    def deactivate_impl(self) -> None:
        """Drop the engine."""
        del self._engine, self._buffers

    def __call__(self, cases: Sequence[Arrays]) -> list[dict[str, NDArray[np.float32]]]:
        """Run the engine on its inputs among each of ``cases``."""
        return _run(self, [{port.name: arrays[port.name] for port in self._entry.inputs} for arrays in cases])


def compare(found: Sequence[Arrays], expected: Sequence[Arrays]) -> list[OutputRow] | None:
    """Compare what a runner made of several cases with what the reference made of them.

    Args:
        found: Outputs of each case, float32.
        expected: The same of the reference.

    Returns:
        A row for each output; ``None`` where something in ``found`` is not finite.

    Raises:
        QlipError: What was found is finite, and the reference is not.
    """
    engine, reference = run_results("engine", found), run_results(REFERENCE, expected)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        if not Comparator.validate(engine, check_inf=True, check_nan=True):
            return None
        if not Comparator.validate(reference, check_inf=True, check_nan=True):
            raise QlipError(
                "the reference is not finite where the engine is",
                expected=f"finite values in {', '.join(expected[0])}",
                fix="export the model again; its ranges or weights may be damaged",
            )
        results = RunResults([*reference, *engine])
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=[SimpleCompareFunc()])
    ((_, judged),) = accuracy.items()
    return [
        OutputRow(
            name=name,
            max=max(case[name].max_absdiff for case in judged),
            mean=max(case[name].mean_absdiff for case in judged),
            median=max(case[name].median_absdiff for case in judged),
            error=max(relative(a[name], b[name]) for a, b in zip(found, expected, strict=True)),
            cosine=min(_cosine(a[name], b[name]) for a, b in zip(found, expected, strict=True)),
        )
        for name in found[0]
    ]


def relative(value: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Return the L2 norm of the difference over that of the reference."""
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(value - reference)) / (norm or 1.0)


def _run(runner: Any, feeds: list[dict[str, NDArray[Any]]]) -> list[dict[str, NDArray[np.float32]]]:
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        ((_, iterations),) = Comparator.run([runner], data_loader=feeds)
    return [
        {name: np.asarray(array, dtype=np.float32) for name, array in outputs.items()}
        for outputs in iterations
    ]


def _cosine(value: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    norms = float(np.linalg.norm(value)) * float(np.linalg.norm(reference))
    return float((value * reference).sum()) / norms if norms else float(np.array_equal(value, reference))
