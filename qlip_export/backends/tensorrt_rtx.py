"""TensorRT-RTX: compiles for NVIDIA GPUs of several architectures on any machine, with or without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import tensorrt_rtx

from qlip_export.backends import tensorrt_builder as shared
from qlip_export.backends.base import Capabilities
from qlip_export.backends.options import CompileOptions
from qlip_export.backends.tensorrt_family import TensorRtFamily
from qlip_export.compiled import EngineFacts, TargetEntry
from qlip_export.errors import QlipError
from qlip_export.progress import Progress
from qlip_export.spec import Asked, Container

if TYPE_CHECKING:
    import tensorrt

GPUS = {
    "sm80": "8.0 (A100)",
    "sm86": "8.6 (RTX 30)",
    "sm89": "8.9 (RTX 40)",
    "sm120": "12.0 (RTX 50)",
    "sm121": "12.1 (DGX Spark)",
}
"""What `--target` takes, and the compute capability that it stands for.

The library also knows sm75, but no FP32 products on it, which the timestep embedding takes.
"""


DIAGNOSES = {
    "VERSION_MISMATCH": "another version of TensorRT-RTX made it",
    "UNSUPPORTED_CC": "it was not compiled for this GPU",
    "OLD_CUDA_DRIVER": "the driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "MALFORMED_ENGINE": "it is no engine of TensorRT-RTX, or a damaged one",
    "CUDA_ERROR": "CUDA reports an error",
}
"""What the library's diagnoses of an engine mean."""


class TensorRtRtxBackend(TensorRtFamily):
    """Engines for all GPUs that the library builds for, or for those that `--target` names."""

    name = "tensorrt-rtx"
    title = "TensorRT-RTX"
    lacks: ClassVar = {
        "hardware_compat": "its engines run on every GPU that they were compiled for; --target names them",
        "timing_cache": "timing caches do nothing in TensorRT-RTX",
        "version_compat": "the library that loads such engines is not part of TensorRT-RTX",
    }

    @property
    def library(self) -> shared.Library:
        """See `TensorRtFamily.library`."""
        library: shared.Library = tensorrt_rtx
        return library

    @property
    def capabilities(self) -> Capabilities:
        """The GPUs that engines are made for; none is asked."""
        gpus = " and ".join(GPUS[name] for name in self.options.target)
        return Capabilities(
            device=f"NVIDIA GPUs of compute capability {gpus or '8.0, 8.6, 8.9 and 12.x'}",
            version=tensorrt_rtx.__version__,
            half="float16",
            suffix=".plan",
            containers=(Container.FLOAT, Container.HALF, Container.INT8),
            options={"strongly_typed": True, "tf32": False, **self.options.identity},
            overhead=5_000_000,  # kernels for every GPU
            packs_int4=True,
        )

    def prepare(self, options: CompileOptions, progress: Progress) -> None:
        """See `Backend.prepare`."""
        if unknown := sorted(set(options.target) - GPUS.keys()):
            raise QlipError(
                f"TensorRT-RTX builds for no GPU called {unknown[0]}",
                expected=", ".join(f"{name}: {what}" for name, what in GPUS.items()),
                found=", ".join(unknown),
                fix="for other GPUs: --backend tensorrt, on the device itself",
            )
        super().prepare(options, progress)

    def check_target(self, target: TargetEntry, rebuild: str) -> None:
        """See `Backend.check_target`: were they compiled for this GPU? Versions are told by each engine."""
        super().check_target(target, rebuild)
        major, minor = self.gpu.capability
        named = target.options.get("target") or [*GPUS, f"sm12{minor}"]
        if f"sm{major}{minor}" not in (named if isinstance(named, list) else []):
            raise QlipError(
                "the engines were not compiled for this GPU",
                expected=target.device,
                found=f"{self.gpu.name}, compute capability {major}.{minor}",
                fix=rebuild if f"sm{major}{minor}" in GPUS else "compile here with --backend tensorrt",
            )

    def check_plan(self, path: Path, plan: bytes) -> None:
        """See `TensorRtRuntime.check_plan`: the library's own diagnosis."""
        against, told = diagnose(plan)
        if against:
            raise QlipError(
                f"TensorRT-RTX does not run {path.name} here: "
                + "; ".join(DIAGNOSES.get(name, name) for name in against),
                expected=self._made,
                found=f"TensorRT-RTX {tensorrt_rtx.__version__}: {told}",
                fix=self._rebuild,
            )

    def _facts(
        self, log: tensorrt.ILogger, plan: bytes, asked: Mapping[str, Asked], parsed: EngineFacts
    ) -> EngineFacts:
        if "MALFORMED_ENGINE" in diagnose(plan)[0]:
            raise QlipError(f"{self._version} does not recognise the engine that it has just made")
        return super()._facts(log, plan, asked, parsed)

    def _configure(
        self, trt: shared.Library, config: tensorrt.IBuilderConfig, messages: shared.Messages
    ) -> None:
        super()._configure(trt, config, messages)
        rtx: Any = config  # TensorRT itself has no such list
        if self.options.target:
            rtx.num_compute_capabilities = len(self.options.target)
            for i, name in enumerate(self.options.target):
                rtx.set_compute_capability(getattr(tensorrt_rtx.ComputeCapability, name.upper()), i)


def diagnose(plan: bytes) -> tuple[tuple[str, ...], str]:
    """Return what stands against running an engine here, keys of `DIAGNOSES`, and what else the library says.

    Without a GPU it tells whether the file is an engine, and that there is no GPU.
    """
    messages = shared.Messages()
    runtime = tensorrt_rtx.Runtime(shared.logger(tensorrt_rtx, messages))
    _, bits = runtime.get_engine_validity(plan)
    found = tensorrt_rtx.EngineInvalidityDiagnostics.__members__
    return tuple(name for name, flag in found.items() if bits & flag.value), messages.text
