"""Parity: every engine against the captured graph on real activations, the image against diffusers.

The activations are those of a real sampling run. The reference of an FP32 or 16-bit engine is the captured
FP32 graph with the bundle's weights, run by ONNX Runtime; the reference of an INT8 engine is the quantized
graph itself, so that the engine is judged and not the quantization. How far quantization moves a block from
FP32 is reported beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qlip_export.bundle import Bundle
from qlip_export.compiled import EngineEntry
from qlip_export.errors import NotFiniteError, QlipError
from qlip_export.manifest import BlockEntry
from qlip_export.noise import seeded_noise
from qlip_export.parity import OutputRow, for_engine, save_case
from qlip_export.progress import Progress
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Pattern
from qlip_export.runtime.targets import choose_target
from qlip_export.runtime.tokenizer import PromptTokenizer
from qlip_export.spec import Container, Frozen, container_of
from qlip_export.zoo import model_of

if TYPE_CHECKING:
    from qlip_export.checkpoint import Checkpoint

Arrays = dict[str, NDArray[Any]]

DEFAULT_SESSION = 1e-2
"""Least tolerance of a polygraphy command: left to its defaults, ONNX Runtime quantizes the activations of
Linear layers with 4-bit weights as it runs. The comparison here switches that off."""

NOTE_INT8 = (
    "INT8 cases were saved without a command for ONNX Runtime: 1.32 breaks Q/DQ graphs by its default "
    "fusions, and polygraphy cannot switch these off"
)

LEAST_PSNR = {Container.FLOAT: 45.0, Container.HALF: 30.0}
"""Least agreement, in dB, of the image with diffusers' own; INT8 rounds differently and drifts, so none."""

TOLERANCES: dict[tuple[Container, str], float] = {
    (Container.FLOAT, "float32"): 1e-4,
    (Container.HALF, "float16"): 1e-2,
    (Container.HALF, "bfloat16"): 5e-2,
    (Container.INT8, "float16"): 5e-2,
    (Container.INT8, "bfloat16"): 1e-1,
}
"""Largest relative L2 error by container and by the dtype of what is not INT8."""

QUALITY_TOLERANCE = 1e-3
"""Largest distance of q, which lies in (0, 1); text encoder and policy run in FP32."""


class BlockRow(Frozen):
    """One engine, judged on one or more steps of a real run; the worst step counts."""

    block: str
    bits: int = Field(description="of all quantized layers, or the highest where they differ")
    variant: str
    reference: str
    error: float = Field(description="relative L2 error of the worst output")
    cosine: float = Field(description="of the worst output")
    outputs: tuple[OutputRow, ...] = Field(description="each by itself; none if not finite")
    tolerance: float
    from_float32: float = Field(description="relative L2 distance from the FP32 graph: the price of the bits")
    finite: bool
    wrong: dict[str, str] = Field(description="layers that compute in another precision than the graph's")
    passed: bool


class ImageRow(Frozen):
    """The whole run against diffusers."""

    bits: int | None = Field(description="none: each layer's by the policy")
    reference: str
    psnr: float | None = Field(description="dB, capped at 100; none if not finite")
    least: float | None
    passed: bool


class PolicyRow(Frozen):
    """The policy's decision on the prompt: text encoder and policy engines against their ONNX graphs."""

    q: float | None = Field(description="quality by the engines; none if the run was not finite")
    error: float | None = Field(description="distance from the graphs' q, run by ONNX Runtime")
    tolerance: float
    follows_table: bool = Field(description="whether the graph's bits are those of the manifest's table")
    passed: bool


class ValidationReport(Frozen):
    """What was compared, and how it came out."""

    bundle: str
    size: str = Field(description="WIDTHxHEIGHT[:BATCH]")
    target: str = Field(description="whose engines were compared")
    prompt: str
    seed: int
    steps: tuple[int, ...] = Field(description="sampling steps whose activations were used")
    rows: tuple[BlockRow, ...]
    policy: PolicyRow | None = Field(description="none where the bundle has no policy")
    images: tuple[ImageRow, ...]
    commands: tuple[str, ...] = Field(description="polygraphy on the saved cases; none if nothing was saved")
    notes: tuple[str, ...]
    other_sizes: tuple[ValidationReport, ...] = Field(
        default=(), description="the bundle's further sizes, each by itself"
    )
    passed: bool = Field(description="in all sizes")


