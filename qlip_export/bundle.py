"""The bundle: a directory with a manifest that accounts for every file in it.

JSON, ONNX, raw tensors and engine files only; nothing in a bundle is ever unpickled or executed as code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, ValidationError, model_validator

from qlip_export.conditioning import Encoded, Guidance, Recipe
from qlip_export.errors import QlipError
from qlip_export.extents import AXES, Axis, Extent, Extents, Profile
from qlip_export.files import sha256_of
from qlip_export.policy.table import DecisionTable
from qlip_export.spec import (
    BYTES,
    Container,
    DType,
    Frozen,
    Granularity,
    SamplerTable,
    Unit,
    WeightBits,
    variant_name,
)

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"


def _stays_inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError(f"path {path!r} leaves the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_stays_inside)]
"""A POSIX path relative to the bundle that cannot leave it."""


class FileEntry(Frozen):
    """Size in bytes and SHA-256 of one file, and where it came from."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    key: str = Field(description="changes with anything the file was made from")
    facts: JsonValue = Field(None, description="what its maker said of it, e.g. where each weight lies")


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


class LayerEntry(Frozen):
    """A Conv2d or Linear of a block."""

    name: str
    kind: Literal["conv", "linear"]
    macs: int
    weights: int = Field(description="number of weights")
    quantized: bool = Field(
        description="whether its activations follow the bit options (else 16 bits or more)"
    )


class VariantEntry(Frozen):
    """A block at one bit option, or with each of its layers at its own."""

    bits: int = Field(description="of all quantized layers, or the highest where they differ")
    layers: tuple[int, ...] | None = Field(
        default=None,
        description="bits of each quantized layer, in the block's order; none where they are all `bits`",
    )
    container: Container = Field(description="the narrowest that some layer is carried by")
    onnx: BundlePath


class BlockEntry(Frozen):
    """A piece of the denoiser, compiled as one engine per variant."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[LayerEntry, ...]
    parts: tuple[str, ...] = Field(
        default=(), description="blocks with quantized layers that it was fused from; none: it was not"
    )
    reference: BundlePath = Field(description="ONNX at 32 bits, which engines are compared with")
    variants: dict[str, VariantEntry] = Field(description="what can run, by name")

    @property
    def quantized(self) -> list[LayerEntry]:
        """The layers whose activations follow the policy."""
        return [layer for layer in self.layers if layer.quantized]

    def layer_bits(self, variant: str) -> tuple[int, ...]:
        """Return the bits of every quantized layer in a variant."""
        entry = self.variants[variant]
        return entry.layers if entry.layers is not None else (entry.bits,) * len(self.quantized)


class ComponentEntry(Frozen):
    """A part that has no bit options: text encoder or VAE decoder."""

    onnx: BundlePath
    then: tuple[BundlePath, ...] = Field(
        default=(), description="graphs that run after it: a part too large for one engine is cut"
    )

    @property
    def graphs(self) -> tuple[str, ...]:
        """All of them, in the order in which they run."""
        return (self.onnx, *self.then)


class TokenizerEntry(Frozen):
    """The prompt's way to token ids."""

    path: BundlePath
    max_length: int
    pad_id: int


class TextEncoderEntry(ComponentEntry):
    """A text encoder and its tokenizer."""

    name: str
    tokenizer: TokenizerEntry


class PolicyEntry(ComponentEntry):
    """The trained policy: chooses the bits of every unit at every step from the prompt.

    The engine turns the pooled text embedding into quality q (QLIP, table S5), the table turns q into bits
    (figure S2).
    """

    name: str = Field(description="in the calibration folder that it came from")
    unit: Literal["block", "layer"] = Field(description="what one decision is about")
    criterion: Literal["quality", "complexity", "length"] = Field(description="what q predicts")
    parts: tuple[Literal["q", "m", "h"], ...] = Field(description="learned parts of Q2B (figure S2)")
    cost: str = Field(description="'bits', or 'latency on BACKEND'")
    projection: tuple[int, int] = Field(description="shape of T2Q's frozen first linear, (C, C_clip)")
    fab: float = Field(description="feature average bits of the training prompts")
    srocc: float = Field(description="Spearman's rank correlation of q and its label, held-out prompts")
    plcc: float = Field(description="Pearson's correlation of the same")
    table: DecisionTable


class Exported(Frozen):
    """What an export adds to a manifest."""

    inputs: tuple[TensorEntry, ...]
    blocks: tuple[BlockEntry, ...]
    text_encoders: tuple[TextEncoderEntry, ...]
    vae_decoder: ComponentEntry
    policy: PolicyEntry | None
    parameters: int = Field(description="of the denoiser")


