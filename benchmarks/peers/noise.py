"""Initial noise of the peers that sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def equal_noise(images: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Return normal noise (B, *shape), the same for each of the images (B, ...), in each call and on each device.

    Example:
        >>> noise = equal_noise(torch.zeros(2, 1, 4, 4), (3, 5), seed=0)
        >>> noise.shape, torch.equal(noise[0], noise[1])
        (torch.Size([2, 3, 5]), True)
    """
    # on the CPU, since random numbers differ between kinds of devices
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(images).expand(len(images), *shape)
