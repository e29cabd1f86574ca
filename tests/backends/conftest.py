"""The emoji model compiled by TensorRT-RTX, once for all workers. Its engines are built, never executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends.stand_in_cuda import StandInRuntime
from tests.conftest import Shared


@pytest.fixture
def rtx() -> Any:
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "qlip-export[tensorrt-rtx]"')
    from qlip_export.backends import get_backend

    return get_backend("tensorrt-rtx")


@pytest.fixture(scope="session")
def emoji_rtx(shared: Shared) -> Path:
    """The emoji model at 8, 16 and 32 bits with 4-bit weights and its policy: 28 engines."""
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "qlip-export[tensorrt-rtx]"')

    def make(out: Path) -> None:
        from qlip_export.build import BuildOptions, export_bundle
        from qlip_export.compile import compile_bundle
        from qlip_export.progress import Silent

        export_bundle(BuildOptions(model="emoji"), out, Silent())
        compile_bundle(out, "tensorrt-rtx", Silent())

    return shared("emoji-rtx", make)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandInRuntime:
    from qlip_export.backends import cuda

    runtime = StandInRuntime()
    monkeypatch.setattr(cuda, "runtime", runtime)

    def cast(self: Any, source: Any, target: Any) -> None:
        def work() -> None:
            values = np.frombuffer(runtime.blocks[source.pointer], source.dtype, source.count)
            np.frombuffer(runtime.blocks[target.pointer], target.dtype, target.count)[:] = values

        runtime.do(work)

    monkeypatch.setattr(cuda.Gpu, "cast", cast)
    return runtime
