"""How shapes with symbols in them go through the operators of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qlip_export.extents import Axis, Extent, Extents


class NotDynamicError(Exception):
    """Why the shape of a node's output does not follow from those of its inputs."""


@dataclass(frozen=True)
class Dim:
    """A number of a shape within a graph.

    Attributes:
        extent: What it is.
        factors: What a Reshape merged it from, in row-major order; they come apart again in this order.
    """

    extent: Extent
    factors: Extents = field(default=(), compare=False)

    @property
    def atoms(self) -> Extents:
        """Its factors, or itself where it was not merged."""
        return self.factors or (self.extent,)


Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Call:
    """A node with the shapes of its inputs; ``own`` are the sizes that the static graph was made for."""

    node: ir.Node
    shapes: tuple[Dims | None, ...]
    own: Mapping[Axis, int]

    def shape(self, index: int) -> Dims:
        """Return the shape of an input."""
        found = self.shapes[index]
        assert found is not None, f"{self.node.op_type} without input {index}"
        return found

    def integer(self, name: str, default: int) -> int:
        """Return an attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def integers(self, name: str, default: Sequence[int]) -> list[int]:
        """Return an attribute that is a list."""
        attribute = self.node.attributes.get(name)
        return [*default] if attribute is None else [*attribute.as_ints()]

    def constant(self, index: int) -> NDArray[np.generic] | None:
        """Return an input that is a constant; ``None`` where it is absent."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            return None
        if value.const_value is None:
            raise NotDynamicError(f"{value.name} is computed, where a constant is expected")
        return value.const_value.numpy()

    def axes(self, index: int) -> list[int]:
        """Return axes given as an input, or as an attribute where older operators do."""
        given = self.constant(index)
        if given is None:
            return self.integers("axes", ())
        return [int(axis) for axis in given.ravel()]

    def static(self, output: int = 0) -> tuple[int, ...]:
        """Return the shape that an output has in the static graph."""
        shape = self.node.outputs[output].shape
        if shape is None or not all(isinstance(n, int) for n in shape):
            raise NotDynamicError("its shape was not kept")
        return tuple(int(n) for n in shape)  # type: ignore[arg-type]

    def at_own(self, dims: Dims) -> tuple[int, ...]:
        """Return a shape at the sizes of the static graph."""
        return tuple(dim.extent.at(self.own) for dim in dims)


def fixed(shape: Sequence[int]) -> Dims:
    """Return a shape without symbols."""
    return tuple(Dim(Extent.of(int(n))) for n in shape)


def is_fixed(dims: Dims | None) -> bool:
    """Return whether no symbol is in a shape."""
    return dims is None or all(dim.extent.constant is not None for dim in dims)


def propagate(call: Call) -> list[Dims]:
    """Return the shapes of the node's outputs.

    Raises:
        NotDynamicError: They do not follow, or the operator is not known.
    """
    rule = RULES.get(call.node.op_type)
    if rule is None or call.node.domain:
        raise NotDynamicError("nothing is known of this operator's shapes")
    return rule(call)


def _same(call: Call) -> list[Dims]:
    return [call.shape(0)]


