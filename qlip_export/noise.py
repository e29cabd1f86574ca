"""The noise that a run starts from: the same for the same seed, wherever it is drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def seeded_noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return unit-variance noise; the same for the same seed on every machine (Philox)."""
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)
