"""The limit of posterior samples, by which patches of noise are taken out of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["LIMIT", "excess"]

LIMIT = 3.0
"""Highest root mean square of the deviation from the faithful estimate in a neighborhood, in expected errors: it is
about 1 where samples are sound, and from 4 to more than 10 in patches of noise."""

_WINDOW = 9  # HR voxels; patches of noise are 10 to 30 wide
_FLOOR = 0.005  # of the intensity range: what is less is not seen


def excess(deviations: Tensor, expected: Tensor) -> Tensor:
    """Return what samples have too much of their deviations from the faithful estimate: 0 up to the limit.

    The noise of an image can make a network amplify the noise that it draws, in isolated patches. There the deviation
    is several times the expected error, in a neighborhood and not in single voxels only. Beyond the limit, what remains
    of a deviation is multiplied by the squared ratio of the limit and its local root mean square: the further it is
    beyond the limit, the less of it remains.

    Args:
        deviations: (B, N, H, W), in network intensities.
        expected: expected absolute error of the faithful estimate, (B, 1, H, W).

    Returns:
        (B, N, H, W).

    Example:
        >>> import torch
        >>> expected = torch.full((1, 1, 16, 16), 0.1)
        >>> [round(float(excess(torch.full((1, 1, 16, 16), x), expected).mean()), 4) for x in (0.3, 0.63)]
        [0.0, 0.4725]
    """
    limit = LIMIT * (_local_mean(expected) + _FLOOR)
    power = _local_mean(deviations.square())
    return (1 - (limit.square() / power.clamp(min=1e-12)).clamp(max=1)) * deviations


def _local_mean(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)
