"""Recording GPU work as a CUDA graph: many small kernels take longer to launch than to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

WARM_UP_RUNS = 3
"""Runs before the recording: libraries choose and compile their kernels in them."""


def recorded(work: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Return ``work``, recorded if ``device`` is a GPU.

    Args:
        work: Reads and writes tensors that stay where they are, and never waits for the GPU. A GPU runs it
            `WARM_UP_RUNS` times now.
        device: Where the tensors are.

    Returns:
        What to call instead of ``work``. On a GPU every call returns the very same tensors, written anew.
    """
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Result:
        graph.replay()
        return result

    return replay
