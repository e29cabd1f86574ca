"""Checkpoints: sharding, replacing, and training that goes on exactly where it stopped."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from torch import nn

from tools.emoji import checkpoint
from tools.emoji.loop import Plan, Trainer, train
from tools.emoji.ranks import Ranks

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))
PLAN = Plan(stage="toy", learning_rate=1e-2, warmup_steps=2, steps=8, log_steps=100)


class Regress(nn.Module):
    """A linear map whose objective is its squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(3, 2)

    def forward(self, inputs, wanted):
        return (self.map(inputs) - wanted).square().mean()


def draw(generator):
    inputs = torch.randn(16, 3, generator=generator)
    return inputs, inputs[:, :2] * 2 + 1


def run(folder: Path, plan: Plan) -> tuple[Trainer, list[dict]]:
    handed: list[dict] = []
    trainer = Trainer(plan, Regress(), folder, ALONE)
    train(trainer, draw, lambda average, state: handed.append({k: v.clone() for k, v in average.items()}))
    return trainer, handed


def test_shards_stay_under_their_limit_and_come_back_whole(tmp_path):
    tensors = {f"layer.{number}": torch.randn(64, 3) for number in range(10)}
    checkpoint.write(tmp_path / "whole", tensors, {"note": 3}, limit=2000)
    files = list((tmp_path / "whole").glob("shard-*.safetensors"))
    assert len(files) == 5
    found, state = checkpoint.read(tmp_path / "whole")
    assert state == {"note": 3} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_tensor_over_the_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at most 100 bytes, found big with 400"):
        checkpoint.write(tmp_path / "folder", {"big": torch.zeros(100)}, {}, limit=100)


def test_the_shipped_limit_is_under_16_mib():
    assert checkpoint.SHARD_BYTES < 16 * 2**20


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.write(tmp_path / "step", {"a": torch.ones(2)}, {"step": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path / "step", {"a": torch.zeros(2)}, {"step": 2})
    found, state = checkpoint.read(tmp_path / "step")
    assert state == {"step": 1} and torch.equal(found["a"], torch.ones(2))


def test_only_the_newest_whole_steps_are_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.write_step(tmp_path, step, {"a": torch.tensor([float(step)])}, {})
    (tmp_path / "step-0000009.partial").mkdir()
    assert [path.name for path in checkpoint.whole_steps(tmp_path)] == ["step-0000002", "step-0000003"]
    latest = checkpoint.read_latest(tmp_path)
    assert latest is not None and latest[1]["step"] == 3
    assert checkpoint.read_latest(tmp_path / "nothing") is None


def test_training_resumes_exactly(tmp_path):
    whole, handed_whole = run(tmp_path / "whole", PLAN)
    stopped, _ = run(tmp_path / "parts", replace(PLAN, stop_after=3))
    assert stopped.step == 3
    resumed, handed_resumed = run(tmp_path / "parts", PLAN)
    assert whole.step == resumed.step == 8
    for name, parameter in whole.named.items():
        assert torch.equal(parameter, resumed.named[name])
        assert torch.equal(handed_whole[-1][name], handed_resumed[-1][name])


def test_a_plan_that_is_over_trains_no_further(tmp_path):
    done, _ = run(tmp_path, PLAN)
    again, handed = run(tmp_path, PLAN)
    assert again.step == done.step == 8 and handed == []


def test_the_rate_warms_up_and_falls_to_zero():
    assert PLAN.rate(0, 0.0) == pytest.approx(0.5e-2)
    assert PLAN.rate(5, 0.0) == pytest.approx(1e-2)
    assert PLAN.rate(7, 1.0) == pytest.approx(0.0)
    assert replace(PLAN, steps=None, minutes=2.0).progress(5, 60.0) == pytest.approx(0.5)


def test_a_plan_needs_one_measure_of_length():
    with pytest.raises(ValueError, match="expected either steps or minutes"):
        replace(PLAN, minutes=1.0)