def missing_libraries() -> list[str]:
    """Return what validation needs and is not installed."""
    needed = {"onnxruntime": "ONNX Runtime", "polygraphy": "polygraphy"}
    return [told for name, told in needed.items() if find_spec(name) is None]


def require_libraries() -> None:
    """Make sure that nothing is missing.

    Raises:
        QlipError: ONNX Runtime or polygraphy is not installed.
    """
    if missing := missing_libraries():
        raise QlipError(
            "validation needs ONNX Runtime and polygraphy",
            found=f"no {' and no '.join(missing)}",
            fix='pip install "qlip-export[validate]"',
        )


def validate(
    path: str | os.PathLike[str],
    *,
    prompt: str,
    seed: int,
    model: str | None,
    progress: Progress,
    save: Path | None = None,
    backend: str = "auto",
) -> ValidationReport:
    """Validate a bundle, in each of its sizes.

    Args:
        path: The bundle.
        prompt: Prompt of the run whose activations are used.
        seed: Its seed.
        model: Model to compare the image with; the bundle's own source if absent.
        progress: Display.
        save: Folder for the inputs and reference outputs of every engine, as polygraphy reads them.
        backend: Whose engines to compare; ``auto`` takes the first that can run here.

    Raises:
        QlipError: The bundle is damaged, no engines of it run here, or ONNX Runtime or polygraphy is not
            installed.
    """
    require_libraries()
    bundle = Bundle.open(path)
    target = choose_target(bundle, backend)  # refused before gigabytes are hashed
    used = _files_but_other_engines(bundle, target.name)
    progress.stage("check", len(used))
    for name in used:
        progress.item(name)
        bundle.file(name)
    first, *others = (
        _validate(bundle.narrowed(size), prompt, seed, model, progress, save, backend)
        for size in bundle.manifest.sizes
        if not target.entry.profile or target.name in size.targets
    )
    passed = all(report.passed for report in (first, *others))
    return first.model_copy(update={"other_sizes": tuple(others), "passed": passed})


def _files_but_other_engines(bundle: Bundle, target: str) -> list[str]:
    """Return the bundle's files; engines of other targets need not have come along to this machine."""
    others = {
        engine.path
        for name, entry in bundle.manifest.targets.items()
        if name != target
        for engine in entry.engines.values()
    }
    return [name for name in bundle.manifest.files if name not in others]


