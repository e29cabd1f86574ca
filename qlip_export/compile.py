"""From typed ONNX to engines of one backend, as one target of a bundle. Needs no torch and no model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pydantic import Field, JsonValue

from qlip_export.backends import get_backend
from qlip_export.backends.base import Backend, Capabilities
from qlip_export.backends.memory import available_memory_bytes
from qlip_export.backends.options import CompileOptions
from qlip_export.bundle import Bundle
from qlip_export.compiled import Compiled, EngineEntry, TargetEntry, TimingEntry
from qlip_export.errors import QlipError
from qlip_export.files import content_key, sha256_of
from qlip_export.manifest import Manifest
from qlip_export.profiles import ProfilePlan, key_of, plan_profile
from qlip_export.progress import Progress
from qlip_export.spec import Container, Frozen, container_of
from qlip_export.workspace import Workspace

MEMORY_BASE = 300_000_000
"""Bytes of a process that has loaded a compiler."""
MEMORY_WEIGHT = 13
"""Bytes for each weight of an engine while it is made; fitted to OpenVINO and BK-SDM-Tiny, as in `plan`."""


class CompileReport(Frozen):
    """What `qlip-export compile` did, as `--json` prints it."""

    bundle: str
    target: str
    backend: str
    device: str
    engines: int
    built: int = Field(description="engines made by this run")
    reused: int = Field(description="engines that were there already")
    bytes: int = Field(description="of all engines of the target")
    seconds: float
    timing: TimingEntry | None = Field(
        default=None, description="none: not timed, or the engines do not run here"
    )


class Preflight(Frozen):
    """What a compilation is about to do."""

    backend: str
    device: str
    missing: tuple[str, ...] = Field(description="ONNX files without an engine")
    there: int = Field(description="engines that are there already")
    need: int = Field(description="bytes of disk, roughly: the new engines and the largest one once more")
    free: int = Field(description="bytes of disk")
    memory: int = Field(description="bytes of memory at the peak, roughly, while the largest engine is made")
    available: int | None = Field(description="bytes of memory; none where the system does not tell")


def compile_bundle(
    path: Path, backend: str, progress: Progress, options: CompileOptions | None = None
) -> CompileReport:
    """Add engines of ``backend`` to the bundle ``path``, or bring them up to date; other targets stay.

    Raises:
        QlipError: No bundle, an altered ONNX file, no such backend, or one that refuses an option or a graph.
    """
    started = time.monotonic()
    if find_spec("onnx_ir") is None:
        raise QlipError("compiling reads ONNX files", fix='pip install "qlip-export[compile]"')
    compiler = get_backend(backend)
    compiler.prepare(options or CompileOptions(), progress)
    wait = f"another build is writing {path}; waiting for it"
    with Workspace.open_target(path, compiler.name, lambda: progress.note(wait)) as workspace:
        bundle = Bundle.open(workspace.out)

        @cache
        def check_weights() -> None:
            for file in bundle.manifest.files:
                if file.endswith(".weights.bin"):
                    bundle.file(file)

        def checked(onnx: str) -> Path:
            check_weights()
            return bundle.file(onnx)

        profile = (options or CompileOptions()).profile
        plan = plan_profile(bundle.manifest, profile, bundle.file) if profile else None
        target = compile_target(bundle.manifest, compiler, checked, workspace, progress, plan)
        before = bundle.manifest.targets.get(compiler.name)
        if before is not None and before.engines == target.engines and not workspace.built:
            # All new or none: times are those of one run on one machine.
            target = target.model_copy(update={"timing": before.timing})
        bundle = workspace.add_target(bundle.manifest, compiler.name, target)
    return CompileReport(
        bundle=str(path),
        target=compiler.name,
        backend=compiler.name,
        device=target.device,
        engines=len(target.engines),
        built=workspace.built,
        reused=workspace.reused,
        bytes=sum(bundle.manifest.files[engine.path].size for engine in target.engines.values()),
        seconds=round(time.monotonic() - started, 1),
        timing=target.timing,
    )


def compile_target(
    manifest: Manifest,
    backend: Backend,
    source: Callable[[str], Path],
    workspace: Workspace,
    progress: Progress,
    plan: ProfilePlan | None = None,
) -> TargetEntry:
    """Compile every ONNX file that has to be, and return the target.

    Args:
        manifest: Of the bundle; its targets are not looked at.
        backend: What compiles.
        source: Returns the file behind an ONNX path of the manifest.
        workspace: Gets the engines.
        progress: Display.
        plan: Makes engines of the first size's graphs that run other sizes, too.

    Raises:
        QlipError: The disk cannot hold the engines, or the backend refuses a graph.
    """
    can = backend.capabilities
    if plan is not None:
        manifest = manifest.sizes[0]
        told = "; ".join(f"{axis} {held.told}" for axis, held in plan.profile.items())
        progress.note(f"one set of engines for {told}")
    jobs = {onnx: f"engines/{backend.name}/{Path(onnx).stem}{can.suffix}" for onnx in manifest.containers}
    code = [sha256_of(path) for path in backend.sources]
    compiler = content_key("engine", backend.name, can.version, can.device, can.half, can.options, code)
    # The key of an ONNX file covers its weights as well, which its own bytes do not.
    varying = _varying(plan)
    keys = {o: content_key(compiler, manifest.files[o].key, *(varying[o] if varying else ())) for o in jobs}
    missing = tuple(onnx for onnx in jobs if not workspace.has(jobs[onnx], keys[onnx]))
    check_preflight(preflight(manifest, backend, missing, workspace.out.parent, source), progress)
    progress.stage("compile", len(jobs))
    engines = {}
    for onnx, container in manifest.containers.items():
        progress.item(Path(onnx).stem)

        def make(engine: Path, onnx: str = onnx, container: Container = container) -> JsonValue:
            try:
                file = source(onnx)
                compiled = (
                    backend.compile(file, engine, container)
                    if plan is None
                    else backend.compile_ranging(file, engine, container, plan.engines[onnx])
                )
            except MemoryError as error:
                raise QlipError(
                    f"memory ran out while {backend.name} compiled {Path(onnx).name}",
                    found=str(error) or None,
                    fix="free memory and run the same command again; what is finished is kept",
                ) from error
            entry = EngineEntry(path=jobs[onnx], container=container, **dict(compiled))
            compiled = compiled.model_copy(update={"memory": backend.measure(engine, entry)})
            made: JsonValue = compiled.model_dump(mode="json")
            return made

        _, made = workspace.product(jobs[onnx], keys[onnx], make)
        facts = Compiled.model_validate(made)
        engines[onnx] = EngineEntry(path=jobs[onnx], container=container, **dict(facts))
    return TargetEntry(
        backend=backend.name,
        version=can.version,
        device=can.device,
        half=can.half,
        options=dict(can.options),
        engines=engines,
        profile=plan.profile if plan is not None else {},
    )


def _varying(plan: ProfilePlan | None) -> dict[str, list[JsonValue]]:
    """Return what a profile adds to the key of each engine: what it makes of the graph, and by which code."""
    if plan is None:
        return {}
    code: JsonValue = [
        sha256_of(Path(__file__).parent / "graph" / name) for name in ("dynamic.py", "propagate.py")
    ]
    return {onnx: [key_of(shapes), code] for onnx, shapes in plan.engines.items()}


def preflight(
    manifest: Manifest,
    backend: Backend,
    missing: tuple[str, ...],
    folder: Path,
    source: Callable[[str], Path],
) -> Preflight:
    """Return what compiling ``missing`` takes; ``folder`` is on the disk that the bundle is on."""
    can = backend.capabilities
    weights = {onnx: _weights(manifest, onnx, source) for onnx in missing}
    sizes = [_engine_bytes(manifest, onnx, can, weights[onnx]) for onnx in missing]
    return Preflight(
        backend=backend.name,
        device=can.device,
        missing=missing,
        there=len(manifest.containers) - len(missing),
        need=sum(sizes) + max(sizes, default=0),
        free=shutil.disk_usage(folder).free,
        memory=MEMORY_BASE + MEMORY_WEIGHT * max(weights.values(), default=0),
        available=available_memory_bytes(),
    )


def check_preflight(found: Preflight, progress: Progress) -> None:
    """Show a preflight.

    Raises:
        QlipError: The disk cannot hold the engines, or the memory their making.
    """
    need, free = f"{found.need / 1e6:,.0f} MB", f"{found.free / 1e6:,.0f} MB"
    memory, available = (f"{(size or 0) / 1e6:,.0f} MB" for size in (found.memory, found.available))
    if found.need > found.free:
        raise QlipError(
            f"the disk cannot hold {len(found.missing)} engines of {found.backend}",
            expected=f"about {need}",
            found=f"{free} free",
            fix="free space and run the same command again",
        )
    if found.missing and found.available is not None and found.memory > found.available:
        raise QlipError(
            f"memory cannot hold the compilation of the largest engine of {found.backend}",
            expected=f"about {memory}",
            found=f"{available} available",
            fix="free memory, or export the model in smaller blocks (--blocks fine)",
        )
    engines = f"{len(found.missing)} engines to build, {found.there} there"
    room = f"; they take roughly {need} of disk, {free} are free" if found.missing else ""
    if found.missing and found.available is not None:
        room += f", and up to {memory} of memory, {available} are available"
    progress.note(f"{found.backend} for {found.device}: {engines}{room}")


def _weights(manifest: Manifest, onnx: str, source: Callable[[str], Path]) -> int:
    """Return how many weights the engine of an ONNX file has, in whatever type they are stored."""
    for block in (block for size in manifest.sizes for block in size.blocks):
        if any(variant.onnx == onnx for variant in block.variants.values()):
            return sum(layer.weights for layer in block.layers)
    import onnx_ir as ir

    constants = [value.const_value for value in ir.load(source(onnx)).graph.initializers.values()]
    return sum(int(constant.size) for constant in constants if isinstance(constant, ir.ExternalTensor))


def _engine_bytes(manifest: Manifest, onnx: str, can: Capabilities, weights: int) -> int:
    """Return roughly what the engine of an ONNX file takes."""
    for block in (block for size in manifest.sizes for block in size.blocks):
        for name, variant in block.variants.items():
            if variant.onnx == onnx:
                bits = iter(block.layer_bits(name))
                wide = Container.FLOAT if variant.container is Container.FLOAT else Container.HALF
                layers = [(e, container_of(next(bits)) if e.quantized else wide) for e in block.layers]
                size = can.engine_bytes(layers, manifest.quantization.weight_bits)
                return manifest.files[onnx].size + size
    # Text encoders, VAE and policy compute in FP32, whatever their weights are stored in.
    return can.overhead + manifest.files[onnx].size + weights * Container.FLOAT.nbytes
