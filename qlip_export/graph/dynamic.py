"""A static graph made dynamic: the same nodes and weights for any batch, height and width of a profile.

Shapes with symbols are propagated from the inputs. What held a number of the static shape is written anew:
targets of Reshape and Expand, sizes of Resize. Most need no more than ONNX's ways to say "as in the input"
(0) and "what is left" (-1), so that compilers see the patterns they fuse; where two numbers vary at once, one
is read from the shape of another value of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qlip_export.errors import QlipError
from qlip_export.extents import Axis, Extent, Extents
from qlip_export.graph.ingest import module_of
from qlip_export.graph.propagate import (
    ELEMENTWISE,
    Call,
    Dim,
    Dims,
    NotDynamicError,
    broadcast,
    fixed,
    is_fixed,
    propagate,
)


@dataclass(frozen=True)
class Made:
    """What became of a graph.

    Attributes:
        outputs: Their shapes.
        steps: What each axis has to be a multiple of.
    """

    outputs: dict[str, Extents]
    steps: dict[Axis, int]


def make_dynamic(
    model: ir.Model, inputs: Mapping[str, Extents], own: Mapping[Axis, int], *, name: str
) -> Made:
    """Let the shapes of a graph follow those of its inputs, in place.

    A value that was repeated for each image of the batch, although nothing in it differs between them, is
    not repeated any more: its batch is 1 and whatever reads it broadcasts.

    Args:
        model: Static graph; its weights need not be loaded.
        inputs: Shape of every input that varies; others stay as they are.
        own: The axes that vary, and the sizes that it was made for.
        name: What an error calls the graph.

    Raises:
        QlipError: A node holds numbers that cannot follow; names node, operator and layer.
    """
    graph = model.graph
    made = _Dynamic(graph, own)
    if "batch" in own:
        for node in [node for node in graph if node.op_type == "GatherND"]:
            made.index_within_batch(node)
    for value in [v for v in graph.inputs if v.name in inputs]:
        made.set(value, tuple(Dim(extent) for extent in inputs[str(value.name)]))
    for node in list(graph):
        try:
            made.visit(node)
        except NotDynamicError as error:
            layer = module_of(node)
            raise QlipError(
                f"{name}: node {node.name!r} ({node.op_type})"
                + (f" of layer {layer!r}" if layer else "")
                + " has no shape that follows from batch, height and width",
                expected="a graph that no constant ties to one size",
                found=str(error),
                fix="leave that axis out of --profile; several static sizes in one bundle: build --size",
            ) from error
    for value in [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        graph.initializers.pop(str(value.name))
    steps: dict[Axis, int] = dict.fromkeys(own, 1)
    for extent in {dim.extent for dims in made.shapes.values() for dim in dims}:
        steps |= {axis: math.lcm(steps[axis], step) for axis, step in extent.steps.items()}
    outputs = {str(v.name): tuple(dim.extent for dim in made.of(v) or ()) for v in graph.outputs}
    return Made(outputs, steps)


@dataclass
class _Dynamic:
    graph: ir.Graph
    own: Mapping[Axis, int]
    shapes: dict[ir.Value, Dims] = field(default_factory=dict)
    changed: set[ir.Value] = field(default_factory=set)
    """Values that have a symbol, or no longer the batch of the static graph."""
    read: dict[Extent, ir.Value] = field(default_factory=dict)
    """What was read of shapes, each a vector of one number."""
    constants: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def set(self, value: ir.Value, dims: Dims) -> None:
        self.shapes[value] = dims
        numbers = [dim.extent.constant for dim in dims]
        if value.shape is None or numbers != list(value.shape):
            self.changed.add(value)
        value.shape = ir.Shape(
            [str(dim.extent) if n is None else n for n, dim in zip(numbers, dims, strict=True)]
        )

    def of(self, value: ir.Value | None) -> Dims | None:
        if value is None:
            return None
        if value in self.shapes:
            return self.shapes[value]
        if value.shape is None:
            raise NotDynamicError(f"{value.name} has no shape")
        return fixed([int(n) for n in value.shape])  # type: ignore[arg-type]

    def visit(self, node: ir.Node) -> None:
        """Propagate through one node, and write it anew where it holds numbers of a static shape."""
        if node.op_type == "Expand" and self._repeats(node):
            return
        if not self.changed.intersection(node.inputs):
            return
        if node.op_type in ELEMENTWISE:
            self._share_rows(node)
        call = Call(node, tuple(self.of(value) for value in node.inputs), self.own)
        if node.op_type == "Expand" and not is_fixed(call.shape(0)):
            shapes = [self._expand(call)]
        else:
            shapes = propagate(call)
        for i, (value, dims) in enumerate(zip(node.outputs, shapes, strict=True)):
            if value.shape is not None and not _same(call.at_own(dims), call.static(i)):
                raise NotDynamicError(f"{call.at_own(dims)} where the static graph has {call.static(i)}")
        if node.op_type == "Reshape":
            self._reshape(node, call.shape(0), shapes[0])
        elif node.op_type == "Resize":
            self._resize(call)
        for value, dims in zip(node.outputs, shapes, strict=True):
            self.set(value, dims)

    def _repeats(self, node: ir.Node) -> bool:
        """Take away an Expand that repeats what has no batch for each row of one; return whether it was."""
        source, result = node.inputs[0], node.outputs[0]
        dims = self.of(source)
        if "batch" not in self.own or source is None or dims is None or not is_fixed(dims):
            return False
        before, after = [dim.extent.constant for dim in dims], list(result.shape or ())
        if len(before) != len(after) or before[:1] != [1] or before[1:] != after[1:]:
            return False
        if result.is_graph_output():
            raise NotDynamicError("an output is repeated for the batch")
        result.replace_all_uses_with(source)
        self.changed.add(source)
        self.graph.remove(node, safe=True)
        return True

    def _share_rows(self, node: ir.Node) -> None:
        """Let a constant that holds the same for each row of the batch hold it once."""
        operands = [(value, self.of(value)) for value in node.inputs if value is not None]
        rank = max(len(dims or ()) for _, dims in operands)
        leading = [dims[0] for _, dims in operands if dims and len(dims) == rank]
        rows = {dim.extent.at(self.own) for dim in leading if not is_fixed((dim,))}
        for i, value in enumerate(node.inputs):
            if len(self.of(value) or ()) == rank:
                self._share_row(node, i, rows)

    def _share_row(self, node: ir.Node, i: int, rows: Collection[int]) -> None:
        """Do it for one operand: a constant, or what is computed of constants element by element."""
        value = node.inputs[i]
        if value is None or value in self.changed:
            return
        if value.const_value is not None:
            numbers = value.const_value.numpy()
            if len(numbers) > 1 and len(numbers) in rows and (numbers == numbers[:1]).all():
                shared = ir.tensor(numbers[:1], name=f"{node.outputs[0].name}.row.{i}")
                node.replace_input_with(i, self._register(shared))
            return
        made, dims = value.producer(), self.of(value)
        if made is None or dims is None or made.op_type not in ELEMENTWISE:
            return
        for j, operand in enumerate(made.inputs):
            if len(self.of(operand) or ()) == len(dims):
                self._share_row(made, j, rows)
        shared_dims = broadcast(*(self.of(operand) or () for operand in made.inputs))
        if shared_dims != dims:
            self.set(value, shared_dims)

    def index_within_batch(self, node: ir.Node) -> None:
        """Let a GatherND whose indices begin with the row's own number index within each row instead."""
        joined = node.inputs[1].producer() if node.inputs[1] is not None else None
        if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
            return
        rows, index = joined.inputs
        numbers = rows.const_value.numpy() if rows is not None and rows.const_value is not None else None
        if numbers is None or not np.array_equal(numbers, np.arange(len(numbers))[:, None]):
            return
        if "batch_dims" in node.attributes and node.attributes["batch_dims"].as_int():
            return
        node.attributes["batch_dims"] = ir.AttrInt64("batch_dims", 1)
        node.replace_input_with(1, index)
        if not joined.outputs[0].uses():
            self.graph.remove(joined, safe=True)

    def _expand(self, call: Call) -> Dims:
        """Return what an Expand of a shape with symbols gives; its target keeps what it does not repeat."""
        dims, after = call.shape(0), call.static()
        dims = fixed((1,) * (len(after) - len(dims))) + dims
        before = call.at_own(dims)
        if any(b != a and not is_fixed((dim,)) for b, a, dim in zip(before, after, dims, strict=True)):
            raise NotDynamicError("an axis that varies is repeated")
        target = [1 if b == a else a for b, a in zip(before, after, strict=True)]
        call.node.replace_input_with(1, self._constant(target))
        return tuple(dim if n == 1 else fixed([n])[0] for dim, n in zip(dims, target, strict=True))

    def _reshape(self, node: ir.Node, before: Dims, after: Dims) -> None:
        target: list[int | Extent] = []
        for i, dim in enumerate(after):
            number = dim.extent.constant
            if number is None:
                target.append(0 if i < len(before) and before[i] == dim else dim.extent)
            else:
                target.append(number)
        if unknown := [i for i, n in enumerate(target) if isinstance(n, Extent)]:
            target[unknown[-1]] = -1
        if any(isinstance(n, Extent) for n in target):
            parts = [self._read(n, node) if isinstance(n, Extent) else self._constant([n]) for n in target]
            shape = self._insert("Concat", parts, node, axis=0)
        else:
            shape = self._constant([n for n in target if isinstance(n, int)])
        node.replace_input_with(1, shape)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)

    def _resize(self, call: Call) -> None:
        """Write sizes as scales."""
        node = call.node
        if len(node.inputs) < 4 or node.inputs[3] is None:
            return
        pairs = [*zip(call.static(), call.at_own(call.shape(0)), strict=True)]
        if any(after % before for after, before in pairs):
            raise NotDynamicError(f"it scales by {', '.join(f'{a}/{b}' for a, b in pairs)}")
        scales = np.array([after // before for after, before in pairs], dtype=np.float32)
        value = self._register(ir.tensor(scales, name=f"{node.outputs[0].name}.scales"))
        node.replace_input_with(2, value)
        node.replace_input_with(3, None)

    def _read(self, extent: Extent, before: ir.Node) -> ir.Value:
        """Return a vector of the number ``extent``, read from the shape of a value that is there already."""
        if extent not in self.read:
            places = (
                (value, axis)
                for value, dims in self.shapes.items()
                for axis, dim in enumerate(dims)
                if dim.extent == extent
            )
            value, axis = next(places, (None, 0))
            if value is None:
                raise NotDynamicError(f"no value has {extent} in its shape")
            whole = self._insert("Shape", [value], before)
            self.read[extent] = self._insert("Gather", [whole, self._constant([axis])], before, axis=0)
        return self.read[extent]

    def _insert(self, op: str, inputs: list[ir.Value], before: ir.Node, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes or None)
        node.name = node.outputs[0].name = f"{before.name}.{op.lower()}.{len(self.graph)}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _constant(self, numbers: list[int]) -> ir.Value:
        key = tuple(numbers)
        if key not in self.constants:
            name = f"shape.{len(self.constants)}"
            self.constants[key] = self._register(ir.tensor(np.array(numbers, dtype=np.int64), name=name))
        return self.constants[key]

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.numpy().shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


def _same(found: tuple[int, ...], static: tuple[int, ...]) -> bool:
    """Return whether a shape is that of the static graph, but for a batch that is not repeated any more."""
    return found == static or (found[:1] == (1,) and found[1:] == static[1:])
