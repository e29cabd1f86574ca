"""A stored policy decides the same as a table, as ONNX in both engines, and as torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray

from qlip_export.policy.graph import policy_graph
from qlip_export.policy.store import Policy, Quality
from qlip_export.policy.table import DecisionTable

STEPS = 6


def qualities_worth_asking(table: DecisionTable) -> NDArray[np.float32]:
    """10,000 values over [0, 1], every threshold, and its neighbours in float32."""
    near = np.array([t for row in table.choices for c in row for t in c.thresholds], dtype=np.float32)
    assert len(set(near)) > 5, "a policy that hardly changes its mind tests nothing"
    neighbours = [near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1))]
    return np.concatenate([np.linspace(0, 1, 10_000, dtype=np.float32), *neighbours])


def decision_part(quality: Quality, table: DecisionTable, batch: int) -> onnx.ModelProto:
    """Cut `policy.onnx` behind its sigmoid, so that q itself can be given."""
    weights = {name: tensor.numpy() for name, tensor in quality.network.state_dict().items()}
    model = policy_graph(
        weights["projection"],
        (weights["hidden.weight"], weights["hidden.bias"]),
        (weights["output.weight"], weights["output.bias"]),
        table,
        batch,
    )
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True)
    part = onnx.utils.Extractor(proto).extract_model(["sigmoid"], ["bits", "forced"])
    onnx.checker.check_model(part, full_check=True)
    return part


@pytest.mark.parametrize("name", ["8-16", "8-16-32", "6-8-16-32", "8-16-32-layer"])
def test_table_onnx_and_torch_agree_for_every_quality(trained: Path, name: str) -> None:
    policy = Policy.load(trained, name)
    table = policy.table(STEPS)
    q = qualities_worth_asking(table)

    expected = np.array(
        [[[choice.at(value) for choice in row] for row in table.choices] for value in q.tolist()]
    )

    part = decision_part(Quality.load(trained, "quality"), table, len(q))
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    bits, forced = session.run(["bits", "forced"], {"sigmoid": q[:, None]})
    assert (bits == expected).all()

    compiled = ov.Core().compile_model(
        ov.Core().read_model(part.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = compiled({"sigmoid": q[:, None]})
    assert (found["bits"] == expected).all()
    assert (found["forced"] == forced).all()

    q2b, options = policy.q2b.double(), np.array(table.options)
    for group in range(len(table.choices)):
        for force, wanted in ((False, expected[:, group]), (True, forced[group])):
            with torch.no_grad():
                hard, _ = q2b(torch.from_numpy(q).double(), group, force)
            assert (options[hard.argmax(-1).numpy()] == wanted).all()


def test_a_policy_keeps_its_shares_of_a_run_of_any_length(trained: Path) -> None:
    policy = Policy.load(trained, "8-16-32")
    assert (policy.recipe.steps, policy.recipe.groups, policy.recipe.forced_steps) == (8, 2, 2)
    for steps, group_of_step, forced in ((4, (0, 0, 1, 1), 1), (8, (0,) * 4 + (1,) * 4, 2), (1, (0,), 0)):
        table = policy.table(steps)
        assert (table.group_of_step, table.forced_steps) == (group_of_step, forced)
