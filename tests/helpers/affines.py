from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def upscaled_affine(affine: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """Return the affine of an image with ``factors`` times as many voxels over the same field of view."""
    steps = 1 / np.asarray(factors, dtype=np.float64)
    scaling = np.diag([*steps, 1.0])
    scaling[:3, 3] = (steps - 1) / 2  # voxel 0 moves, so that the outer corners stay
    return np.asarray(affine, dtype=np.float64) @ scaling
