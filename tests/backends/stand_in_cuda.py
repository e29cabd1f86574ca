"""A stand-in for `cuda.bindings.runtime`: host memory for device memory, work done at once or recorded.

It answers as the bindings do, a status before the values. What libraries launch by themselves it cannot see;
`Stream.do` is how a test launches work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from cuda.bindings import runtime as real

OK = real.cudaError_t.cudaSuccess
Kind = real.cudaGraphNodeType


class Node:
    """A node of a graph: what it does, and what it waits for."""

    def __init__(self, do: Callable[[], Any], kind: Any, before: list[Node]) -> None:
        self.do, self.kind, self.before = do, kind, before

    def __int__(self) -> int:
        return id(self)


class Graph(list[Node]):
    """Nodes in the order in which they were recorded."""

    def __int__(self) -> int:
        return 1

    def run(self) -> None:
        """Do every node after those that it waits for; nodes that nothing orders run backwards."""
        done: list[Node] = []
        while len(done) < len(self):
            ready = [n for n in reversed(self) if n not in done and all(b in done for b in n.before)]
            ready[0].do()
            done.append(ready[0])


class StandInRuntime:
    """Everything of the bindings that `qlip_export.backends.cuda` uses, and a count of what was asked."""

    cudaError_t = real.cudaError_t  # noqa: N815
    cudaMemcpyKind = real.cudaMemcpyKind  # noqa: N815
    cudaGraphNodeType = real.cudaGraphNodeType  # noqa: N815
    cudaStreamCaptureMode = real.cudaStreamCaptureMode  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(self, *, gpus: int = 1, memory: int = 1 << 30, captures: bool = True) -> None:
        self.gpus, self.memory, self.captures = gpus, memory, captures
        self.blocks: dict[int, Any] = {}
        self.recorded: Graph | None = None
        self.graph = Graph()
        self.launches = 0

    def do(self, work: Callable[[], Any], kind: Any = Kind.cudaGraphNodeTypeKernel) -> None:
        """Launch work on the stream."""
        if self.recorded is None:
            work()
        else:
            self.recorded.append(Node(work, kind, self.recorded[-1:]))

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return OK, self.gpus

    def cudaSetDevice(self, index: int) -> Any:  # noqa: N802
        return (OK if index < self.gpus else self.cudaError_t.cudaErrorInvalidDevice,)

    def cudaGetDeviceProperties(self, index: int) -> Any:  # noqa: N802
        name = b"stand-in\0\0"
        return OK, SimpleNamespace(name=name, major=9, minor=0, totalGlobalMem=self.memory)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        return OK, 1

    def cudaStreamSynchronize(self, stream: Any) -> Any:  # noqa: N802
        if self.recorded is not None:
            return (self.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        return (OK,)

    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        if size + sum(len(b) for b in self.blocks.values()) > self.memory:
            return self.cudaError_t.cudaErrorMemoryAllocation, 0
        block = ctypes.create_string_buffer(size)
        pointer = ctypes.addressof(block)
        self.blocks[pointer] = block
        return OK, pointer

    def cudaFree(self, pointer: int) -> Any:  # noqa: N802
        del self.blocks[pointer]
        return (OK,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: Any) -> Any:  # noqa: N802
        self.do(lambda: ctypes.memmove(to, source, size), Kind.cudaGraphNodeTypeMemcpy)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:  # noqa: N802
        self.recorded = Graph()
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> Any:  # noqa: N802
        graph, self.recorded = self.recorded, None
        self.graph = graph or Graph()
        if not self.captures:
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return OK, graph

    def cudaGraphGetNodes(self, graph: Graph, count: int) -> Any:  # noqa: N802
        return OK, list(graph[:count]), len(graph)

    def cudaGraphNodeGetType(self, node: Node) -> Any:  # noqa: N802
        return OK, node.kind

    def cudaGraphMemcpyNodeGetParams(self, node: Node) -> Any:  # noqa: N802
        return OK, SimpleNamespace(kind=self.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Any:  # noqa: N802
        return OK, graph

    def cudaGraphLaunch(self, graph: Graph, stream: Any) -> Any:  # noqa: N802
        self.launches += 1
        graph.run()
        return (OK,)

    def cudaGraphDestroy(self, graph: Graph) -> Any:  # noqa: N802
        return (OK,)

    def cudaGraphExecDestroy(self, graph: Graph) -> Any:  # noqa: N802
        return (OK,)

    def cudaGetLastError(self) -> Any:  # noqa: N802
        return (OK,)

    def cudaGetErrorString(self, status: Any) -> Any:  # noqa: N802
        return OK, str(status.name).encode()

    def cudaGraphNodeGetDependencies(self, node: Node, count: int) -> Any:  # noqa: N802
        return OK, node.before[:count], [], len(node.before)

    def cudaGraphNodeGetDependentNodes(self, node: Node, count: int) -> Any:  # noqa: N802
        after = [n for n in self.graph if node in n.before]
        return OK, after[:count], [], len(after)

    def cudaGraphAddDependencies(self, graph: Graph, first: Any, second: Any, data: Any, n: int) -> Any:  # noqa: N802
        for before, after in zip(first, second, strict=True):
            after.before = [*after.before, before]
        return (OK,)

    def cudaGraphDestroyNode(self, node: Node) -> Any:  # noqa: N802
        self.graph.remove(node)
        for other in self.graph:
            other.before = [n for n in other.before if n is not node]
        return (OK,)
