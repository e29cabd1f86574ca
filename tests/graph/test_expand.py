"""INT4 weights widened to INT8 have the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from qlip_export.graph.expand import expand_int4


def test_codes_keep_their_values_and_change_their_type(bundle: Path) -> None:
    path = bundle / "onnx" / "down_blocks.0.a32.onnx"
    packed, expanded = ir.load(path), ir.load(path)
    count = expand_int4(expanded)
    codes = [name for name, v in packed.graph.initializers.items() if v.dtype == ir.DataType.INT4]
    assert count == len(codes) > 10
    for name in codes:
        before, after = (m.graph.initializers[name].const_value for m in (packed, expanded))
        assert expanded.graph.initializers[name].dtype == ir.DataType.INT8
        assert after.dtype == ir.DataType.INT8
        np.testing.assert_array_equal(after.numpy(), before.numpy().astype(np.int8))
        assert after.numpy().min() < 0 < after.numpy().max()


def test_nothing_else_is_touched(bundle: Path) -> None:
    path = bundle / "onnx" / "down_blocks.0.a32.onnx"
    packed, expanded = ir.load(path), ir.load(path)
    expand_int4(expanded)
    for name, value in packed.graph.initializers.items():
        if value.dtype != ir.DataType.INT4:
            assert expanded.graph.initializers[name].dtype == value.dtype
    assert expand_int4(expanded) == 0
