"""What a profile means for every engine of a bundle: how its shapes follow from batch, height and width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pydantic import JsonValue

from qlip_export.conditioning import Constant, TextOutput
from qlip_export.errors import QlipError
from qlip_export.extents import Axis, EngineShapes, Extent, Extents, Profile, spelt
from qlip_export.manifest import ComponentEntry, Manifest

ROWS = {*get_args(TextOutput), "quality"}
"""Outputs of text encoders and policy that the run time reads row by row."""

MOST_ELEMENTS = 2**31 - 1
"""Of an input or output."""


@dataclass(frozen=True)
class ProfilePlan:
    """A profile that fits a bundle.

    Attributes:
        profile: The ranges, with what a size has to be a multiple of.
        engines: Shapes of each engine, by its ONNX file.
    """

    profile: Profile
    engines: dict[str, EngineShapes]


def plan_profile(manifest: Manifest, asked: Profile, source: Callable[[str], Path]) -> ProfilePlan:
    """Follow the shapes through every graph of the bundle's first size.

    Args:
        manifest: Of the bundle.
        asked: Which axes vary, and between what.
        source: Returns the file behind an ONNX path of the manifest.

    Raises:
        QlipError: A range without the bundle's own size or beside the multiples that the model takes, one
            whose end no engine can index, or a graph that a constant ties to one size.
    """
    first = manifest.sizes[0]
    own = {axis: n for axis, n in first.shapes.sizes.items() if axis in asked}
    for axis, held in asked.items():
        if not held.min <= own[axis] <= held.max:
            raise QlipError(
                f"--profile {axis}:{held} leaves out the bundle's own size",
                expected=f"a range with {own[axis]}",
                found=f"{held.min} to {held.max}",
                fix=f"--profile {axis}:{held.with_size(own[axis])}, or export the model at such a {axis}",
            )
    if own.keys() & {"height", "width"}:
        _check_constants(first, asked)
    shapes = _Shapes(first, asked, source)
    shapes.follow()
    profile = {axis: held.model_copy(update={"step": shapes.steps[axis]}) for axis, held in asked.items()}
    for axis, held in profile.items():
        if odd := [n for n in (held.min, held.opt, held.max) if n % held.step]:
            raise QlipError(
                f"--profile {axis}:{held} does not fit the model",
                expected=f"multiples of {held.step}",
                found=", ".join(map(str, odd)),
                fix=f"e.g. --profile {axis}:{held.in_steps}",
            )
    engines = {onnx: EngineShapes(ports, profile, own) for onnx, ports in shapes.engines.items()}
    for onnx, ranging in engines.items():
        _check_elements(onnx, ranging)
    return ProfilePlan(profile, engines)


class _Shapes:
    """The shapes of all engines, graph by graph in the order in which they run."""

    def __init__(self, manifest: Manifest, asked: Profile, source: Callable[[str], Path]) -> None:
        own = {axis: n for axis, n in manifest.shapes.sizes.items() if axis in asked}
        self._manifest = manifest
        self._asked = asked
        self._own = own
        self._source = source
        self.engines: dict[str, dict[str, Extents]] = {}
        self.steps: dict[Axis, int] = dict.fromkeys(own, 1)

    def follow(self) -> None:
        manifest = self._manifest
        values = manifest.input_extents(self._own)
        image, latents = values.pop("image"), values["latents"]
        rows, batch = latents[0], image[0]
        self._require_whole([*latents, *image])
        for block in manifest.blocks:
            given = dict(values)
            for variant in block.variants.values():
                made = self._graph(variant.onnx, given)
                self._expect(
                    made, {name: values[name] for name in made.keys() & values.keys() - given.keys()}
                )
                values |= made
        self._expect(values, {"noise": latents})
        for encoder in manifest.text_encoders:
            self._component(encoder, rows, {})
        decoded = self._component(manifest.vae_decoder, batch, {"latents": (batch, *latents[1:])})
        self._expect(decoded, {"image": image})
        if manifest.policy is not None:
            self._component(manifest.policy, batch, {})

    def _component(
        self, part: ComponentEntry, batch: Extent, values: dict[str, Extents]
    ) -> dict[str, Extents]:
        """Return all values of a part; what the run time reads of it has a row for each of the batch."""
        for onnx in part.graphs:
            values = {**values, **self._graph(onnx, values, batch)}
        read = ROWS & values.keys()
        self._expect(values, {name: (batch, *values[name][1:]) for name in read})
        return values

    def _graph(
        self, onnx: str, values: Mapping[str, Extents], batch: Extent | None = None
    ) -> dict[str, Extents]:
        """Return the outputs of a graph; inputs that ``values`` lacks are static but for their batch."""
        from qlip_export.graph.dynamic import make_dynamic
        from qlip_export.graph.store import load

        model = load(self._source(onnx))
        inputs = {}
        for value in model.graph.inputs:
            static = tuple(Extent.of(int(n)) for n in value.shape or ())  # type: ignore[arg-type]
            new = static if batch is None else (batch, *static[1:])
            inputs[str(value.name)] = values.get(str(value.name), new)
        made = make_dynamic(model, inputs, self._own, name=f"{spelt(self._asked)}: {Path(onnx).name}")
        self.engines[onnx] = inputs | made.outputs
        self.steps |= {axis: math.lcm(self.steps[axis], step) for axis, step in made.steps.items()}
        return made.outputs

    def _require_whole(self, extents: list[Extent]) -> None:
        for extent in extents:
            self.steps |= {axis: math.lcm(self.steps[axis], step) for axis, step in extent.steps.items()}

    def _expect(self, made: Mapping[str, Extents], wanted: Mapping[str, Extents]) -> None:
        """Make sure that the outputs which the run time reads came out in the shapes that it expects."""
        for name, shape in wanted.items():
            if made[name] != shape:
                raise QlipError(
                    f"{spelt(self._asked)}: the graphs of this bundle do not follow: {name}",
                    expected=f"({', '.join(map(str, shape))})",
                    found=f"({', '.join(map(str, made[name]))})",
                    fix="several static sizes in one bundle: build --size",
                )


def _check_elements(onnx: str, shapes: EngineShapes) -> None:
    """Refuse inputs and outputs that are beyond what engines index."""
    for port in shapes.ports:
        if (count := math.prod(largest := shapes.at("max", port))) > MOST_ELEMENTS:
            raise QlipError(
                f"{spelt(shapes.profile)}: MAX is too large",
                expected=f"inputs and outputs of at most {MOST_ELEMENTS:,} numbers, which 32 bits index",
                found=f"{port} of {Path(onnx).name}: {' x '.join(map(str, largest))}, {count:,} numbers",
                fix="lower MAX of batch, height or width",
            )


def _check_constants(manifest: Manifest, asked: Profile) -> None:
    """Refuse conditioning that holds the size of the image as numbers, as older exports wrote it."""
    for name, recipe in manifest.conditioning.items():
        if isinstance(recipe, Constant) and set(recipe.row) & {float(n) for n in manifest.shapes.image}:
            raise QlipError(
                f"{spelt(asked)}: {name} of this bundle holds the size of its images as numbers",
                expected="'height' and 'width' in their place, as exports write now",
                found=str(recipe.row),
                fix="export the bundle again with this version of qlip-export",
            )


def key_of(shapes: EngineShapes) -> JsonValue:
    """Return what makes another engine of the same graph: how its ports vary, and between which shapes."""
    ends: JsonValue = {
        name: [list(shapes.at(which, name)) for which in ("min", "opt", "max")]
        for name in shapes.ports
        if shapes.varies(name)
    }
    return {"ports": {name: [str(e) for e in port] for name, port in shapes.ports.items()}, "ends": ends}
