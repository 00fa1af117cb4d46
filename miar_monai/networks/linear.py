"""The linear components of MIAR: the input of the networks, and the correction of their output."""

from __future__ import annotations

import torch
from torch import Tensor

from miar_monai.degradation import SeparableOperator
from miar_monai.errors import check_range
from miar_monai.networks.results import Observation

__all__ = ["DataConsistency", "Interpolation", "LinearInverse", "NoConsistency", "NoiseModel"]


class NoiseModel:
    """Damping and weight of the network estimate, from the noise that is measured in each slice.

    Args:
        min_damping: damping of a noiseless slice; see `SeparableOperator`.
        signal_std: prior standard deviation of the detail to be restored, in units of the intensities (Wiener filter):
            the damping is the noise of the LR slice over it.
        max_training_noise: the highest noise of the training, in units of the intensities. Beyond it the result moves
            to the linear estimate: a network takes unknown noise for detail.

    Raises:
        ConfigurationError: if a setting is not a positive number.
    """

    def __init__(self, min_damping: float = 1e-3, signal_std: float = 0.2, max_training_noise: float = 0.02) -> None:
        for name, value in (
            ("min_damping", min_damping),
            ("signal_std", signal_std),
            ("max_training_noise", max_training_noise),
        ):
            check_range(name, value, 1e-12, float("inf"))
        self.min_damping = min_damping
        self.signal_std = signal_std
        self.max_training_noise = max_training_noise

    def __call__(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the damping and the weight of the network estimate for noise levels (B, 1, 1, 1)."""
        damping = (noise / self.signal_std).clamp(min=self.min_damping)
        weight = (self.max_training_noise / noise.clamp(min=self.max_training_noise)).square()
        return damping, weight


class LinearInverse:
    """Front end: the damped linear inverse of the degradation is the input of the networks."""

    def __call__(self, lr: Tensor, operator: SeparableOperator, damping: Tensor) -> Tensor:
        """Map LR slices (B, 1, h, w) to their linear estimate (B, 1, H, W)."""
        return operator.restore(lr, damping)


class Interpolation:
    """Front end of the paper (Sec. 3.2): the upsampled LR image is the input of the networks."""

    def __call__(self, lr: Tensor, operator: SeparableOperator, damping: Tensor) -> Tensor:
        """Map LR slices (B, 1, h, w) to their bicubic interpolation (B, 1, H, W)."""
        return operator.interpolate(lr)


class DataConsistency:
    """Back end: maps are corrected to explain the LR slices, and move to the linear estimate where noise is unknown."""

    def __call__(self, maps: Tensor, observed: Observation) -> Tensor:
        """Correct maps (B, C, H, W)."""
        maps = observed.operator.prox(maps, observed.lr, observed.damping)
        return torch.lerp(observed.linear, maps, observed.network_weight)


class NoConsistency:
    """Back end of the paper: the maps of the decoder are the result."""

    def __call__(self, maps: Tensor, observed: Observation) -> Tensor:
        """Return maps (B, C, H, W) as they are."""
        return maps
