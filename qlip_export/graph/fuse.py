"""Rewrite what ONNX Runtime has no CUDA kernel for, or a better one under another name."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from qlip_export.graph.layers import static_shape

_HEADS_FIRST = (0, 2, 1, 3)
_KEYS_TRANSPOSED = (0, 1, 3, 2)


def split_group_norm(model: ir.Model) -> int:
    """Write every GroupNormalization as InstanceNormalization over its groups, in place; return how many.

    Without a kernel of its own it is expanded into a dozen operations, in FP32.
    """
    nodes = [node for node in model.graph if node.op_type == "GroupNormalization"]
    for node in nodes:
        x, scale, bias = node.inputs[:3]
        assert x is not None and scale is not None and bias is not None
        shape = static_shape(x)
        groups = shape[0] * node.attributes["num_groups"].as_int()
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        build = _Builder(model.graph, node)
        dtype = x.dtype
        assert dtype is not None
        grouped = build("Reshape", [x, build.constant("groups", (1, groups, prod(shape) // groups))])
        ones, zeros = (np.full(groups, v, dtype=dtype.numpy()) for v in (1, 0))
        normal = build(
            "InstanceNormalization",
            [grouped, build.constant("ones", ones), build.constant("zeros", zeros)],
            epsilon=epsilon,
        )
        back = build("Reshape", [normal, build.constant("shape", shape)])
        channels = build.constant("channels", (shape[1], *(1 for _ in shape[2:])))
        scaled = build("Mul", [back, build("Reshape", [scale, channels])])
        build.replace(build("Add", [scaled, build("Reshape", [bias, channels])]))
    return len(nodes)


def float_argmax(model: ir.Model) -> int:
    """Let every ArgMax over integers compare them as FP32, in place; return how many.

    Exact up to 2^24, far above what the text encoders look for: the largest token id of a prompt.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == "ArgMax"]:
        source = node.inputs[0]
        if source is not None and source.dtype in (ir.DataType.INT64, ir.DataType.INT32):
            build = _Builder(model.graph, node)
            node.replace_input_with(0, build("Cast", [source], to=int(ir.DataType.FLOAT)))
            count += 1
    return count


def fuse_attention(model: ir.Model) -> int:
    """Write attention as ONNX Runtime's MultiHeadAttention, in place; return how many.

    Matches what the capture leaves: heads split off by Reshape and Transpose, queries and keys scaled alike,
    MatMul, Softmax over the last axis, MatMul, heads joined again.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        count += _fuse_one(model, node)
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def _fuse_one(model: ir.Model, softmax: ir.Node) -> bool:
    weighted = _only_user(softmax, "MatMul")
    transposed = weighted and _only_user(weighted, "Transpose")
    joined = transposed and _only_user(transposed, "Reshape")
    products = _producer(softmax.inputs[0], "MatMul")
    if weighted is None or transposed is None or joined is None or products is None:
        return False
    if weighted.inputs[0] is not softmax.outputs[0] or _axes(transposed) != _HEADS_FIRST:
        return False
    scaled_queries, scaled_keys = (_producer(value, "Mul") for value in products.inputs)
    if scaled_queries is None or scaled_keys is None:
        return False
    keys = _producer(scaled_keys.inputs[0], "Transpose")
    if keys is None or _axes(keys) != _KEYS_TRANSPOSED:
        return False
    parts = [_before_heads(v) for v in (scaled_queries.inputs[0], keys.inputs[0], weighted.inputs[1])]
    scales = [_scalar(scaled.inputs[1]) for scaled in (scaled_queries, scaled_keys)]
    if None in parts or None in scales:
        return False
    scale = prod(each for each in scales if each is not None)
    heads = static_shape(softmax.outputs[0])[1]
    build = _Builder(model.graph, joined)
    build.replace(
        build(
            "MultiHeadAttention",
            parts,
            domain="com.microsoft",
            num_heads=heads,
            scale=scale,
        )
    )
    return True


class _Builder:
    """Puts nodes in front of one that they replace."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node

    def __call__(
        self, op: str, inputs: list[ir.Value | None], *, domain: str = "", **attributes: float | int
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes or None, domain=domain)
        self._graph.insert_before(self._node, node)
        node.outputs[0].name = f"{self._node.outputs[0].name}.{op}.{len(self._graph)}"
        node.name = node.outputs[0].name
        return node.outputs[0]

    def constant(self, name: str, value: tuple[int, ...] | np.ndarray) -> ir.Value:
        array = np.array(value, dtype=np.int64) if isinstance(value, tuple) else value
        tensor = ir.tensor(array, name=f"{self._node.outputs[0].name}.{name}")
        out = ir.Value(
            name=tensor.name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(out)
        return out

    def replace(self, value: ir.Value) -> None:
        """Let ``value`` take the place of the node's output, and remove what nobody needs any more."""
        old = self._node.outputs[0]
        name, value.shape, value.type = old.name, old.shape, old.type
        for user, index in list(old.uses()):
            user.replace_input_with(index, value)
        for index, output in enumerate(self._graph.outputs):
            if output is old:
                self._graph.outputs[index] = value
        old.name, value.name = f"{name}.replaced", name
        unused = [self._node]
        while unused:
            node = unused.pop()
            if node.graph is None or any(out.uses() or out in self._graph.outputs for out in node.outputs):
                continue
            producers = [value.producer() for value in node.inputs if value is not None]
            unused += [producer for producer in producers if producer is not None]
            self._graph.remove(node, safe=True)


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def _only_user(node: ir.Node, op: str) -> ir.Node | None:
    users = [user for user, _ in node.outputs[0].uses()]
    alone = len(users) == 1 and not node.outputs[0].is_graph_output()
    return users[0] if alone and users[0].op_type == op else None


def _axes(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints())


def _scalar(value: ir.Value | None) -> float | None:
    constant = value.const_value if value is not None else None
    return float(constant.numpy().reshape(())) if constant is not None and constant.size == 1 else None


def _before_heads(value: ir.Value | None) -> ir.Value | None:
    """Return the (N, L, heads x D) tensor that ``value`` (N, heads, L, D) was cut from."""
    transpose = _producer(value, "Transpose")
    reshape = _producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or _axes(transpose) != _HEADS_FIRST:
        return None
    flat = reshape.inputs[0]
    return flat if flat is not None and len(static_shape(flat)) == 3 else None
