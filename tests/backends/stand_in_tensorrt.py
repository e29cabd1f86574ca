"""A stand-in for TensorRT at run time: its engines are ONNX files, run by ONNX Runtime on host memory.

It answers as the library does (nothing or `False` where that fails) and refuses what that refuses: a tensor
without an address, another shape than the engine's, one outside of its profile or one that varies and was not
given, less scratch memory than the engine asked for. A profile stands in the ONNX file's metadata.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.backends.stand_in_cuda import StandInRuntime

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"


class TensorIOMode(Enum):
    INPUT, OUTPUT = 0, 1


def stand_in(cuda: StandInRuntime) -> Any:
    """Return the module."""

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            try:
                return Engine(cuda, plan)
            except Exception:
                self.log.log(ILogger.ERROR, "Error Code 1: Serialization (no engine)")
                return None

    return SimpleNamespace(
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )


class Engine:
    def __init__(self, cuda: StandInRuntime, plan: bytes) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        self.cuda = cuda
        self.inputs = {port.name: port for port in self.session.get_inputs()}
        self.outputs = {port.name: port for port in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        told = self.session.get_modelmeta().custom_metadata_map.get("profile", "{}")
        self.profile: dict[str, tuple[list[int], list[int]]] = json.loads(told)
        self.num_io_tensors = len(self.names)
        self.device_memory_size_v2 = len(plan)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user managed"
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] = (0, 0)
        self.shapes = {
            name: tuple(port.shape) for name, port in engine.inputs.items() if name not in engine.profile
        }

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self.engine.profile:
            return self.shapes[name] == shape
        low, high = self.engine.profile[name]
        fits = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        if fits:
            self.shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def set_device_memory(self, address: int, size: int) -> None:
        assert address in self.engine.cuda.blocks, "scratch memory that was freed"
        self.memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        if self.memory[1] < self.engine.device_memory_size_v2 or len(self.addresses) < len(self.engine.names):
            return False
        if self.shapes.keys() != self.engine.inputs.keys():
            return False
        self.engine.cuda.do(self.compute)
        return True

    def compute(self) -> None:
        engine = self.engine
        assert self.memory[0] in engine.cuda.blocks, "scratch memory that was freed"
        feeds = {name: self.tensor(name, port, self.shapes[name]) for name, port in engine.inputs.items()}
        results = engine.session.run(list(engine.outputs), feeds)
        for (name, port), result in zip(engine.outputs.items(), results, strict=True):
            self.tensor(name, port, result.shape)[:] = result

    def tensor(self, name: str, port: Any, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(NUMPY[port.type])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)