def _validate(
    bundle: Bundle,
    prompt: str,
    seed: int,
    model: str | None,
    progress: Progress,
    save: Path | None,
    backend: str,
) -> ValidationReport:
    """Validate a bundle of one size."""
    pipeline = TextToImage(bundle, choose_target(bundle, backend))
    sampler_steps = len(bundle.manifest.sampler.steps)
    steps = tuple(sorted({0, sampler_steps // 2, sampler_steps - 1}))
    progress.stage("record", sampler_steps)
    recorded = _record(pipeline, prompt, seed, steps, lambda: progress.item(""))
    progress.stage("compare", sum(len(block.variants) for block in bundle.manifest.blocks))
    rows, commands = _compare_blocks(pipeline, recorded, progress, save)
    policy = _compare_policy(pipeline, prompt, seed)
    images, notes = _compare_images(pipeline, prompt, seed, model, progress)
    if save is not None and any(container_of(b) is Container.INT8 for b in bundle.manifest.bits):
        notes.append(NOTE_INT8)
    return ValidationReport(
        bundle=str(bundle.root),
        size=bundle.manifest.shapes.label,
        target=pipeline.target.name,
        prompt=prompt,
        seed=seed,
        steps=steps,
        rows=tuple(rows),
        policy=policy,
        images=tuple(images),
        commands=tuple(commands),
        notes=tuple(notes),
        passed=all(r.passed for r in rows)
        and (policy is None or policy.passed)
        and all(i.passed for i in images),
    )


def _record(
    pipeline: TextToImage, prompt: str, seed: int, steps: tuple[int, ...], on_step: Callable[[], None]
) -> list[Arrays]:
    """Return the denoiser's inputs at ``steps`` of a real run."""
    found: list[Arrays] = []
    original = pipeline.chain.step
    count = 0

    def recording(
        latents: NDArray[np.float32],
        timestep: float,
        pattern: Pattern,
        before: Callable[[], None] | None = None,
    ) -> NDArray[np.float32]:
        nonlocal count
        if count in steps:
            time = np.array([timestep], dtype=np.float32)
            found.append({**pipeline.chain.held, "latents": latents, "timestep": time})
        count += 1
        on_step()
        return original(latents, timestep, pattern, before)

    pipeline.chain.step = recording  # type: ignore[method-assign]
    try:
        pipeline(prompt, seed=seed, bits=pipeline.bundle.bits() if pipeline.bundle.uniform else None)
    except NotFiniteError:
        pass  # an engine overflows; the activations up to here are enough to find out which
    finally:
        pipeline.chain.step = original  # type: ignore[method-assign]
    return found


def _compare_blocks(
    pipeline: TextToImage, recorded: list[Arrays], progress: Progress, save: Path | None
) -> tuple[list[BlockRow], list[str]]:
    from qlip_export.runners import Graph

    bundle = pipeline.bundle
    rows, commands = [], []
    values = [dict(arrays) for arrays in recorded]
    for block in bundle.manifest.blocks:
        float32 = Graph(bundle.file(block.reference))
        inputs = [{name: v[name] for name in block.inputs} for v in values]
        exact = float32(inputs)
        for name, variant in block.variants.items():
            progress.item(f"{block.name} {name}")
            int8 = variant.container is Container.INT8
            graph = Graph(bundle.file(variant.onnx)) if int8 or save else float32
            expected = graph(inputs) if int8 else exact
            entry = bundle.engine(pipeline.target.entry, variant.onnx)
            rows.append(_judge(pipeline, block, name, entry, inputs, expected, exact))
            if save is not None:
                case = Path(variant.onnx).stem
                feeds = [graph.feeds(arrays) for arrays in inputs]
                outputs = [graph.as_outputs(arrays) for arrays in expected]
                onnx = bundle.file(variant.onnx)
                command = save_case(
                    save, case, onnx, feeds, outputs, max(rows[-1].tolerance, DEFAULT_SESSION)
                )
                if not int8:  # ONNX Runtime's default fusions break Q/DQ, see NOTE_INT8
                    commands.append(command)
                # Saved arrays are those of the static graph; an engine with a profile has other batches.
                if pipeline.backend.name.startswith("tensorrt") and not pipeline.target.entry.profile:
                    plan = bundle.file(entry.path)
                    rtx = pipeline.backend.name == "tensorrt-rtx"
                    commands.append(for_engine(command, plan, rtx=rtx))
        for value, made in zip(values, exact, strict=True):
            value.update(made)
    return rows, commands


def _rows(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the one row of which an engine with a profile keeps no copy for each of the batch."""
    return array[:1] if shape[:1] == (1,) != array.shape[:1] else array


def _judge(
    pipeline: TextToImage,
    block: BlockEntry,
    which: str,
    entry: EngineEntry,
    inputs: list[Arrays],
    expected: list[Arrays],
    exact: list[Arrays],
) -> BlockRow:
    from qlip_export.runners import EngineRunner, compare, relative

    variant = block.variants[which]
    ports = {port.name: port.shape for port in (*entry.inputs, *entry.outputs)}
    inputs, expected, exact = (
        [{n: _rows(array, ports[n]) for n, array in case.items() if n in ports} for case in cases]
        for cases in (inputs, expected, exact)
    )
    half = pipeline.backend.capabilities.half
    working = "float32" if variant.container is Container.FLOAT else half
    # A CPU without fast 16-bit arithmetic computes these containers in FP32, on values stored in FP16.
    tolerance = TOLERANCES.get((variant.container, working), TOLERANCES[Container.INT8, "float16"])
    found = EngineRunner(pipeline.backend, pipeline.bundle.file(entry.path), entry)(inputs)
    outputs = compare(found, expected)
    moved = [relative(a[name], b[name]) for a, b in zip(found, exact, strict=True) for name in a]
    error = np.inf if outputs is None else max(output.error for output in outputs)
    wrong = entry.facts.wrong if entry.facts is not None else {}
    return BlockRow(
        block=block.name,
        bits=variant.bits,
        variant=which,
        reference="the quantized graph" if variant.container is Container.INT8 else "the FP32 graph",
        error=error,
        cosine=0.0 if outputs is None else min(output.cosine for output in outputs),
        outputs=tuple(outputs or ()),
        tolerance=tolerance,
        from_float32=np.inf if outputs is None else max(moved),
        finite=outputs is not None,
        wrong=wrong,
        passed=error <= tolerance and not wrong,
    )


def _compare_policy(pipeline: TextToImage, prompt: str, seed: int) -> PolicyRow | None:
    bundle, policy = pipeline.bundle, pipeline.bundle.manifest.policy
    if policy is None:
        return None
    from qlip_export.runners import Graph

    size = bundle.manifest.shapes.batch_size
    encoder = bundle.manifest.text_encoder(bundle.manifest.quality_encoder)
    ids = PromptTokenizer(bundle, encoder.tokenizer)([prompt] * bundle.manifest.guidance.rows * size).ids
    encoded: Arrays = {"input_ids": ids}
    for part in encoder.graphs:
        encoded |= Graph(bundle.file(part))([encoded])[0]
    (graph,) = Graph(bundle.file(policy.onnx))([{"pooled": encoded["pooled"][:size]}])
    expected = float(graph["quality"][0])
    decided = [[choice.at(expected) for choice in row] for row in policy.table.choices]
    follows_table = bool((graph["bits"][0] == decided).all())
    try:
        q: float | None = pipeline(prompt, seed=seed).records[0]["q"]
    except NotFiniteError:
        q = None  # the block that overflows is named by its own row
    error = None if q is None else abs(q - expected)
    return PolicyRow(
        q=q,
        error=error,
        tolerance=QUALITY_TOLERANCE,
        follows_table=follows_table,
        passed=follows_table and error is not None and error <= QUALITY_TOLERANCE,
    )


def _compare_images(
    pipeline: TextToImage, prompt: str, seed: int, model: str | None, progress: Progress
) -> tuple[list[ImageRow], list[str]]:
    bundle = pipeline.bundle
    if any(find_spec(name) is None for name in ("torch", "diffusers")):
        return [], [
            "images were NOT compared: diffusers is not installed (pip install 'qlip-export[export]')"
        ]
    try:
        _, checkpoint = model_of(bundle.manifest.model, model)
    except QlipError as error:
        if model is not None:
            raise
        return [], [f"images were NOT compared: {error.problem}; name the model with --model"]
    manifest = bundle.manifest
    guidance, steps = bundle.guidance(), manifest.sampler.requested_steps
    progress.stage("image", len(bundle.uniform) * steps or 1)
    progress.detail("loading diffusers")
    from qlip_export.reference import psnr, reference_image, reference_pipeline

    noise = seeded_noise(seed, manifest.shapes.latents[1:])[None]
    rows = []
    if not bundle.uniform:
        progress.item("the policy's bits")
        rows.append(_compare_policy_image(pipeline, checkpoint, prompt, noise, guidance))
    for bits in bundle.uniform:
        reference = reference_pipeline(bundle, checkpoint, bits=bits)
        told = f"{bits} bits, in diffusers"
        expected = reference_image(
            reference,
            prompt,
            noise,
            steps=steps,
            guidance=guidance,
            on_step=lambda told=told: progress.item(told),  # type: ignore[misc]
        )
        try:
            image = pipeline(prompt, latents=noise, guidance=guidance, bits=bits).images[0]
            found: float | None = psnr(image, expected)
        except NotFiniteError:
            found = None
        least = LEAST_PSNR.get(container_of(bits))
        rounding = f" and activations rounded to {bits} bits" if bits <= 8 else ""
        rows.append(
            ImageRow(
                bits=bits,
                reference=f"diffusers in FP32 with {manifest.quantization.weight_bits}-bit weights{rounding}",
                psnr=None if found is None else min(found, 100.0),
                least=least,
                passed=found is not None and (least is None or found >= least),
            )
        )
    return rows, []


def _compare_policy_image(
    pipeline: TextToImage, checkpoint: Checkpoint, prompt: str, noise: NDArray[np.float32], guidance: float
) -> ImageRow:
    """Compare the image at the policy's bits with that of the fake-quantized model at the same bits."""
    from PIL import Image

    from qlip_export.reference import psnr
    from qlip_export.renderers import POLICY, SimulatorRenderer

    drawn = SimulatorRenderer(pipeline.bundle, checkpoint, "cpu").draw(POLICY, [prompt], noise, guidance)
    expected = Image.fromarray(next(drawn)[0][0].numpy())
    try:
        found: float | None = psnr(pipeline(prompt, latents=noise, guidance=guidance).images[0], expected)
    except NotFiniteError:
        found = None
    return ImageRow(
        bits=None,
        reference="the fake-quantized model at the policy's bits",
        psnr=None if found is None else min(found, 100.0),
        least=None,
        passed=found is not None,
    )
