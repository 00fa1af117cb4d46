"""Named results of the steps of MIAR."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from miar_monai.degradation import SeparableOperator

__all__ = ["ErrorEstimator", "Estimate", "LRFeatures", "Observation", "Prediction"]


class Observation(NamedTuple):
    """LR slices of any size with their linear estimate and noise-dependent weights."""

    lr: Tensor
    """(B, 1, h, w)."""
    operator: SeparableOperator
    """Operator of their degradation."""
    linear: Tensor
    """Linear estimate of the HR images, the input of the networks: (B, 1, H, W)."""
    damping: Tensor
    """Damping of the inverse of the degradation: (B, 1, 1, 1)."""
    min_damping: float
    """Damping of a noiseless slice."""
    network_weight: Tensor
    """Weight of the network estimate in the result, in [0, 1]; the linear estimate has the rest: (B, 1, 1, 1)."""
    guide: Tensor | None = None
    """Another contrast on the HR grid, for networks with a guide: (B, 1, H, W)."""

    @property
    def images(self) -> Tensor:
        """Input of the networks, the linear estimate and the guide if there is one: (B, 1 or 2, H, W)."""
        return self.linear if self.guide is None else torch.cat([self.linear, self.guide], dim=1)

    @property
    def condition(self) -> Tensor:
        """Conditioning vector of `MIAR`, log-damping and blur, both centered near 0: (B, 2, 1, 1)."""
        sigma = torch.zeros_like(self.damping) + self.operator.sigma
        return torch.cat([self.damping.log10() + 2, sigma - 1], dim=1)

    @property
    def resolution(self) -> Tensor:
        """Conditioning vector of `Estimator`, all centered near 0: (B, 5, 1, 1).

        Log-damping and, for the rows and for the columns, the binary logarithms of the factor and of the effective
        factor, by which profile and blur together lower the resolution.
        """
        axes = [f for axis in (self.operator.rows, self.operator.columns) for f in (axis.factor, axis.effective_factor)]
        logs = [torch.zeros_like(self.damping) + axis.log2()[..., None, None] - 1 for axis in axes]
        return torch.cat([self.damping.log10() + 2, *logs], dim=1)

    @property
    def suppressed_by_noise(self) -> Tensor:
        """Fraction of the coefficients suppressed in the linear estimate because of noise: (B, 1, 1, 1)."""
        lowest = torch.full_like(self.damping, self.min_damping)
        return self.operator.suppressed_fraction(self.damping) - self.operator.suppressed_fraction(lowest)


class LRFeatures(NamedTuple):
    """Features of the LR image, inputs of the transformer and the decoder."""

    linear: Tensor
    """Linear estimate of the HR images: (B, 1, H, W)."""
    f_lr: Tensor
    """Features for cross-attention, on the latent grid: (B, context_channels, G, G)."""
    skip: Tensor
    """Features for the decoder, on the grid of the encoder's patches: (B, skip_channels, H / p, W / p)."""


class Prediction(NamedTuple):
    """Output of the networks for a batch of tiles."""

    maps: Tensor
    """The uncorrected perceptual and faithful map: (B, 2, H, W)."""
    entropy: Tensor | None = None
    """Entropy of the tokens, in [0, 1], if requested: (B, 1, H, W)."""
    tokens: Tensor | None = None
    """(B, L · S), int64."""
    score: Tensor | None = None
    """Log-probability of the tokens: (B,)."""


class Estimate(NamedTuple):
    """Super-resolved images."""

    image: Tensor
    """(B, 1, H, W)."""
    perceptual: Tensor
    """The perceptual estimate, fidelity 0: (B, 1, H, W)."""
    faithful: Tensor
    """The faithful estimate, fidelity 1: (B, 1, H, W)."""
    network_weight: Tensor
    """Weight of the network estimate in each image; see `Observation`: (B, 1, 1, 1)."""
    error: Tensor | None = None
    """Expected absolute error of ``image``, if there is an error model: (B, 1, H, W)."""


ErrorEstimator = Callable[[Estimate, Tensor | None, Tensor], Tensor]
"""Maps an estimate, the entropy (B, 1, H, W) or None, and the suppressed fraction (B, 1, 1, 1) to the error."""
