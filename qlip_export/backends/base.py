"""What a backend is: compiles typed ONNX into engine files, loads them, and owns the tensors between them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import JsonValue

from qlip_export.backends.options import CompileOptions, refused
from qlip_export.compiled import Compiled, EngineEntry, EngineMemory, TargetEntry
from qlip_export.extents import EngineShapes
from qlip_export.manifest import LayerEntry
from qlip_export.progress import Progress
from qlip_export.spec import Asked, Container, DType

Buffer = Any
"""A tensor in the backend's own memory; only the backend that made it looks inside."""


BY_CONTAINER: dict[str, dict[Container, int]] = {
    kind: {container: container.nbytes for container in Container} for kind in ("conv", "linear")
}
"""Bytes of a weight that is stored in the type that its layer computes in."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do here, as data.

    Attributes:
        device: Name of the device the engines run on.
        version: Version of the vendor library.
        half: Dtype that carries 9 to 16 bit activations, chosen by what the device computes fast.
        suffix: File name suffix of its engines.
        containers: Containers for which the device has kernels of their own; the others run, but widened.
        options: What the compiler is told beyond its defaults, JSON.
        overhead: Bytes that an engine may take beside its weights, roughly.
        weight_bytes: Bytes that an engine stores a weight in, by kind of layer and container.
        packs_int4: Whether engines other than INT8 ones keep 4-bit weights at 4 bits.
    """

    device: str
    version: str
    half: DType
    suffix: str
    containers: tuple[Container, ...]
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    overhead: int = 0
    weight_bytes: Mapping[str, Mapping[Container, int]] = field(default_factory=lambda: BY_CONTAINER)
    packs_int4: bool = False

    def engine_bytes(self, layers: Iterable[tuple[LayerEntry, Container]], weight_bits: int) -> int:
        """Return roughly what the engine of a block takes whose layers are carried by these containers."""
        layers = list(layers)
        narrow = self.packs_int4 and weight_bits == 4 and all(c is not Container.INT8 for _, c in layers)
        each = (e.weights * (0.5 if narrow else self.weight_bytes[e.kind][c]) for e, c in layers)
        return self.overhead + int(sum(each))


class Engine(ABC):
    """A loaded engine with its inputs and outputs bound to buffers.

    Attributes:
        frugal: Whether `run` gives back what the engine needs only while it runs.
    """

    frugal: bool = False

    @abstractmethod
    def bind(self, name: str, buffer: Buffer) -> None:
        """Use ``buffer`` for an input or output from now on."""

    @abstractmethod
    def run(self) -> None:
        """Compute the outputs from the inputs, in the bound buffers.

        May return before they are ready: engines of a backend run in the order in which they were started,
        and `Backend.read` and `Backend.synchronize` wait for them.
        """

    def release(self) -> bool:
        """Give back now what earlier runs left for the next one.

        Returns:
            Whether that was possible; otherwise only dropping the engine does.
        """
        return True


class Backend(ABC):
    """One vendor library.

    Attributes:
        name: In ``BACKENDS``.
        reserve: Bytes that a memory budget sets aside for what library and allocator keep while engines come
            and go.
        budgets: Whether its engines take memory of this process, which a memory budget can bound.
    """

    name: str
    reserve: int = 0
    budgets: bool = True

    @abstractmethod
    def __init__(self, *, threads: int | None) -> None:
        """Import the vendor library."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do on this machine."""

    def require_device(self) -> None:
        """Make sure that this machine has a device that engines of this backend run on.

        Raises:
            QlipError: It has none.
        """
        return None

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files of code whose change makes other engines."""
        return (Path(inspect.getfile(type(self))),)

    def prepare(self, options: CompileOptions, progress: Progress) -> None:
        """Take options and a display for the compilations to come.

        Raises:
            QlipError: This backend does not take one of the options.
        """
        for option in options.given:
            raise refused(self.name, option, profile=options.profile)

    def check_target(self, target: TargetEntry, rebuild: str) -> None:
        """Make sure that engines made by ``target``'s version for its device run here.

        Args:
            target: Whose engines are about to be loaded.
            rebuild: The command that makes engines which run here.

        Raises:
            QlipError: They do not; names both sides.
        """
        return None

    @abstractmethod
    def compile(self, onnx: Path, engine: Path, container: Container) -> Compiled:
        """Compile a typed ONNX file and write the engine file.

        Raises:
            QlipError: The library refuses the graph.
        """

    def compile_ranging(
        self, onnx: Path, engine: Path, container: Container, shapes: EngineShapes
    ) -> Compiled:
        """Compile a typed ONNX file into an engine whose shapes vary as ``shapes`` says.

        Raises:
            QlipError: The library refuses the graph, or this backend takes no `--profile`.
        """
        raise refused(self.name, "profile", profile=shapes.profile)

    def measure(self, path: Path, entry: EngineEntry) -> EngineMemory | None:
        """Return what an engine file takes when it is loaded and run here; ``None``: that cannot be told."""
        return None

    @abstractmethod
    def load(self, path: Path, entry: EngineEntry) -> Engine:
        """Load an engine file.

        Raises:
            QlipError: The file was made by another version or for another device.
        """

    @abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Return an uninitialised buffer."""

    @abstractmethod
    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy ``array`` into ``buffer``, converting to the buffer's dtype."""

    @abstractmethod
    def read(self, buffer: Buffer) -> NDArray[Any]:
        """Return a copy of ``buffer`` as a numpy array; BF16 and FP16 come back as float32."""

    @abstractmethod
    def cast(self, source: Buffer, target: Buffer) -> None:
        """Copy between buffers of the same shape and different dtypes."""

    def sequence(
        self, calls: Sequence[Callable[[], None]], inputs: Sequence[Buffer], outputs: Sequence[Buffer]
    ) -> Callable[[], None]:
        """Return one call that makes ``calls``, each a run or a cast of this backend, in their order.

        A backend may record what they start and start it at once: the buffers stay the same, their contents
        change from call to call.

        Args:
            calls: What to make.
            inputs: Buffers that the calls read and nothing but the caller writes.
            outputs: Buffers that the calls are made for.
        """

        def run() -> None:
            for call in calls:
                call()

        return run

    def synchronize(self) -> None:
        """Wait until everything that was started is done."""
        return None

    @property
    def notes(self) -> list[str]:
        """What a user should know of the runs so far, e.g. work that the device did not take."""
        return []


def wrong_precisions(asked: Mapping[str, Asked], found: Mapping[str, str]) -> dict[str, str]:
    """Return the layers whose precision is not what was asked for, each with what it is.

    Args:
        asked: By node.
        found: What an engine computes in, by node.
    """
    return {
        asked[node].layer: found.get(node, "not found")
        for node in asked
        if found.get(node) != asked[node].precision
    }
