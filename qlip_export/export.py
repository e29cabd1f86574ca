"""From a checkpoint to typed ONNX: every block at every bit option, one shared weight file, no engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from qlip_export.bundle import best_fast_option
from qlip_export.capture import (
    OPSET,
    Shapes,
    capture_denoiser,
    capture_vae_decoder,
    denoiser_family,
)
from qlip_export.checkpoint import Checkpoint, Component
from qlip_export.compiled import TensorEntry
from qlip_export.errors import QlipError
from qlip_export.files import content_key, sha256_of
from qlip_export.graph.layers import find_layers, static_shape
from qlip_export.graph.split import Block, split
from qlip_export.graph.store import save
from qlip_export.graph.variant import type_variant
from qlip_export.graph.weights import WeightIndex, bind_weights, write_weights
from qlip_export.manifest import (
    BlockEntry,
    ComponentEntry,
    Exported,
    LayerEntry,
    TextEncoderEntry,
    TokenizerEntry,
    VariantEntry,
)
from qlip_export.pipelines import TextEncoder, pipeline_of
from qlip_export.progress import Progress
from qlip_export.quant.ranges import Ranges
from qlip_export.quant.weights import WeightQuantizer, round_to_nearest
from qlip_export.spec import (
    REFERENCE_BITS,
    Container,
    Granularity,
    WeightBits,
    container_of,
    mixed_name,
    variant_name,
)
from qlip_export.text_encoders import capture_text_encoder, capture_tokenizer, part_of, parts_of
from qlip_export.variants.choose import Choice
from qlip_export.variants.fuse import fused_name
from qlip_export.workspace import Workspace

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class WeightMethod:
    """A weight quantizer, its name for the manifest, and what changes with what it was learned from."""

    name: str
    quantize: WeightQuantizer
    key: str = ""


NEAREST = WeightMethod("round to nearest", round_to_nearest)


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        bits: Activation bit options, increasing.
        weight_bits: 4 or 8 on a grid, 32 as they are.
        granularity: Where to cut.
        weights: How the denoiser's weights are rounded.
        choose: Chooses the variants of blocks and which blocks to fuse, from their layers and the names of
            those that stay apart; without it every block is exported at every bit option.
        uniform: Export every (fused) block at every bit option whatever was chosen.
    """

    bits: tuple[int, ...]
    weight_bits: WeightBits
    granularity: Granularity
    weights: WeightMethod
    choose: Callable[[Mapping[str, Sequence[LayerEntry]], Sequence[str]], Choice] | None = None
    uniform: bool = True


