"""What the exporter writes becomes what the passes expect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qlip_export.families.unet import UNET
from qlip_export.graph.ingest import ingest, module_of, parameters_of
from tests.graph.conftest import Arrays, graph, relative, run


def test_inputs_are_those_of_the_denoiser_then_its_parameters(captured: ir.Model, parameters: Arrays) -> None:
    names = [value.name for value in captured.graph.inputs]
    assert names[:3] == list(UNET.input_names)
    assert sorted(names[3:]) == sorted(parameters)
    assert [v.name for v in parameters_of(captured.graph, set(UNET.input_names))] == names[3:]
    assert [value.name for value in captured.graph.outputs] == ["noise"]
    assert all(tuple(v.shape) == parameters[v.name].shape for v in captured.graph.inputs[3:])


def test_work_grows_with_the_graph_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule of the optimizer walks the whole graph for each of its nodes."""

    def walks(length: int) -> int:
        values = [
            ir.Value(name=f"v{i}", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
            for i in range(length + 1)
        ]
        nodes = [ir.node("Sin", [a], outputs=[b]) for a, b in pairwise(values)]
        made = ir.Graph(values[:1], values[-1:], nodes=nodes, opset_imports={"": 20}, name="chain")
        count = 0
        inner = ir.Graph.__iter__

        def counted(self: ir.Graph) -> Iterator[ir.Node]:
            nonlocal count
            count += 1
            return inner(self)

        with monkeypatch.context() as patch:
            patch.setattr(ir.Graph, "__iter__", counted)
            ingest(ir.Model(made, ir_version=10), parameters=set(), prefix="")
        return count

    assert walks(40) == walks(10)


def test_graph_holds_no_weights(captured: ir.Model) -> None:
    sizes = {name: v.const_value.size for name, v in captured.graph.initializers.items()}
    assert max(sizes.values()) <= 16  # shapes, the sinusoids of the timestep, and the like


def test_every_scope_is_a_module(captured: ir.Model, denoiser: Any) -> None:
    modules = {name for name, _ in denoiser.named_modules()}
    scopes = {module_of(node) for node in captured.graph}
    assert scopes <= modules
    assert {"conv_in", "down_blocks.1.resnets.0.conv_shortcut", "time_embedding.linear_1"} <= scopes


def test_names_say_which_node_it_is_and_nothing_else_is_left(captured: ir.Model) -> None:
    names = [str(node.name) for node in captured.graph]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 1 for name in names)
    assert not any(node.metadata_props for node in captured.graph)
    assert all(not node.doc_string for node in captured.graph)
    assert not captured.functions
    assert not captured.metadata_props


def test_attention_is_two_products_around_a_softmax(captured: ir.Model) -> None:
    """Nine transformer blocks, each with self- and cross-attention; keys are transposed in one step."""
    softmaxes = [node for node in captured.graph if node.op_type == "Softmax"]
    assert len(softmaxes) == 2 * 9
    for softmax in softmaxes:
        (after,) = {user.node.op_type for user in softmax.outputs[0].uses()}
        assert after == "MatMul"
    perms = Counter(tuple(n.attributes["perm"].as_ints()) for n in captured.graph if n.op_type == "Transpose")
    assert (0, 2, 1) not in perms
    assert perms[0, 1, 3, 2] == 2 * 9


def test_capture_computes_what_torch_computes(
    captured: ir.Model, parameters: Arrays, inputs: Arrays, expected: np.ndarray
) -> None:
    assert relative(run(captured, inputs | parameters)["noise"], expected) < 1e-5


def attention_keys(perm: str = "0, 2, 1", back: str = "2, 3, 5, 4") -> ir.Model:
    return graph(f"""
        keys (float[2, 3, 4, 5] k) => (float[{back}] out)
        <int64[3] flat = {{6, 4, 5}}, int64[4] shape = {{{back}}}> {{
            merged = Reshape (k, flat)
            swapped = Transpose <perm: ints = [{perm}]> (merged)
            out = Reshape (swapped, shape)
        }}
    """)


def test_three_steps_of_transposition_become_one() -> None:
    feeds = {"k": np.random.default_rng(0).standard_normal((2, 3, 4, 5), dtype=np.float32)}
    before = run(attention_keys(), feeds)["out"]
    model = ingest(attention_keys(), parameters=set(), prefix="")
    assert [node.op_type for node in model.graph] == ["Transpose"]
    assert [value.name for value in model.graph.outputs] == ["out"]
    np.testing.assert_array_equal(run(model, feeds)["out"], before)


def test_a_reshape_that_means_something_else_stays() -> None:
    feeds = {"k": np.random.default_rng(0).standard_normal((2, 3, 4, 5), dtype=np.float32)}
    before = run(attention_keys(back="3, 2, 5, 4"), feeds)["out"]
    model = ingest(attention_keys(back="3, 2, 5, 4"), parameters=set(), prefix="")
    assert [node.op_type for node in model.graph] == ["Reshape", "Transpose", "Reshape"]
    np.testing.assert_array_equal(run(model, feeds)["out"], before)


@pytest.mark.parametrize(
    ("scopes", "module"),
    [
        ("['', 'module', 'module.conv_in', 'conv2d']", "conv_in"),
        ("['', 'module', 'add_3']", ""),
        ("['add_3']", ""),
    ],
)
def test_scope_is_the_innermost_module(scopes: str, module: str) -> None:
    model = graph("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    (node,) = model.graph
    node.metadata_props.update({"pkg.torch.onnx.name_scopes": scopes, "pkg.torch.onnx.stack_trace": "..."})
    (node,) = ingest(model, parameters=set(), prefix="module.").graph
    assert node.name == f"{module}/Relu"
    assert module_of(node) == module
