"""Turn the exporter's output into the form the other passes expect.

Afterwards every parameter is a graph input named as in the checkpoint, every node is named after the module
it came from (and carries nothing else), constants are folded, and attention reads as MatMul-Softmax-MatMul.
"""

from __future__ import annotations

import ast
import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

_EXPORTER_SCOPES = "pkg.torch.onnx.name_scopes"


def ingest(model: ir.Model, *, parameters: set[str], prefix: str) -> ir.Model:
    """Return ``model`` normalised in place.

    Args:
        model: As exported, its parameters initializers without data.
        parameters: Names of the parameters as the exported module calls them.
        prefix: Attribute of the wrapper that holds the real module, e.g. ``module.``; taken off all names.
    """
    _fold(model, parameters)
    graph = model.graph
    _transpose_attention_keys(graph)
    seen: Counter[str] = Counter()
    for node in graph:
        name = f"{_module_of(node, prefix)}/{node.op_type}"
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]:
        value.metadata_props.clear()
        value.doc_string = None
    for name in [n for n in graph.initializers if n in parameters]:
        value = graph.initializers.pop(name)
        if value.uses():
            value.name = name.removeprefix(prefix)
            graph.inputs.append(value)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.producer_name = "qlip-export"
    model.producer_version = None
    model.functions.clear()
    return model


def parameters_of(graph: ir.Graph, runtime_inputs: set[str]) -> list[ir.Value]:
    """Return the graph inputs that are parameters, in order."""
    return [v for v in graph.inputs if v.name not in runtime_inputs]


def module_of(node: ir.Node) -> str:
    """Return the path of the module that a node came from, '' at the top or where its name tells none."""
    return str(node.name).rpartition("/")[0]


def _module_of(node: ir.Node, prefix: str) -> str:
    """Return the same of a node as the exporter wrote it."""
    text = node.metadata_props.get(_EXPORTER_SCOPES)
    if text is None:
        return ""
    scopes = [str(scope) for scope in ast.literal_eval(text)]
    module = scopes[-2] if len(scopes) > 1 else ""
    return module.removeprefix(prefix.rstrip(".")).lstrip(".")


def _fold(model: ir.Model, parameters: set[str]) -> None:
    from onnxscript import optimizer

    for name, value in model.graph.initializers.items():
        if name in parameters:
            value.const_value = None  # a fake tensor: folding must not try to read it
    logging.getLogger("onnx_ir.passes.common.initializer_deduplication").setLevel(logging.ERROR)
    with _without_pairs_of_slices():
        optimizer.optimize_ir(model)


@contextlib.contextmanager
def _without_pairs_of_slices() -> Iterator[None]:
    """Leave out the optimizer's one rule that walks the whole graph for every node of it.

    It makes a Split of two Slices, which no denoiser, text encoder or decoder here has, and took four minutes
    for FLUX's denoiser.
    """
    from onnxscript.rewriter.rules.common import slice_split_rule

    slice_split_rule.try_rewrite = lambda *_, **__: None
    try:
        yield
    finally:
        del slice_split_rule.try_rewrite  # the class's own is back


def _transpose_attention_keys(graph: ir.Graph) -> None:
    """Replace Reshape(4D to 3D), Transpose(0, 2, 1), Reshape(back) by one Transpose(0, 1, 3, 2).

    The exporter writes the transposition of attention keys in three steps; engines fuse attention only when
    they see one.
    """
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        transpose = node.inputs[0].producer() if node.inputs[0] is not None else None
        if transpose is None or transpose.op_type != "Transpose" or list(_perm(transpose)) != [0, 2, 1]:
            continue
        merge = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
        if merge is None or merge.op_type != "Reshape":
            continue
        x, y = merge.inputs[0], node.outputs[0]
        if x is None or x.shape is None or y.shape is None or len(x.shape) != 4 or len(y.shape) != 4:
            continue
        if [x.shape[i] for i in (0, 1, 3, 2)] != list(y.shape):
            continue
        swap = ir.node("Transpose", [x], attributes={"perm": [0, 1, 3, 2]}, num_outputs=1)
        swap.metadata_props.update(node.metadata_props)
        swap.outputs[0].name, y.name = y.name, None
        swap.outputs[0].shape, swap.outputs[0].type = y.shape, y.type
        graph.insert_before(node, swap)
        y.replace_all_uses_with(swap.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        for dead in (transpose, merge):
            if not any(o.uses() for o in dead.outputs):
                graph.remove(dead, safe=True)


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())
