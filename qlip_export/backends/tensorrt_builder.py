"""What TensorRT and TensorRT-RTX share: their API as a type, log, progress, what was read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qlip_export.backends.base import wrong_precisions
from qlip_export.compiled import EngineFacts, TensorEntry
from qlip_export.extents import EngineShapes
from qlip_export.progress import Progress
from qlip_export.spec import Asked, DType

if TYPE_CHECKING:
    import tensorrt

TYPES = {"BOOL": "bool", "INT4": "int4", "UINT8": "uint8"}
"""Names of further types that layers may have, but no input or output of a block."""

DTYPES: dict[str, DType] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
}
"""Names of `tensorrt.DataType`."""


class Library(Protocol):
    """What is used of either library, with the types of TensorRT 10; a misspelt call is an error of mypy."""

    Builder: type[tensorrt.Builder]
    BuilderFlag: type[tensorrt.BuilderFlag]
    Dims: type[tensorrt.Dims]
    ExecutionContextAllocationStrategy: type[tensorrt.ExecutionContextAllocationStrategy]
    HardwareCompatibilityLevel: type[tensorrt.HardwareCompatibilityLevel]
    ILogger: type[tensorrt.ILogger]
    IProgressMonitor: type[tensorrt.IProgressMonitor]
    LayerInformationFormat: type[tensorrt.LayerInformationFormat]
    LayerType: type[tensorrt.LayerType]
    MemoryPoolType: type[tensorrt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
    OnnxParser: type[tensorrt.OnnxParser]
    ProfilingVerbosity: type[tensorrt.ProfilingVerbosity]
    Runtime: type[tensorrt.Runtime]
    TensorIOMode: type[tensorrt.TensorIOMode]


T = TypeVar("T")


def maybe(value: T) -> T | None:
    """Return ``value``: the libraries return nothing where they fail, and their types do not say so."""
    return value


class Messages:
    """What a library said; errors and warnings only."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self.errors: list[str] = []
        self.internal: list[str] = []
        self.warnings: list[str] = []

    @property
    def text(self) -> str:
        """Its reason for giving up."""
        return "; ".join(self.errors or self.internal) or "no reason given"


def logger(library: Library, messages: Messages) -> tensorrt.ILogger:
    """Return a logger of ``library`` that writes to ``messages``."""
    severity = library.ILogger

    class Logger(library.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, kind: tensorrt.ILogger.Severity, message: str) -> None:
            if kind == severity.ERROR:
                messages.errors.append(message.strip())
            elif kind == severity.INTERNAL_ERROR:
                messages.internal.append(message.strip())
            elif kind == severity.WARNING:
                messages.warnings.append(message.strip())

    made: tensorrt.ILogger = Logger()
    return made


class Watch:
    """Shows the phases of a build; what is raised meanwhile (Ctrl-C) stops the build and is raised after it.

    An exception must not pass through the library's own code.
    """

    def __init__(self, progress: Progress, engine: str) -> None:
        """Show the phases of ``engine`` on ``progress``."""
        self._progress = progress
        self._engine = engine
        self._steps: dict[str, int] = {}
        self.raised: BaseException | None = None

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """Begin a phase of ``steps`` steps within another."""
        self._steps[phase] = steps
        self._show(phase, 0)

    def stepped(self, phase: str, step: int) -> bool:
        """Show a step; return whether the build may go on."""
        self._show(phase, step + 1)
        return self.raised is None

    def finished(self, phase: str) -> None:
        """End a phase."""
        self._steps.pop(phase, None)

    def _show(self, phase: str, step: int) -> None:
        try:
            self._progress.detail(f"{self._engine}: {phase.lower()} {step}/{self._steps.get(phase, 0)}")
        except BaseException as error:
            self.raised = error