def broadcast(*shapes: Dims) -> Dims:
    """Return the shape of elementwise operands together.

    Raises:
        NotDynamicError: One of them has a number where another has a symbol.
    """
    one = Dim(Extent.of(1))
    rank = max(map(len, shapes))
    result = []
    for column in zip(*((one,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        different = [dim for dim in dict.fromkeys(column) if dim != one]
        if len(different) > 1:
            raise NotDynamicError(" meets ".join(str(dim.extent) for dim in different))
        result.append(different[0] if different else one)
    return tuple(result)


def _elementwise(call: Call) -> list[Dims]:
    return [broadcast(*(shape for shape in call.shapes if shape is not None))]


def _matmul(call: Call) -> list[Dims]:
    a, b = call.shape(0), call.shape(1)
    if len(a) < 2 or len(b) < 2:
        raise NotDynamicError("a vector in a matrix product")
    if a[-1] != b[-2]:
        raise NotDynamicError(f"{a[-1].extent} meets {b[-2].extent}")
    return [(*broadcast(a[:-2], b[:-2]), a[-2], b[-1])]


def _gemm(call: Call) -> list[Dims]:
    a, b = call.shape(0), call.shape(1)
    rows = a[1] if call.integer("transA", 0) else a[0]
    return [(rows, b[0] if call.integer("transB", 0) else b[1])]


def _conv(call: Call) -> list[Dims]:
    x, weight = call.shape(0), call.shape(1)
    space = len(x) - 2
    attribute = call.node.attributes.get("auto_pad")
    if attribute is not None and attribute.as_string() not in ("NOTSET", "VALID"):
        raise NotDynamicError(f"padding {attribute.as_string()}")
    pads = call.integers("pads", (0,) * 2 * space)
    strides, dilations = call.integers("strides", (1,) * space), call.integers("dilations", (1,) * space)
    out = [x[0], weight[0]]
    for i in range(space):
        (kernel,) = call.at_own(weight[2 + i : 3 + i])
        dim = x[2 + i].extent
        if dim.at(call.own) % strides[i]:
            raise NotDynamicError(f"{dim.at(call.own)} in steps of {strides[i]}")
        # floor((x + slack) / stride) + 1, where x is a multiple of the stride
        slack = pads[i] + pads[space + i] - dilations[i] * (kernel - 1) - 1
        out.append(Dim(dim / strides[i] + Extent.of(slack // strides[i] + 1)))
    return [tuple(out)]


def _transpose(call: Call) -> list[Dims]:
    x = call.shape(0)
    return [tuple(x[i] for i in call.integers("perm", [*reversed(range(len(x)))]))]


def _unsqueeze(call: Call) -> list[Dims]:
    x, axes = call.shape(0), call.axes(1)
    rank = len(x) + len(axes)
    added, rest = {axis % rank for axis in axes}, iter(x)
    return [tuple(Dim(Extent.of(1)) if i in added else next(rest) for i in range(rank))]


def _squeeze(call: Call) -> list[Dims]:
    x = call.shape(0)
    gone = {axis % len(x) for axis in call.axes(1)}
    if not gone or not is_fixed(tuple(x[axis] for axis in gone)):
        raise NotDynamicError("an axis that varies is taken away")
    return [tuple(dim for i, dim in enumerate(x) if i not in gone)]


def _concat(call: Call) -> list[Dims]:
    shapes = [shape for shape in call.shapes if shape is not None]
    axis = call.integer("axis", 0) % len(shapes[0])
    total = Extent.of(0)
    for shape in shapes:
        total = total + shape[axis].extent
        for i, (dim, first) in enumerate(zip(shape, shapes[0], strict=True)):
            if i != axis and dim != first:
                raise NotDynamicError(f"{first.extent} is joined with {dim.extent}")
    return [(*shapes[0][:axis], Dim(total), *shapes[0][axis + 1 :])]


def _split(call: Call) -> list[Dims]:
    x = call.shape(0)
    axis = call.integer("axis", 0) % len(x)
    if not is_fixed(x[axis : axis + 1]):
        raise NotDynamicError(f"{x[axis].extent} is split into constant parts")
    parts = [call.static(i)[axis] for i in range(len(call.node.outputs))]
    return [(*x[:axis], *fixed([part]), *x[axis + 1 :]) for part in parts]


def _slice(call: Call) -> list[Dims]:
    x, out = call.shape(0), list(call.shape(0))
    starts, ends = call.constant(1), call.constant(2)
    assert starts is not None and ends is not None
    axes = call.axes(3) or [*range(len(starts))]
    for axis, start, end in zip((a % len(x) for a in axes), starts, ends, strict=True):
        if is_fixed(x[axis : axis + 1]):
            out[axis] = fixed([call.static()[axis]])[0]
        elif int(start) != 0 or int(end) < 2**31 - 1:
            raise NotDynamicError(f"a constant part of {x[axis].extent} is taken")
    return [tuple(out)]


def _gather(call: Call) -> list[Dims]:
    x, indices = call.shape(0), call.shape(1)
    axis = call.integer("axis", 0) % len(x)
    return [(*x[:axis], *indices, *x[axis + 1 :])]


def _gather_nd(call: Call) -> list[Dims]:
    x, indices = call.shape(0), call.shape(1)
    shared = call.integer("batch_dims", 0)
    depth = indices[-1].extent.constant
    if depth is None or indices[:shared] != x[:shared]:
        raise NotDynamicError("its indices vary with the shape")
    return [(*indices[:-1], *x[shared + depth :])]


def _reduce(call: Call) -> list[Dims]:
    x = call.shape(0)
    chosen = [call.integer("axis", 0)] if "Arg" in call.node.op_type else call.axes(1)
    gone = {axis % len(x) for axis in chosen}
    if not gone:
        raise NotDynamicError("all axes are reduced")
    keep = call.integer("keepdims", 1)
    kept = (Dim(Extent.of(1)) if i in gone else dim for i, dim in enumerate(x) if keep or i not in gone)
    return [tuple(kept)]


def _resize(call: Call) -> list[Dims]:
    x, out = call.shape(0), call.static()
    scales = [Fraction(n, own) for n, own in zip(out, call.at_own(x), strict=True)]
    return [
        tuple(Dim(d.extent * Extent.of(s.numerator) / s.denominator) for d, s in zip(x, scales, strict=True))
    ]


def _reshape(call: Call) -> list[Dims]:
    before, numbers = call.at_own(call.shape(0)), call.constant(1)
    assert numbers is not None
    copies = not call.integer("allowzero", 0)
    target = [before[i] if n == 0 and copies else int(n) for i, n in enumerate(numbers.tolist())]
    if -1 in target:
        target[target.index(-1)] = prod(before) // -prod(target)
    return [regroup(call.shape(0), target, call.own)]


def regroup(shape: Dims, target: Sequence[int], own: Mapping[Axis, int]) -> Dims:
    """Return ``shape`` as a Reshape to the static ``target`` makes it, whose products are the same.

    A dimension that was merged comes apart into what it was merged from; of one that was not, the first part
    gets the symbol.

    Raises:
        NotDynamicError: The symbols do not fit into the target.
    """
    result: list[Dim] = []
    i = j = 0
    while i < len(shape) or j < len(target):
        group, wanted = [*shape[i : i + 1]], [*target[j : j + 1]]
        i, j = i + len(group), j + len(wanted)
        while (have := prod(d.extent.at(own) for d in group)) != (want := prod(wanted)):
            if have < want and i < len(shape):
                group.append(shape[i])
                i += 1
            elif have > want and j < len(target):
                wanted.append(target[j])
                j += 1
            else:
                raise NotDynamicError(f"({', '.join(str(d.extent) for d in shape)}) does not fit {[*target]}")
        result += _apart([atom for dim in group for atom in dim.atoms], wanted, own)
    return tuple(result)


def _apart(atoms: list[Extent], wanted: Sequence[int], own: Mapping[Axis, int]) -> list[Dim]:
    result = []
    for number in wanted[:-1]:
        taken: list[Extent] = []
        if number == 1 and atoms and atoms[0].constant is None and atoms[0].at(own) == 1:
            taken.append(atoms.pop(0))
        while (missing := number // prod(t.at(own) for t in taken)) > 1:
            atom = atoms.pop(0)
            here = atom.at(own)
            if missing % here == 0:
                taken.append(atom)
            elif here % missing == 0:
                taken.append(atom / (here // missing))
                atoms.insert(0, Extent.of(here // missing))
            else:
                raise NotDynamicError(f"{atom} does not come apart into {[*wanted]}")
        result.append(_merged(taken))
    if wanted:
        result.append(_merged(atoms))
    elif any(atom.constant is None for atom in atoms):
        raise NotDynamicError("an axis that varies is taken away")
    return result


def _merged(atoms: Sequence[Extent]) -> Dim:
    total = Extent.of(1)
    for atom in atoms:
        total = total * atom
    return Dim(total, tuple(atoms) if len(atoms) > 1 else ())


ELEMENTWISE = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min"),
    *("Mul", "Or", "Pow", "Sub", "Where"),
)
"""Operators whose operands broadcast."""

RULES: dict[str, Callable[[Call], list[Dims]]] = {
    **dict.fromkeys(
        (
            *("Abs", "Cast", "Ceil", "Clip", "Cos", "DequantizeLinear", "Elu", "Erf", "Exp", "Floor", "Gelu"),
            *("GroupNormalization", "Identity", "InstanceNormalization", "IsNaN", "LayerNormalization"),
            *("LeakyRelu", "Log", "Neg", "Not", "QuantizeLinear", "Reciprocal", "Relu", "Round", "Sigmoid"),
            *("Sign", "Sin", "Softmax", "Softplus", "Sqrt", "Tanh"),
        ),
        _same,
    ),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("ArgMax", "ArgMin", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    "Concat": _concat,
    "Conv": _conv,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""By operator, of ONNX's own domain."""
