"""Saved cases are read by the real polygraphy program, and its verdict follows what was saved."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qlip_export.bundle import Bundle
from qlip_export.errors import QlipError
from qlip_export.parity import save_case
from qlip_export.runners import Graph, compare
from qlip_export.spec import Container, variant_name
from tests import tamper
from tests.conftest import Cli

POLYGRAPHY = Path(sys.executable).with_name("polygraphy")


def polygraphy(command: str) -> subprocess.CompletedProcess[str]:
    """Run a printed command as a user would paste it."""
    program, *arguments = shlex.split(command)
    assert program == "polygraphy"
    return subprocess.run([POLYGRAPHY, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_polygraphy_judges_a_saved_case(bundle: Path, tmp_path: Path, off: float) -> None:
    opened = Bundle.open(bundle)
    block = next(b for b in opened.manifest.blocks if b.name == "down_blocks.0")
    onnx = block.variants["a16"].onnx
    rng = np.random.default_rng(0)
    graph = Graph(opened.file(onnx))
    shapes = {port.name: port.shape for port in tamper.engine_entry(bundle, block.name, 16).inputs}
    feeds = graph.feeds({name: rng.standard_normal(shape) for name, shape in shapes.items()})
    outputs = graph.as_outputs({name: out * (1 + off) for name, out in graph([feeds])[0].items()})
    command = save_case(tmp_path / "cases", "block", opened.file(onnx), [feeds], [outputs], 1e-2)
    done = polygraphy(command)
    assert (done.returncode == 0) == (off == 0), done.stdout + done.stderr
    assert ("PASSED" if off == 0 else "FAILED") in done.stdout + done.stderr


def test_validate_prints_commands_that_pass(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    done = cli("validate", bundle, "--save", tmp_path / "cases")
    assert done.code == 0, done.err
    commands = [line for line in done.out.splitlines() if line.startswith("polygraphy run")]
    manifest = Bundle.open(bundle).manifest
    variants = [block.variants[variant_name(bits)] for block in manifest.blocks for bits in manifest.bits]
    assert len(commands) == sum(variant.container is not Container.INT8 for variant in variants)
    assert "INT8 cases were saved without a command" in done.out
    assert (tmp_path / "cases" / "down_blocks.0.a8.outputs.json").is_file()
    for graph in ("down_blocks.0.a16.onnx", "up_blocks.2.a32.onnx"):
        checked = polygraphy(next(c for c in commands if graph in c))
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_save_to_a_file_is_refused(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    done = cli("validate", bundle, "--save", tmp_path / "taken")
    assert done.code == 2
    assert "cannot write" in done.err


def test_what_polygraphy_finds_between_runners() -> None:
    expected = [{"y": np.array([3.0, 4.0], np.float32)}, {"y": np.array([0.0, 10.0], np.float32)}]
    found = [{"y": np.array([3.0, 4.0], np.float32)}, {"y": np.array([0.0, 11.0], np.float32)}]
    (row,) = compare(found, expected) or []
    assert (row.name, row.max, row.mean, row.median, row.cosine) == ("y", 1.0, 0.5, 0.5, 1.0)
    assert row.error == pytest.approx(0.1)
    expected[0]["y"][1] = np.inf
    with pytest.raises(QlipError, match="reference is not finite"):
        compare(found, expected)
    found[0]["y"][0] = np.nan
    assert compare(found, expected) is None
