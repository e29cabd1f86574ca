"""`policy.onnx` gives the quality that torch gives and exactly the bits of the table."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from qlip_export.policy.graph import policy_graph
from qlip_export.policy.q2b import QualityToBits, timestep_groups
from qlip_export.policy.t2q import TextToQuality


def test_graph_agrees_with_torch_and_table() -> None:
    torch.manual_seed(0)
    t2q = TextToQuality(torch.randn(24, 32))
    torch.nn.init.normal_(t2q.output.weight, std=2.0)
    q2b = QualityToBits((6, 8, 16, 32), units=7, groups=3, parts=frozenset("qmh"))
    for parameter in q2b.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    table = q2b.table([f"u{i}" for i in range(7)], timestep_groups(6, 3), forced_steps=1)
    model = policy_graph(
        t2q.projection.numpy(),
        (t2q.hidden.weight.detach().numpy(), t2q.hidden.bias.detach().numpy()),
        (t2q.output.weight.detach().numpy(), t2q.output.bias.detach().numpy()),
        table,
    )
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    pooled = torch.randn(500, 32)
    quality, bits, forced = session.run(None, {"pooled": pooled.numpy()})
    np.testing.assert_allclose(quality, t2q(pooled).detach().numpy(), atol=1e-5)
    assert quality.std() > 0.1, "qualities that do not vary test nothing"
    for q, found in zip(quality, bits, strict=True):
        for step in range(1, 6):
            assert tuple(found[table.group_of_step[step]]) == table.bits(float(q), step)
    assert tuple(forced[0]) == table.bits(0.3, 0)
    assert [list(row) for row in forced] == [[c.forced for c in row] for row in table.choices]


def test_t2q_has_the_papers_size_and_a_frozen_projection() -> None:
    t2q = TextToQuality(torch.zeros(768, 768))
    trained = sum(p.numel() for p in t2q.parameters())
    assert trained == 394_241
    assert round(trained * 4 / 2**20, 2) == 1.5
    assert not t2q.projection.requires_grad
    q = t2q(torch.randn(3, 768))
    assert q.shape == (3,)
    assert bool(((q > 0) & (q < 1)).all())
