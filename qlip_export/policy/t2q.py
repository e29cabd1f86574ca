"""T2Q: predicts the quality of an image from the text embedding of its prompt (QLIP, table S5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlip_export.spec import T2Q_HIDDEN


class TextToQuality(nn.Module):
    """Three linear layers and a sigmoid; the first is the text encoder's own projection, frozen.

    Trained floats: ``C * 512 + 512 + 512 + 1``; for C = 768 that is 394,241, the paper's 1.5 MB (section F).
    """

    def __init__(self, projection: Tensor) -> None:
        """Take the projection's weight, (C, C_clip) float32."""
        super().__init__()
        self.register_buffer("projection", projection.detach().float().clone())
        self.hidden = nn.Linear(projection.shape[0], T2Q_HIDDEN)
        self.output = nn.Linear(T2Q_HIDDEN, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return q in (0, 1), shape (N,), for pooled embeddings before projection, (N, C_clip) float32."""
        projected = torch.relu(nn.functional.linear(pooled, self.projection))
        return torch.sigmoid(self.output(torch.relu(self.hidden(projected)))).squeeze(-1)
