"""What a choice costs in time: the block's time, shared among its layers by their work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlip_export.bundle import Bundle
from qlip_export.calibrate.latency import Latencies, latency_costs, measure_latencies
from qlip_export.errors import QlipError
from tests.tiny import BLOCKS

LAYERS = {
    "down.conv": ("down", "down.conv", 300),
    "down.linear": ("down", "down.linear", 100),
    "up.conv": ("up", "up.conv", 50),
}
BY_BLOCK = {name: (block, block, macs) for name, (block, _, macs) in LAYERS.items()}
TIMES = {"down": {8: 2.0, 16: 4.0, 32: 8.0}, "up": {8: 1.0, 16: 0.5, 32: 3.0}}


def write(path: Path, milliseconds: dict[str, dict[int, float]] | None = None) -> Path:
    found = Latencies(
        backend="openvino",
        version="0",
        device="CPU",
        fingerprint="a" * 64,
        latents=(1, 4, 8, 8),
        milliseconds=TIMES if milliseconds is None else milliseconds,
    )
    path.write_text(found.model_dump_json(), encoding="utf-8")
    return path


def costs(path: Path, **changes: Any) -> list[list[float]]:
    arguments: dict[str, Any] = {
        "path": path,
        "options": (8, 16, 32),
        "layers": LAYERS,
        "units": tuple(LAYERS),
        "fingerprint": "a" * 64,
    }
    found: list[list[float]] = latency_costs(**arguments | changes).tolist()
    return found


def test_layers_share_the_time_of_their_block(tmp_path: Path) -> None:
    """Three quarters of the work, three quarters of the time; the cheapest option is free."""
    assert costs(write(tmp_path / "l.json")) == [[0, 1.5, 4.5], [0, 0.5, 1.5], [0.5, 0, 2.5]]


def test_blocks_cost_their_time(tmp_path: Path) -> None:
    found = costs(write(tmp_path / "l.json"), layers=BY_BLOCK, units=("up", "down"), options=(8, 32))
    assert found == [[0, 2], [0, 6]]


def test_option_or_block_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "l.json", {"down": {8: 1.0, 16: 2.0}, "up": TIMES["up"]})
    with pytest.raises(QlipError, match="no time of block down at 32 bits") as caught:
        costs(path)
    assert "8, 16 for down" in str(caught.value.found)
    path = write(tmp_path / "l.json", {"down": TIMES["down"]})
    with pytest.raises(QlipError, match="no time of block up at 8 bits"):
        costs(path)


def test_times_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QlipError, match="are those of another model"):
        costs(write(tmp_path / "l.json"), fingerprint="b" * 64)


@pytest.mark.parametrize("text", [None, "", "{}", '{"milliseconds": 3}'])
def test_without_times_there_is_no_cost(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "l.json").write_text(text)
    with pytest.raises(QlipError, match="the latency cost needs measured times") as caught:
        costs(tmp_path / "l.json")
    assert "--bundle" in str(caught.value.fix)


def test_every_engine_of_a_bundle_is_timed(bundle: Path, tmp_path: Path) -> None:
    found = measure_latencies(bundle, tmp_path / "new" / "latency.json")
    manifest = Bundle.open(bundle).manifest
    assert found.fingerprint == manifest.model.fingerprint
    assert tuple(found.milliseconds) == BLOCKS
    for times in found.milliseconds.values():
        assert tuple(times) == manifest.bits == (8, 16, 32)
        assert all(milliseconds > 0 for milliseconds in times.values())
    assert (tmp_path / "new" / "latency.json").read_text() == found.model_dump_json(indent=1) + "\n"
