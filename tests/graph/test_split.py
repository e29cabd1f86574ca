"""Blocks, run one after the other, are the graph they were cut from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qlip_export.errors import QlipError
from qlip_export.families.unet import UNET
from qlip_export.graph.layers import find_layers
from qlip_export.graph.split import Block, split
from qlip_export.spec import Granularity
from tests.graph.conftest import Arrays, graph, relative, run
from tests.tiny import BLOCKS


def cut(model: ir.Model, granularity: Granularity) -> list[Block]:
    return split(model, UNET.input_names, lambda scope: UNET.block_of(scope, granularity))


def run_chain(blocks: list[Block], feeds: Arrays) -> Arrays:
    """Run block by block; a block sees nothing but what the ones before it gave."""
    values = dict(feeds)
    for block in blocks:
        outputs = run(block.model, values)
        assert tuple(outputs) == block.outputs
        values |= outputs
    return values


@pytest.mark.parametrize(("granularity", "count"), [("whole", 2), ("coarse", 9), ("fine", 25)])
def test_blocks_compute_what_the_uncut_graph_computes(
    captured: ir.Model,
    parameters: Arrays,
    inputs: Arrays,
    expected: np.ndarray,
    granularity: Granularity,
    count: int,
) -> None:
    feeds = inputs | parameters
    uncut = run(captured, feeds)["noise"]
    blocks = cut(captured, granularity)
    assert len(blocks) == count
    found = run_chain(blocks, feeds)["noise"]
    assert relative(found, uncut) < 1e-6
    assert relative(found, expected) < 1e-5


def test_coarse_blocks_and_what_runs_between_them(captured: ir.Model) -> None:
    blocks = {block.name: block for block in cut(captured, "coarse")}
    assert tuple(blocks) == BLOCKS
    assert blocks["time"].inputs == ("timestep",)
    assert blocks["stem"].inputs == ("latents",)
    (embedding,) = blocks["time"].outputs
    assert embedding == "time_out0"
    assert embedding in blocks["down_blocks.0"].inputs
    assert all("text" in blocks[name].inputs for name in BLOCKS[2:-1])
    assert blocks["out"].outputs == ("noise",)
    assert len(blocks["out"].inputs) == 1


@pytest.mark.parametrize("granularity", ["whole", "coarse", "fine"])
def test_every_node_and_layer_is_in_exactly_one_block(captured: ir.Model, granularity: Granularity) -> None:
    blocks = cut(captured, granularity)
    layers = [layer.name for block in blocks for layer in find_layers(block.model.graph)]
    assert sorted(layers) == sorted(layer.name for layer in find_layers(captured.graph))
    assert sum(len(list(block.model.graph)) for block in blocks) == len(list(captured.graph))
    for block in blocks:
        for layer in find_layers(block.model.graph):
            assert UNET.block_of(layer.name, granularity) == block.name


def test_cutting_leaves_the_graph_alone(captured: ir.Model) -> None:
    before = ir.to_proto(captured).SerializeToString()
    cut(captured, "fine")
    assert ir.to_proto(captured).SerializeToString() == before


def scoped(text: str, scopes: list[str | None]) -> ir.Model:
    model = graph(text)
    for node, scope in zip(model.graph, scopes, strict=True):
        node.name = f"{scope or ''}/{node.op_type}"
    return model


def by_first_name(scope: str) -> str | None:
    return scope.split(".")[0] or None


def test_node_without_a_scope_joins_the_first_that_needs_it() -> None:
    """So a constant shape or a cast never becomes a tensor between blocks."""
    model = scoped(
        """
        g (float[4] x) => (float[4] z) {
            h = Abs (x)
            early = Neg (h)
            y = Relu (h)
            z = Add (y, early)
        }
        """,
        ["a", None, "a", "b"],
    )
    first, second = split(model, ("x",), by_first_name)
    assert [node.op_type for node in first.model.graph] == ["Abs", "Relu"]
    assert [node.op_type for node in second.model.graph] == ["Neg", "Add"]
    assert (first.inputs, first.outputs) == (("x",), ("a_out0", "a_out1"))
    assert (second.inputs, second.outputs) == (("a_out0", "a_out1"), ("z",))
    x = {"x": np.array([-1, 2, -3, 4], dtype=np.float32)}
    np.testing.assert_array_equal(run_chain([first, second], x)["z"], run(model, x)["z"])


def test_block_that_needs_a_later_one_is_refused() -> None:
    model = scoped(
        "g (float[4] x) => (float[4] z) { h = Abs (x) y = Relu (h) z = Neg (y) }",
        ["a.0", "b.0", "a.1"],
    )
    with pytest.raises(QlipError, match="block 'a' would need what the later 'b' computes"):
        split(model, ("x",), by_first_name)


def test_patterns_that_match_nothing_are_refused() -> None:
    model = scoped("g (float[4] x) => (float[4] y) { y = Relu (x) }", ["a"])
    with pytest.raises(QlipError, match="no node of the graph belongs to a block"):
        split(model, ("x",), lambda scope: None)
