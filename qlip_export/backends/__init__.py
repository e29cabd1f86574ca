"""Backends by name. The table is all there is: a vendor library is imported only when its name is chosen."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, NamedTuple

from qlip_export.backends.heap import share_one_heap
from qlip_export.errors import QlipError

if TYPE_CHECKING:
    from qlip_export.backends.base import Backend


class Source(NamedTuple):
    """Where a backend is, the library that it needs, the extra that installs it if not its name."""

    module: str
    class_name: str
    library: str
    extra: str | None = None


BACKENDS: dict[str, Source] = {
    "tensorrt": Source("qlip_export.backends.tensorrt", "TensorRtBackend", "tensorrt"),
    "tensorrt-rtx": Source("qlip_export.backends.tensorrt_rtx", "TensorRtRtxBackend", "tensorrt_rtx"),
    "onnxruntime-cuda": Source(
        "qlip_export.backends.onnxruntime_cuda", "OnnxRuntimeCudaBackend", "onnxruntime", "onnxruntime-gpu"
    ),
    "openvino": Source("qlip_export.backends.openvino", "OpenVINOBackend", "openvino"),
    "onnxruntime": Source("qlip_export.backends.onnxruntime", "OnnxRuntimeBackend", "onnxruntime"),
}
"""Backends by name, in the order in which they are preferred where nobody chooses."""


def is_installed(library: str) -> bool:
    """Return whether a library can be imported; a folder of type stubs alone is no library."""
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None


def get_backend(name: str, *, threads: int | None = None) -> Backend:
    """Return the backend called ``name``, or for ``auto`` the first whose library and device are here.

    Args:
        name: A key of ``BACKENDS`` or ``auto``.
        threads: CPU threads an engine may use; ``None`` leaves the choice to the library.

    Raises:
        QlipError: Unknown name, or the library is not installed.
    """
    backend: Backend
    if name == "auto":
        for candidate, source in BACKENDS.items():
            if not is_installed(source.library):
                continue
            try:
                backend = get_backend(candidate, threads=threads)
                backend.require_device()
            except QlipError:  # another may run; if none does, the error below names all of them
                continue
            return backend
        raise QlipError(
            "no backend can run here",
            expected=" or ".join(BACKENDS),
            fix='pip install "qlip-export[openvino]"',
        )
    if name not in BACKENDS:
        raise QlipError(
            f"unknown backend {name!r}",
            expected=", ".join(["auto", *BACKENDS]),
            found=name,
            fix="choose one of them",
        )
    found = BACKENDS[name]
    try:
        if not is_installed(found.library):
            raise ImportError(f"No module named {found.library!r}")
        share_one_heap()  # before the library starts its first thread
        backend = getattr(importlib.import_module(found.module), found.class_name)(threads=threads)
    except ImportError as error:
        raise QlipError(
            f"the library of backend {name!r} is not installed",
            found=str(error),
            fix=f'pip install "qlip-export[{found.extra or name}]"',
        ) from error
    return backend
