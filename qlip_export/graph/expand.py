"""Widen packed INT4 weights to INT8, for engines whose kernels multiply INT8 and read no INT4."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def expand_int4(model: ir.Model) -> int:
    """Replace every INT4 initializer by an INT8 one with the same values, in place; return how many."""
    count = 0
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype == ir.DataType.INT4:
            codes = value.const_value.numpy().astype(np.int8)
            value.const_value = ir.tensor(codes, name=value.name)
            value.type = ir.TensorType(ir.DataType.INT8)
            count += 1
    return count
