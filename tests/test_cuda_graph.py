"""Recorded work: as it was on a CPU, replayed on a GPU."""

from __future__ import annotations

import pytest
import torch

from qlip_export.cuda_graph import recorded


def test_a_cpu_runs_the_work_itself() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)

    assert recorded(work, torch.device("cpu")) is work
    assert not calls


@pytest.mark.gpu
def test_a_gpu_replays_it_with_what_its_inputs_hold() -> None:
    device = torch.device("cuda")
    weight = torch.ones(4, device=device, requires_grad=True)
    values = torch.zeros(4, device=device)

    def work() -> torch.Tensor:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.zero_()
        loss = (weight * values).square().sum()
        loss.backward()
        return loss.detach()

    run = recorded(work, device)
    results = []
    for value in (1.0, 2.0):
        values.fill_(value)
        results.append(run())
        assert results[-1].item() == 4 * value**2
        assert weight.grad is not None
        assert weight.grad.tolist() == [2 * value**2] * 4
    assert results[0] is results[1]
