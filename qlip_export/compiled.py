"""What a manifest says of engines: ports, what their compiler tells of them, the targets they make up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue

from qlip_export.extents import AXES, Axis, Extent, Profile
from qlip_export.spec import BYTES, BundlePath, Container, DType, Frozen


class TensorEntry(Frozen):
    """Name, shape and dtype of one engine input or output."""

    name: str
    shape: tuple[int, ...] = Field(description="in the bundle's own size, where it varies")
    dtype: DType
    extents: tuple[str, ...] | None = Field(
        default=None, description="how it follows from images per batch, height and width; none: static"
    )

    def at(self, sizes: Mapping[Axis, int]) -> TensorEntry:
        """Return it as it is in a batch of this size."""
        if self.extents is None:
            return self
        return self.model_copy(update={"shape": tuple(Extent.parse(e).at(sizes) for e in self.extents)})

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


class EngineFacts(Frozen):
    """What a compiler tells of its engine."""

    source: Literal["engine", "parsed network"] = Field(
        description="inspected after fusion, or what was read of the graph before it"
    )
    layers: int = Field(description="of the engine or network")
    precisions: dict[str, int] = Field(description="number of layers by the type they compute in")
    wrong: dict[str, str] = Field(
        description="Conv2d and Linear layers that compute in another precision than the graph asks for"
    )
    int4_weights_widened: int = Field(default=0, description="weights that are INT4 in the graph, INT8 here")
    elsewhere: tuple[str, ...] | None = Field(
        default=None, description="nodes that the device leaves to the CPU; none: compiled without the device"
    )


class EngineMemory(Frozen):
    """What a loaded engine takes of the device's memory, in bytes, beside its bound inputs and outputs."""

    resident: int = Field(ge=0, description="as long as it is loaded")
    scratch: int = Field(ge=0, description="while it runs, and afterwards unless it gives it back")
    loading: int = Field(ge=0, description="beyond `resident`, while it is being loaded")
    seconds: float = Field(default=0.0, ge=0, description="of processor time to load it; 0: not measured")


class Compiled(Frozen):
    """What is known of an engine file: its ports, and what its compiler tells of it."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    widened: bool = Field(default=False, description="computes in FP32 where the graph has FP16")
    facts: EngineFacts | None = Field(default=None, description="none: the compiler does not tell")
    memory: EngineMemory | None = Field(
        default=None, description="measured where it was compiled; none: it could not be run there"
    )


class EngineEntry(Compiled):
    """A compiled engine in a bundle."""

    path: BundlePath
    container: Container


class TimingEntry(Frozen):
    """What the engines of a target took, all measured in turns in one run on the target's device."""

    milliseconds: dict[BundlePath, float] = Field(description="median of a call, by ONNX file of a block")
    repeats: int = Field(description="of each engine, in the size with the fewest")
    instead: dict[str, dict[str, str]] = Field(
        description="by block: variants that are dominated, and what runs where a policy chooses them"
    )
    other_sizes: dict[str, dict[str, dict[str, str]]] = Field(
        default_factory=dict, description="the same in the bundle's further sizes, by their label"
    )


class TargetEntry(Frozen):
    """The engines of one backend, and the device they run on."""

    backend: str
    version: str = Field(description="of the backend's library")
    device: str
    half: DType = Field(description="what carries 9 to 16 bit activations")
    options: dict[str, JsonValue] = Field(description="what the compiler was told beyond its defaults")
    engines: dict[BundlePath, EngineEntry] = Field(description="by the ONNX file they were compiled from")
    timing: TimingEntry | None = Field(default=None, description="none: not timed")
    profile: Profile = Field(
        default_factory=dict,
        description="axes in which its engines, of the first size's graphs, run any size of a range",
    )

    def holds(self, sizes: Mapping[Axis, int], own: Mapping[Axis, int]) -> bool:
        """Return whether engines with a profile, made from graphs of size ``own``, run ``sizes``."""
        return all(
            sizes[axis] in self.profile[axis] if axis in self.profile else sizes[axis] == own[axis]
            for axis in AXES
        )

    def resized(self, sizes: Mapping[Axis, int], names: Mapping[str, str]) -> TargetEntry:
        """Return engines with a profile as those of one size, whose ONNX files are called by ``names``."""

        def fit(entry: EngineEntry) -> EngineEntry:
            ports = {side: tuple(t.at(sizes) for t in getattr(entry, side)) for side in ("inputs", "outputs")}
            return entry.model_copy(update=ports)

        engines = {names[onnx]: fit(entry) for onnx, entry in self.engines.items() if onnx in names}
        return self.model_copy(update={"engines": engines})

    def at(self, label: str) -> TargetEntry:
        """Return the target as that of a bundle of one of its further sizes."""
        if self.timing is None:
            return self
        instead = self.timing.other_sizes.get(label, {})
        timing = self.timing.model_copy(update={"instead": instead, "other_sizes": {}})
        return self.model_copy(update={"timing": timing})
