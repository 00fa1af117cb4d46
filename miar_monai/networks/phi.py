"""The φ convolutions of the quantizer, and their assignment to scales."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

__all__ = ["Phi", "nearest_tick"]


class Phi(nn.Module):
    """Blend of a map with its 3 × 3 convolution, which restores detail that upsampling a token map loses (VAR).

    It is initialized as the identity: a random blend would halve the contribution of each scale, and training would
    take long to undo that.
    """

    def __init__(self, channels: int, ratio: float = 0.5) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]  # the bias exists

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, C, G, G) to (B, C, G, G)."""
        return torch.lerp(h, self.conv(h), self.ratio)


def nearest_tick(k: int, num_scales: int, num_ticks: int) -> int:
    """Return the index of the tick nearest to k / (K - 1), of n ticks from 1 / 3n to 1 - 1 / 3n; in a tie the lower.

    VAR's rule in exact arithmetic: with K = 10 and n = 4 two scales lie exactly between two ticks, and rounding must
    not decide which convolution a trained tokenizer uses.

    Example:
        >>> [nearest_tick(k, 10, 4) for k in range(10)]
        [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    """
    position = Fraction(k, max(num_scales - 1, 1))
    first, spacing = Fraction(1, 3 * num_ticks), Fraction(3 * num_ticks - 2, 3 * num_ticks * max(num_ticks - 1, 1))
    return min(range(num_ticks), key=lambda tick: abs(first + tick * spacing - position))
