"""polygraphy's own tools accept every ONNX file of a bundle."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.tiny import BLOCKS

FILES = (
    "text_encoder",
    "vae_decoder",
    "policy",
    "time.a32",
    *(f"{block}.a{bits}" for block in BLOCKS if block != "time" for bits in (8, 16, 32)),
)

pytest.importorskip("onnx_graphsurgeon", reason="polygraphy check lint needs it")
pytestmark = pytest.mark.filterwarnings(
    "ignore:SelectableGroups dict interface is deprecated:DeprecationWarning:polygraphy.*",
)


def polygraphy(*arguments: str) -> int:
    """Run polygraphy's command line in this process and return its exit status."""
    from polygraphy.tools import main

    return int(main(list(arguments)))


def test_every_file_is_in_the_list(adaptive_bundle: Path) -> None:
    assert {path.stem for path in (adaptive_bundle / "onnx").glob("*.onnx")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_polygraphy_inspects_and_lints(
    adaptive_bundle: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(adaptive_bundle / "onnx" / f"{name}.onnx")
    assert polygraphy("inspect", "model", path) == 0
    assert "Graph Input(s)" in capfd.readouterr().out
    assert polygraphy("check", "lint", path) == 0, capfd.readouterr()


def test_lint_finds_a_broken_file(adaptive_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(adaptive_bundle / "onnx/policy.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "broken.onnx")
    assert polygraphy("check", "lint", str(tmp_path / "broken.onnx")) != 0
