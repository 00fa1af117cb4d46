"""Results of the steps of MIAR, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from miar_monai.degradation import SeparableOperator

__all__ = ["ErrorEstimator", "Estimate", "LRFeatures", "Observation", "Prediction"]


class Observation(NamedTuple):
    """LR slices of any size, and what follows from them in closed form."""

    lr: Tensor
    """(B, 1, h, w)."""
    operator: SeparableOperator
    """Their degradation, for one size of slices."""
    linear: Tensor
    """The linear estimate of the HR images, input of the networks: (B, 1, H, W)."""
    damping: Tensor
    """Damping of the inverse of the degradation, from the noise of each slice: (B, 1, 1, 1)."""
    min_damping: float
    """Damping of a noiseless slice."""
    network_weight: Tensor
    """Weight of the network estimate in the result, the rest being the linear estimate, in [0, 1]: (B, 1, 1, 1)."""

    @property
    def condition(self) -> Tensor:
        """Conditioning vector of the networks, log-damping and blur, both centered near 0: (B, 2, 1, 1)."""
        sigma = torch.zeros_like(self.damping) + self.operator.sigma
        return torch.cat([self.damping.log10() + 2, sigma - 1], dim=1)

    @property
    def suppressed_by_noise(self) -> Tensor:
        """Fraction of the coefficients of a slice that its noise suppresses in the linear estimate: (B, 1, 1, 1)."""
        lowest = torch.full_like(self.damping, self.min_damping)
        return self.operator.suppressed_fraction(self.damping) - self.operator.suppressed_fraction(lowest)


class LRFeatures(NamedTuple):
    """Inputs of the transformer and the decoder that come from the LR image."""

    linear: Tensor
    """Linear estimate of the HR images: (B, 1, H, W)."""
    f_lr: Tensor
    """On the latent grid, for cross-attention: (B, context_channels, G, G)."""
    skip: Tensor
    """On the grid of the encoder's patches, for the decoder: (B, skip_channels, H / p, W / p)."""


class Prediction(NamedTuple):
    """Output of the networks for some tiles."""

    maps: Tensor
    """The perceptual and the faithful map, not corrected yet: (B, 2, H, W)."""
    entropy: Tensor | None = None
    """Entropy of the tokens, in [0, 1], if it was asked for: (B, 1, H, W)."""
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
    """Weight of the network estimate in each image, see `Observation`: (B, 1, 1, 1)."""
    error: Tensor | None = None
    """Expected absolute error of ``image``, if there is an error model: (B, 1, H, W)."""


ErrorEstimator = Callable[[Estimate, Tensor, Tensor], Tensor]
"""From an estimate, the entropy (B, 1, H, W) and the fraction that noise suppresses (B, 1, 1, 1) to the error."""