class ModelEntry(Frozen):
    """What was compiled."""

    name: str
    family: str
    fingerprint: str
    source: str = Field(description="name of the zoo, id of the Hub, or folder")
    revision: str | None = Field(None, description="commit of a model from the Hub")
    lora: tuple[str, ...] = Field((), description="fused into the weights: PATH:SCALE")
    random_weights: int | None = Field(
        None, description="seed of random weights: speed and memory are those of the model, images are noise"
    )
    parameters: int = Field(description="of the denoiser")


class ShapesEntry(Frozen):
    """Static shapes of the bundle, or of one of its sizes."""

    batch_size: int = Field(ge=1)
    latents: tuple[int, int, int, int]
    image: tuple[int, int] = Field(description="height, width")

    @property
    def label(self) -> str:
        """What the command line calls them: ``768x512``, or ``768x512:4`` for batches of four."""
        return f"{self.image[1]}x{self.image[0]}" + (f":{self.batch_size}" if self.batch_size > 1 else "")

    @property
    def sizes(self) -> dict[Axis, int]:
        """Images per batch, and their height and width."""
        return {"batch": self.batch_size, "height": self.image[0], "width": self.image[1]}


class SizeEntry(Frozen):
    """What differs in a further size of images or batches; fields are those of the manifest.

    The ONNX files of all sizes refer to the same weight files, and the policy's table is one.
    """

    shapes: ShapesEntry
    inputs: tuple[TensorEntry, ...]
    conditioning: dict[str, Recipe]
    blocks: tuple[BlockEntry, ...]
    text_encoders: tuple[TextEncoderEntry, ...]
    vae_decoder: ComponentEntry
    policy: BundlePath | None = Field(description="ONNX of the policy for batches of this size")
    sampler: SamplerTable


class QuantizationEntry(Frozen):
    """How weights and activations were put on their grids."""

    weight_bits: WeightBits
    weight_method: str
    ranges: BundlePath | None


