"""The manifest: everything the run time needs to know, and every file of a bundle."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from qlip_export.compiled import TargetEntry, TensorEntry
from qlip_export.conditioning import Encoded, Guidance, Recipe
from qlip_export.extents import AXES, Axis, Extent, Extents
from qlip_export.policy.table import DecisionTable
from qlip_export.spec import (
    BundlePath,
    Container,
    Frozen,
    Granularity,
    SamplerTable,
    Unit,
    WeightBits,
    variant_name,
)

SCHEMA_VERSION = 4


class FileEntry(Frozen):
    """Size in bytes and SHA-256 of one file, and where it came from."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    key: str = Field(description="changes with anything the file was made from")
    facts: JsonValue = Field(None, description="what its maker said of it, e.g. where each weight lies")


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
