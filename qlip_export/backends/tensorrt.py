"""TensorRT 10 and 11: compiles for the GPU of the machine it runs on. Held to its types, never run by us."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import tensorrt

from qlip_export.backends import tensorrt_builder as shared
from qlip_export.backends.base import Capabilities
from qlip_export.backends.tensorrt_family import TensorRtFamily, check_fit
from qlip_export.compiled import TargetEntry
from qlip_export.errors import QlipError
from qlip_export.spec import Container


class TensorRtBackend(TensorRtFamily):
    """Engines for this GPU, or with `--hardware-compat` for its relatives."""

    name = "tensorrt"
    title = "TensorRT"
    lacks: ClassVar = {"target": "it compiles for the GPU of the machine that it runs on"}

    @property
    def library(self) -> shared.Library:
        """See `TensorRtFamily.library`."""
        return tensorrt

    @property
    def capabilities(self) -> Capabilities:
        """The GPU of this machine.

        Raises:
            QlipError: There is none.
        """
        return Capabilities(
            device=self._gpu,
            version=tensorrt.__version__,
            half="float16",
            suffix=".plan",
            containers=(Container.FLOAT, Container.HALF, Container.INT8),
            options={"strongly_typed": True, "tf32": False, **self.options.identity},
            overhead=1_000_000,
            packs_int4=True,
        )

    @cached_property
    def _gpu(self) -> str:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise QlipError(
                "asking for the GPU takes cuda-bindings",
                found=str(error),
                fix='pip install "qlip-export[tensorrt]"',
            ) from error
        status, properties = runtime.cudaGetDeviceProperties(0)
        if status != runtime.cudaError_t.cudaSuccess:
            raise QlipError(
                "TensorRT compiles on the GPU that its engines run on; none is here",
                expected="an NVIDIA GPU and its driver",
                found=status.name,
                fix="compile on the device; --backend tensorrt-rtx compiles without a GPU",
            )
        name = properties.name.split(b"\0")[0].decode()
        return f"{name}, compute capability {properties.major}.{properties.minor}"

    def check_target(self, target: TargetEntry, rebuild: str) -> None:
        """See `Backend.check_target`."""
        super().check_target(target, rebuild)
        check_fit(target, tensorrt.__version__, self._gpu, rebuild)