class Manifest(Frozen):
    """Everything the run time needs to know, and everything that is in the bundle."""

    schema_version: int
    qlip_export_version: str
    model: ModelEntry
    bits: tuple[int, ...]
    granularity: Granularity = Field(description="where the denoiser was cut")
    precision: Unit = Field(description="what has bits of its own in an engine: the block, or each layer")
    quantization: QuantizationEntry
    shapes: ShapesEntry
    inputs: tuple[TensorEntry, ...] = Field(description="the denoiser's own: latents, timestep, conditioning")
    conditioning: dict[str, Recipe] = Field(
        description="how each input comes about, but latents and timestep"
    )
    guidance: Guidance
    blocks: tuple[BlockEntry, ...]
    text_encoders: tuple[TextEncoderEntry, ...]
    quality_encoder: str = Field(description="whose pooled embedding the policy reads")
    vae_decoder: ComponentEntry
    policy: PolicyEntry | None = Field(description="none: every run is at uniform bits")
    sampler: SamplerTable
    other_sizes: tuple[SizeEntry, ...] = Field(
        default=(), description="further sizes of images and batches; all else describes the first"
    )
    targets: dict[str, TargetEntry] = Field(description="by name; none: the bundle has to be compiled")
    versions: dict[str, str]
    files: dict[BundlePath, FileEntry]

    @model_validator(mode="after")
    def _policy_fits(self) -> Manifest:
        if self.policy is not None:
            table = self.policy.table
            if len(table.group_of_step) != len(self.sampler.steps):
                raise ValueError(
                    f"the policy is for {len(table.group_of_step)} steps, not {len(self.sampler.steps)}"
                )
            if not set(table.options) <= set(self.bits):
                raise ValueError(f"the policy chooses among {table.options}, not {self.bits}")
        return self

    @model_validator(mode="after")
    def _conditioning_is_whole(self) -> Manifest:
        wanted = {tensor.name for tensor in self.inputs} - {"latents", "timestep"}
        if wanted != set(self.conditioning):
            raise ValueError(f"the denoiser takes {sorted(wanted)}, not {sorted(self.conditioning)}")
        named = {self.quality_encoder}
        named.update(*(r.encoders for r in self.conditioning.values() if isinstance(r, Encoded)))
        if unknown := named - {encoder.name for encoder in self.text_encoders}:
            raise ValueError(f"there is no text encoder {min(unknown)!r}")
        return self

    def text_encoder(self, name: str) -> TextEncoderEntry:
        """Return a text encoder by its name."""
        return next(encoder for encoder in self.text_encoders if encoder.name == name)

    @property
    def containers(self) -> dict[str, Container]:
        """The ONNX files that a target compiles, and the container of each."""
        return {onnx: container for size in self.sizes for onnx, container in size._graphs()}

    def _graphs(self) -> Iterator[tuple[str, Container]]:
        """Yield the ONNX files of this size, in the same order in every size."""
        for block in self.blocks:
            yield from ((v.onnx, v.container) for v in block.variants.values())
        for part in (*self.text_encoders, self.vae_decoder, *([self.policy] if self.policy else [])):
            yield from ((graph, Container.FLOAT) for graph in part.graphs)

    @property
    def sizes(self) -> tuple[Manifest, ...]:
        """For each size the manifest that a bundle of that size alone would have; files are those of all."""
        first = self.model_copy(update={"other_sizes": ()})
        return (first, *(first._at(entry) for entry in self.other_sizes))

    def _at(self, entry: SizeEntry) -> Manifest:
        update = {name: getattr(entry, name) for name in SizeEntry.model_fields}
        if self.policy is not None and entry.policy is not None:
            update["policy"] = self.policy.model_copy(update={"onnx": entry.policy})
        size = self.model_copy(update=update)
        targets = {
            n: target.at(entry.shapes.label) for n, target in self.targets.items() if not target.profile
        }
        return size.model_copy(update={"targets": targets | self._ranging(size)})

    def _ranging(self, size: Manifest) -> dict[str, TargetEntry]:
        """Return the targets with a profile that hold ``size``, as its own."""
        names = {mine: its for (mine, _), (its, _) in zip(self._graphs(), size._graphs(), strict=True)}
        return {
            name: target.resized(size.shapes.sizes, names)
            for name, target in self.targets.items()
            if target.profile and target.holds(size.shapes.sizes, self.shapes.sizes)
        }

    def input_extents(self, axes: Collection[Axis]) -> dict[str, Extents]:
        """Return the shapes of the denoiser's inputs, and of the VAE's ``image``, where ``axes`` vary."""
        own = self.shapes.sizes
        batch, height, width = (Extent.of(axis if axis in axes else own[axis]) for axis in AXES)
        found = {}
        for tensor in self.inputs:
            shape = [Extent.of(n) for n in tensor.shape]
            if len(shape) > 1:  # those of rank 1 are one for all images
                shape[0] = batch * Extent.of(self.guidance.rows)
            if tensor.name == "latents":
                shape[2] = height / (own["height"] // self.shapes.latents[2])
                shape[3] = width / (own["width"] // self.shapes.latents[3])
            found[tensor.name] = tuple(shape)
        return found | {"image": (batch, Extent.of(3), height, width)}

    def resized(self, sizes: Mapping[Axis, int]) -> Manifest:
        """Return the manifest of a size that only targets with a profile have: the first one, resized."""
        shapes = {name: tuple(e.at(sizes) for e in s) for name, s in self.input_extents(AXES).items()}
        image = (sizes["height"], sizes["width"])
        _, channels, rows, columns = shapes["latents"]
        latents = (sizes["batch"], channels, rows, columns)
        size = self.model_copy(
            update={
                "shapes": ShapesEntry(batch_size=sizes["batch"], latents=latents, image=image),
                "inputs": tuple(t.model_copy(update={"shape": shapes[t.name]}) for t in self.inputs),
                "other_sizes": (),
            }
        )
        return size.model_copy(update={"targets": self._ranging(size)})

    @property
    def uniform(self) -> tuple[int, ...]:
        """The bit options at which every block can run with all of its layers."""
        return tuple(b for b in self.bits if all(variant_name(b) in k.variants for k in self.blocks))

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the bundle by kind of file."""
        totals = {"weights": 0, "onnx": 0, "engines": 0, "other": 0}
        for path, entry in self.files.items():
            suffix = path.rsplit(".", 1)[-1]
            kind = "engines" if path.startswith("engines/") else {"bin": "weights"}.get(suffix, suffix)
            totals[kind if kind in totals else "other"] += entry.size
        return totals


def best_fast_option(options: Sequence[int]) -> int:
    """Return the largest of ``options`` up to 16 bits, or the smallest where all are larger."""
    return max((bits for bits in options if bits <= 16), default=min(options))


def compile_command(root: Path, backend: str = "openvino") -> str:
    """Return the command that adds engines to the bundle ``root``."""
    return f"qlip-export compile {root} --backend {backend}"


def building_folder(out: Path) -> Path:
    """Return where a build of the bundle ``out`` works: hidden, and named so that no one else uses it."""
    out = out.absolute()
    return out.with_name(f".{out.name}.qlip-building")


class Bundle:
    """A bundle opened for reading; files are checked against their hashes when they are asked for."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Use `Bundle.open` instead."""
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest.

        Raises:
            QlipError: No bundle there, another schema version, unknown keys, a path that leaves the bundle.
        """
        folder = Path(root)
        path = folder / MANIFEST
        if not path.is_file():
            hint = "; its build was interrupted" if building_folder(folder).is_dir() else ""
            raise QlipError(
                f"{folder} is no bundle{hint}",
                expected=f"a folder with {MANIFEST}",
                found="no such folder" if not folder.exists() else f"no {MANIFEST} in it",
                fix=f"qlip-export build --model emoji -o {folder}",
            )
        try:
            text = path.read_text(encoding="utf-8")
            version = _Versioned.model_validate_json(text).schema_version
            if version != SCHEMA_VERSION:
                raise QlipError(
                    f"{path} has another schema version",
                    expected=str(SCHEMA_VERSION),
                    found=str(version),
                    fix="build the bundle again with this version of qlip-export",
                )
            return cls(folder, Manifest.model_validate_json(text))
        except (ValidationError, OSError, UnicodeDecodeError) as error:
            raise QlipError(
                f"{path} is not a valid manifest", found=_first_line(error), fix="build the bundle again"
            ) from error

    def at(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        images: int | None = None,
        target: str | None = None,
    ) -> Bundle:
        """Return the bundle as one of a single size: the first that has these numbers.

        Sizes that a target with a profile runs come after those that the bundle was built with; numbers that
        are not given are then the bundle's own. Where images of that size come in several batch sizes and it
        is known how many are wanted, the one that draws them with the least padding, then in the fewest
        batches; where a target's batch has a range, the fewest batches, and the least padding with these.

        Args:
            height: Of images, pixels.
            width: The same.
            batch_size: Images per batch.
            images: How many are wanted; none: not known.
            target: Look only at what this target runs.

        Raises:
            QlipError: The bundle has no such size.
        """
        asked: dict[Axis, int | None] = {"batch": batch_size, "height": height, "width": width}
        named = self.manifest.targets
        held = None if target is None else named[target].profile.get("batch")
        if held is not None and images and batch_size is None:
            batches = -(-images // held.max)
            asked["batch"] = max(held.min, -(-images // batches))
        fitting = self._fitting(asked, [*named] if target is None else [target])
        if not fitting:
            raise self._no_such_size(asked, [*named] if target is None else [target])

        def cost(size: Manifest) -> tuple[int, int]:
            batches = -(-(images or 0) // size.shapes.batch_size)
            return batches * size.shapes.batch_size, batches

        return Bundle(
            self.root, min((s for s in fitting if s.shapes.image == fitting[0].shapes.image), key=cost)
        )

    def serving(
        self,
        wanted: str,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
    ) -> Bundle:
        """Return the bundle with those targets of backend ``wanted``, or ``auto``, that run such a size.

        Raises:
            QlipError: It has engines of ``wanted``, or none at all, but not of that size.
        """
        asked: dict[Axis, int | None] = {"batch": batch_size, "height": height, "width": width}
        named = [n for n, entry in self.manifest.targets.items() if wanted in ("auto", entry.backend)]
        serving = [name for name in named if self._fitting(asked, [name])]
        if not serving and (named or not self._fitting(asked, [])):
            raise self._no_such_size(asked, named)
        targets = {name: self.manifest.targets[name] for name in serving}
        return Bundle(
            self.root, self.manifest.model_copy(update={"targets": targets}) if serving else self.manifest
        )

    def _fitting(self, asked: Mapping[Axis, int | None], targets: Sequence[str]) -> list[Manifest]:
        """Return the sizes with these numbers that one of ``targets`` runs; without targets, all of them."""
        found = [
            size
            for size in self.manifest.sizes
            if all(asked[axis] in (None, n) for axis, n in size.shapes.sizes.items())
            and (not targets or any(name in size.targets for name in targets))
        ]
        own = self.manifest.shapes.sizes
        sizes = {axis: n if (given := asked[axis]) is None else given for axis, n in own.items()}
        ranging = (t for t in (self.manifest.targets[name] for name in targets) if t.profile)
        if all(size.shapes.sizes != sizes for size in found) and any(t.holds(sizes, own) for t in ranging):
            found.append(self.manifest.resized(sizes))
        return found

    def _no_such_size(self, asked: Mapping[Axis, int | None], targets: Sequence[str]) -> QlipError:
        entries = {name: self.manifest.targets[name] for name in targets}
        options: dict[Axis, str] = {"height": "--height", "width": "--width", "batch": "--batch-size"}
        known = ""
        if not entries or not all(entry.profile for entry in entries.values()):
            labels = ", ".join(size.shapes.label for size in self.manifest.sizes)
            known = f"{labels} (WIDTHxHEIGHT, :batch size)"
        own = self.manifest.shapes.sizes
        ranges = (
            f"{name}: "
            + ", ".join(
                f"{axis} {entry.profile[axis].told if axis in entry.profile else own[axis]}" for axis in AXES
            )
            for name, entry in entries.items()
            if entry.profile
        )
        return QlipError(
            f"{self.root} holds no engines of that size",
            expected="; ".join(filter(None, [known, *ranges])),
            found=" ".join(f"{options[a]} {asked[a]}" for a in options if asked[a] is not None),
            fix="build it with one more --size"
            + (", or compile it with a wider --profile" if any(e.profile for e in entries.values()) else ""),
        )

    def file(self, path: str) -> Path:
        """Return the absolute path of a file of the bundle, after checking its size and SHA-256.

        Raises:
            QlipError: The file is missing, truncated or altered, or is not listed.
        """
        entry = self.manifest.files.get(path)
        full = self.root / path
        if entry is None:
            raise QlipError(
                f"the manifest of {self.root} lists no file {path!r}", fix="build the bundle again"
            )
        if not full.resolve().is_relative_to(self.root.resolve()):
            raise QlipError(
                f"{path!r} leaves the bundle", found=str(full.resolve()), fix="build the bundle again"
            )
        if not full.is_file():
            raise QlipError(f"{full} is missing", fix="build the bundle again")
        size = full.stat().st_size
        if size != entry.size:
            raise QlipError(
                f"{full} has the wrong size",
                expected=f"{entry.size} bytes",
                found=f"{size} bytes",
                fix="build the bundle again",
            )
        digest = sha256_of(full)
        if digest != entry.sha256:
            raise QlipError(
                f"{full} was altered after the build",
                expected=f"SHA-256 {entry.sha256}",
                found=digest,
                fix="build the bundle again",
            )
        return full

    def engine(self, target: TargetEntry, onnx: str) -> EngineEntry:
        """Return the engine that ``target`` has of an ONNX file.

        Raises:
            QlipError: It has none.
        """
        entry = target.engines.get(onnx)
        if entry is None:
            raise QlipError(
                f"{self.root} holds no {target.backend} engine of {onnx}",
                fix=compile_command(self.root, target.backend),
            )
        return entry

    @property
    def uniform(self) -> tuple[int, ...]:
        """See `Manifest.uniform`."""
        return self.manifest.uniform

    def bits(self, requested: int | None = None) -> int:
        """Return the bit option of a uniform run: the requested one, else the best that runs fast.

        Without a request that is the largest option up to 16 bits, which no one can tell from FP32 by eye.

        Raises:
            QlipError: The bundle has no such option.
        """
        options = self.uniform
        if not options or (requested in self.manifest.bits and requested not in options):
            raise QlipError(
                "the engines of this bundle run what its policy asks for, and no uniform bits",
                found=None if requested is None else str(requested),
                fix="build it with --granularity block",
            )
        if requested is None:
            return best_fast_option(options)
        if requested not in options:
            raise QlipError(
                f"the bundle has no {requested}-bit engines",
                expected=" or ".join(map(str, options)),
                found=str(requested),
                fix=f"qlip-export build --bits {','.join(map(str, sorted({*options, requested})))} ...",
            )
        return requested

    def guidance(self, requested: float | None = None) -> float:
        """Return the guidance scale of a run: the requested one, else the model's own.

        Raises:
            QlipError: Not finite, or the model has no such scale.
        """
        own = self.manifest.guidance
        if requested is None:
            return own.scale
        if not math.isfinite(requested):
            raise QlipError("the guidance scale is not finite", expected="a number", found=str(requested))
        if own.kind == "none" and requested != own.scale:
            raise QlipError(
                f"{self.manifest.model.name} takes no guidance scale",
                expected="none: guidance was distilled into its denoiser at one scale",
                found=str(requested),
                fix="leave --guidance away",
            )
        return float(requested)


class _Versioned(Frozen, extra="ignore"):
    schema_version: int


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}{more}"
    return str(error)