def monitor(library: Library, watch: Watch) -> tensorrt.IProgressMonitor:
    """Return a progress monitor of ``library`` that tells ``watch``."""

    class Monitor(library.IProgressMonitor):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.started(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            watch.finished(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.stepped(phase_name, step)

    made: tensorrt.IProgressMonitor = Monitor()
    return made


@contextmanager
def raising(watch: Watch) -> Iterator[None]:
    """Raise what ``watch`` kept, once the library has returned."""
    yield
    if watch.raised is not None:
        raise watch.raised


def port(tensor: tensorrt.ITensor, shapes: EngineShapes | None = None) -> TensorEntry:
    """Return an input or output of a network, whose shape varies as ``shapes`` says."""
    entry = TensorEntry(name=tensor.name, shape=tensor.shape[:], dtype=DTYPES[tensor.dtype.name])
    if shapes is None or not shapes.varies(tensor.name):
        return entry
    extents = shapes.ports[tensor.name]
    own = tuple(extent.at(shapes.own) for extent in extents)
    return entry.model_copy(update={"shape": own, "extents": tuple(map(str, extents))})


def add_profile(
    library: Library,
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    shapes: EngineShapes,
) -> None:
    """Give the builder least, best and largest shape of every input that varies, as one profile."""
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    if not any(map(shapes.varies, inputs)):
        return
    profile = builder.create_optimization_profile()
    for name in filter(shapes.varies, inputs):
        low, best, high = (library.Dims([*shapes.at(which, name)]) for which in ("min", "opt", "max"))
        profile.set_shape(name, low, best, high)
    config.add_optimization_profile(profile)


def parsed_facts(
    library: Library, network: tensorrt.INetworkDefinition, asked: Mapping[str, Asked]
) -> EngineFacts:
    """Return what was read of a graph, constants aside; the builder must keep the types."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    producer = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    kinds = (library.LayerType.CONVOLUTION, library.LayerType.MATRIX_MULTIPLY)
    found = {}
    for layer in layers:
        if layer.type in kinds:
            source = layer.get_input(0)
            pair = producer.get(source.name)
            if pair is not None and pair.type == library.LayerType.DEQUANTIZE:
                source = pair.get_input(0)
            found[layer.name] = str(DTYPES[source.dtype.name])
    types = Counter(
        {**TYPES, **DTYPES}[layer.get_output(0).dtype.name]
        for layer in layers
        if layer.type != library.LayerType.CONSTANT
    )
    return EngineFacts(
        source="parsed network",
        layers=types.total(),
        precisions=dict(sorted(types.items())),
        wrong=wrong_precisions(asked, found),
    )


def engine_facts(information: str, asked: Mapping[str, Asked], parsed: EngineFacts) -> EngineFacts:
    """Return what the engine inspector tells of the layers after fusion.

    A fused layer that stands for several layers of the graph is counted, but says nothing of one of them.

    Args:
        information: Its JSON, of an engine built with detailed profiling verbosity.
        asked: What the graph asks for, by node.
        parsed: What was read of the graph.
    """
    layers: list[dict[str, Any]] = [
        layer for layer in json.loads(information)["Layers"] if isinstance(layer, dict)
    ]
    wrong = dict(parsed.wrong)
    types: Counter[str] = Counter()
    for layer in layers:
        inputs = [_type_of(tensor) for tensor in layer.get("Inputs", [])]
        precision = "int8" if "int8" in inputs else next(iter(inputs), "none")
        types[precision] += 1
        metadata = str(layer.get("Metadata", ""))
        nodes = [node for node in asked if f"[ONNX Layer: {node}]" in metadata]
        if len(nodes) == 1 and asked[nodes[0]].precision != precision:
            wrong[asked[nodes[0]].layer] = precision
    return parsed.model_copy(
        update={
            "source": "engine",
            "layers": len(layers),
            "precisions": dict(sorted(types.items())),
            "wrong": wrong,
        }
    )


def _type_of(tensor: Mapping[str, Any]) -> str:
    told = str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))).lower()
    names = {"int8": "int8", "half": "float16", "fp16": "float16", "float": "float32", "fp32": "float32"}
    return next((name for word, name in names.items() if word in told), told.split(" ")[0] or "none")