class Exporter:
    """Exports one checkpoint into a workspace, product by product.

    Attributes:
        choice: Which variants of which blocks were exported, where the options choose.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sizes: Sequence[Shapes],
        options: ExportOptions,
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        """Nothing happens before the methods are called. ``sizes`` are all of the bundle."""
        self._checkpoint = checkpoint
        self._sizes = sizes
        self._options = options
        self._workspace = workspace
        self._progress = progress
        self._written: dict[str, _Weights] = {}
        self.family = denoiser_family(checkpoint)
        self.choice: Choice | None = None
        self.pipeline = pipeline_of(self.family.name)

    @cached_property
    def _code(self) -> str:
        """Changes with the code that makes the graphs, so that an upgrade never reuses its predecessor's."""
        package = Path(__file__).parent
        sources = [package / "capture.py", package / "export.py", *sorted((package / "graph").glob("*.py"))]
        sources += [package / "spec.py", package / "checkpoint.py"]
        sources += [package / "pipelines.py", package / "text_encoders.py"]
        sources += [*sorted((package / "quant").glob("*.py")), *sorted((package / "families").glob("*.py"))]
        return content_key([sha256_of(p) for p in sources])

    def run(self, ranges: Ranges | None) -> tuple[Exported, ...]:
        """Capture, quantize and write everything; return what was exported for each size.

        Args:
            ranges: Activation ranges; needed where a bit option is carried by INT8.

        Raises:
            QlipError: The architecture is unknown, weights are missing or not finite, a range is missing.
        """
        return tuple(self._run(shapes, ranges) for shapes in self._sizes)

    def _run(self, shapes: Shapes, ranges: Ranges | None) -> Exported:
        """Export one size. Those after the first refer to the weights that the first wrote."""
        self._progress.stage("capture", 2 + len(self.pipeline.text_encoders))
        tag = self.tag(shapes)
        denoiser = self._capture(
            "denoiser",
            tag,
            shapes,
            self._checkpoint.component(self.family.denoiser_folder),
            capture_denoiser,
        )
        texts = {e: self._capture_text_encoder(e, shapes) for e in self.pipeline.text_encoders}
        part = self._checkpoint.component("vae")
        vae = self._capture("vae_decoder", tag, shapes, part, capture_vae_decoder)
        weights = self._weights("denoiser", denoiser, self.family.input_names, self._options.weight_bits)
        blocks = self._blocks(denoiser, weights, ranges)
        return Exported(
            inputs=tuple(
                _tensor_entry(v) for v in denoiser.model.graph.inputs if v.name in self.family.input_names
            ),
            blocks=blocks,
            text_encoders=tuple(self._text_encoder(*item, shapes) for item in texts.items()),
            vae_decoder=self._component("vae_decoder", vae, ("latents",)),
            policy=None,
            parameters=sum(
                prod(static_shape(v))
                for v in denoiser.model.graph.inputs
                if v.name not in self.family.input_names
            ),
        )

    def tag(self, shapes: Shapes, *, text: bool = False) -> str:
        """Return what stands in the names of a size's files: nothing in those of the first.

        ``text`` tells graphs that depend on the batch size alone.
        """
        first = self._sizes[0]
        same_image = text or shapes.size == first.size
        image = "" if same_image else f".{shapes.image_width}x{shapes.image_height}"
        return image + ("" if shapes.batch_size == first.batch_size else f".batch{shapes.batch_size}")

    def _capture_text_encoder(self, encoder: TextEncoder, shapes: Shapes) -> _Captured:
        return self._capture(
            encoder.name,
            self.tag(shapes, text=True),
            # Of all sizes with this batch the first: the graph knows no images.
            next(s for s in self._sizes if s.batch_size == shapes.batch_size),
            self._checkpoint.component(encoder.name),
            partial(capture_text_encoder, encoder=encoder),
        )

    def _text_encoder(self, encoder: TextEncoder, captured: _Captured, shapes: Shapes) -> TextEncoderEntry:
        tokenizer = capture_tokenizer(self._checkpoint, shapes, encoder)

        def write(path: Path) -> JsonValue:
            path.write_text(tokenizer.json, encoding="utf-8")
            return None

        path = f"{encoder.tokenizer}.json"
        self._workspace.product(path, content_key("tokenizer", tokenizer.json), write)
        return TextEncoderEntry(
            **dict(self._component(encoder.name, captured, ("input_ids",), cut=True)),
            name=encoder.name,
            tokenizer=TokenizerEntry(path=path, max_length=tokenizer.max_length, pad_id=tokenizer.pad_id),
        )

    def _capture(self, name: str, tag: str, shapes: Shapes, component: Component, capture: Any) -> _Captured:
        import onnx_ir as ir

        self._progress.item(name)
        versions = [
            metadata.version(package) for package in ("torch", "diffusers", "transformers", "onnxscript")
        ]
        key = content_key("capture", self._code, versions, OPSET, component.config, shapes)
        self._workspace.product(
            f"capture/{name}.config.json",
            content_key(component.config),
            lambda path: _write_json(path, component.config),
        )

        def make(path: Path) -> None:
            ir.save(capture(self._checkpoint, shapes), path)

        path, _ = self._workspace.product(f"capture/{name}{tag}.onnx", key, make)
        return _Captured(ir.load(path), component, content_key(key, component.fingerprint), tag)

    def _weights(self, name: str, captured: _Captured, inputs: tuple[str, ...], bits: WeightBits) -> _Weights:
        """Write the weights of a graph, unless an earlier size wrote them: its layers have the same."""
        if name in self._written:
            return self._written[name]
        graph = captured.model.graph
        layers = find_layers(graph)
        parameters = [str(v.name) for v in graph.inputs if v.name not in inputs]
        method = self._options.weights
        key = content_key("weights", captured.key, bits, method.key if bits != 32 else "")
        self._progress.stage("weights", len(parameters))

        halves = name == "denoiser"  # text encoder and VAE run in FP32 only, whatever they are stored in

        def make(path: Path) -> JsonValue:
            with path.open("wb") as file:
                index = write_weights(
                    file,
                    layers,
                    parameters,
                    partial(captured.component.get, bfloat16=not halves),
                    bits,
                    method.quantize,
                    self._progress.item,
                    halves,
                )
            facts: JsonValue = index.model_dump(mode="json")
            return facts

        path, facts = self._workspace.product(f"onnx/{name}.weights.bin", key, make)
        written = _Weights(WeightIndex.model_validate(facts), path.name, path.parent, key)
        self._written[name] = written
        return written

    def _blocks(
        self, captured: _Captured, weights: _Weights, ranges: Ranges | None
    ) -> tuple[BlockEntry, ...]:
        blocks = self._split(captured, {})
        parts: dict[str, tuple[str, ...]] = {}
        if self._options.choose is not None:
            layers = {block.name: self._layers(block) for block in blocks}
            # A policy knows no sizes: what is chosen for the first holds for all.
            choice = self.choice or self._options.choose(layers, self.family.float32_blocks)
            self.choice = choice
            fused = {name: fused_name(run) for run in choice.runs for name in run}
            if len(choice.runs) < len(blocks):
                blocks = self._split(captured, fused)
            for run in (run for run in choice.runs if len(run) > 1):
                deciding = (name for name in run if any(layer.quantized for layer in layers[name]))
                parts[fused_name(run)] = tuple(deciding)
        patterns = [self._patterns(block) for block in blocks]
        self._progress.stage("export", sum(map(len, patterns)) + len(blocks))
        entries = []
        for block, wanted in zip(blocks, patterns, strict=True):
            inside = self._layers(block)
            made = (captured, block, inside)
            reference = self._variant(*made, REFERENCE_BITS, {}, weights, ranges)
            variants = [self._variant(*made, bits, of, weights, ranges) for bits, of in wanted]
            entries.append(
                BlockEntry(
                    name=block.name,
                    inputs=block.inputs,
                    outputs=block.outputs,
                    layers=inside,
                    parts=parts.get(block.name, ()),
                    reference=reference.onnx,
                    variants={mixed_name(v.layers or (v.bits,)): v for v in variants},
                )
            )
        return tuple(entries)

    def _split(self, captured: _Captured, fused: Mapping[str, str]) -> list[Block]:
        def block_of(scope: str) -> str | None:
            name = self.family.block_of(scope, self._options.granularity)
            return None if name is None else fused.get(name, name)

        return split(captured.model, self.family.input_names, block_of)

    def _layers(self, block: Block) -> tuple[LayerEntry, ...]:
        return tuple(
            LayerEntry(
                name=layer.name,
                kind="conv" if layer.kind == "conv" else "linear",
                macs=layer.macs,
                weights=_count(block.model, layer.weight),
                quantized=self.family.quantizes(layer.name),
            )
            for layer in find_layers(block.model.graph)
        )

    def _patterns(self, block: Block) -> list[tuple[int, dict[str, int]]]:
        """Return for each variant of a block its bits, and those of each layer where they differ."""
        if self.choice is None or self._options.uniform:
            return [(bits, {}) for bits in self._options.bits]
        found: list[tuple[int, dict[str, int]]] = []
        for of in self.choice.variants[block.name]:
            if not of:
                is_float = block.name in self.family.float32_blocks
                found.append((REFERENCE_BITS if is_float else best_fast_option(self._options.bits), {}))
            else:
                found.append((max(of.values()), of if len(set(of.values())) > 1 else {}))
        return found

    def _variant(
        self,
        captured: _Captured,
        block: Block,
        layers: tuple[LayerEntry, ...],
        bits: int,
        bits_of: Mapping[str, int],
        weights: _Weights,
        ranges: Ranges | None,
    ) -> VariantEntry:
        """Export a block with its quantized layers at ``bits``, or each at what ``bits_of`` says."""
        quantized = [layer.name for layer in layers if layer.quantized]
        pattern = {name: bits_of.get(name, bits) for name in quantized}
        containers = {container_of(b) for b in pattern.values()} or {container_of(bits)}
        if block.name in self.family.float32_blocks:
            pattern, containers = dict.fromkeys(pattern, REFERENCE_BITS), {Container.FLOAT}
        container = next(c for c in Container if c in containers)  # they are listed from the narrowest
        thresholds: dict[str, float] = {}
        for option in sorted({b for b in pattern.values() if container_of(b) is Container.INT8}):
            at_option = {n for n, b in pattern.items() if b == option}
            thresholds |= _thresholds(ranges, option, at_option, block.name)
        stored = REFERENCE_BITS if container is Container.FLOAT else bits
        mixed = tuple(pattern.values()) if bits_of else None
        name = variant_name(stored) if mixed is None else mixed_name(mixed)
        self._progress.item(f"{block.name} {name}")
        ports = (block.inputs, block.outputs)  # they are named after blocks, which may be fused
        made_from = ("variant", weights.key, captured.key, self._options.granularity, block.name, ports)
        key = content_key(*made_from, stored if mixed is None else mixed, thresholds)

        def make(path: Path) -> None:
            model = block.model.clone()
            if container is not Container.FLOAT:
                type_variant(model, pattern, thresholds)
            bind_weights(model, block.inputs, weights.index, weights.location, weights.folder)
            save(model, path)

        path = f"onnx/{block.name}.{name}{captured.tag}.onnx"
        self._workspace.product(path, key, make)
        return VariantEntry(bits=bits, layers=mixed, container=container, onnx=path)

    def _component(
        self, name: str, captured: _Captured, inputs: tuple[str, ...], *, cut: bool = False
    ) -> ComponentEntry:
        """Export a part without bit options; a text encoder, ``cut``, as several graphs if it is large."""
        weights = self._weights(name, captured, inputs, 32)
        graph = captured.model.graph
        sizes = {str(v.name): prod(static_shape(v)) for v in graph.inputs if v.name not in inputs}
        parts = parts_of(sizes) if cut else []
        whole = Block("", captured.model, inputs, ())
        pieces = split(captured.model, inputs, lambda scope: part_of(scope, parts)) if parts else [whole]
        paths = []
        for piece in pieces:

            def make(path: Path, piece: Block = piece) -> None:
                model = piece.model.clone()
                bind_weights(model, piece.inputs, weights.index, weights.location, weights.folder)
                save(model, path)

            path = f"onnx/{'.'.join(filter(None, (name, piece.name)))}{captured.tag}.onnx"
            key = content_key(weights.key, captured.key, piece.name, piece.inputs, piece.outputs)
            self._workspace.product(path, key, make)
            paths.append(path)
        return ComponentEntry(onnx=paths[0], then=tuple(paths[1:]))


@dataclass(frozen=True)
class _Captured:
    model: ir.Model
    component: Component
    key: str
    tag: str


@dataclass(frozen=True)
class _Weights:
    index: WeightIndex
    location: str
    folder: Path
    key: str


def _thresholds(ranges: Ranges | None, bits: int, layers: set[str], block: str) -> dict[str, float]:
    """Return the clipping thresholds of layers of a block, by name."""
    if ranges is None:
        raise QlipError(f"{bits}-bit activations need ranges", fix="give a calibration")
    table = ranges.thresholds(bits)
    if missing := layers - set(table):
        raise QlipError(
            f"the activation ranges lack {len(missing)} layers of {block}",
            found=f"no {min(missing)}",
            fix="run 'qlip-export calibrate' for this model",
        )
    return {name: table[name] for name in sorted(layers)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _count(model: ir.Model, weight: str) -> int:
    return prod(static_shape(next(v for v in model.graph.inputs if v.name == weight)))


def _tensor_entry(value: ir.Value) -> TensorEntry:
    return TensorEntry(name=str(value.name), shape=static_shape(value), dtype="float32")
