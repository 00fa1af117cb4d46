"""The linear components of MIAR: front end, back end and noise model."""

from __future__ import annotations

import torch
from torch import Tensor

from miar_monai.degradation import SeparableOperator
from miar_monai.errors import check_range
from miar_monai.networks.results import Observation

__all__ = ["DataConsistency", "Interpolation", "LinearInverse", "NoConsistency", "NoiseModel"]


class NoiseModel:
    """Damping and weight of the network estimate, as functions of the estimated noise of each slice.

    Args:
        min_damping: damping of a noiseless slice; see `SeparableOperator`.
        signal_std: prior standard deviation of the detail to be restored, in intensity units; the damping is the noise
            of the LR slice divided by it (Wiener filter).
        max_training_noise: highest noise of the training data, in intensity units. Above it the result moves towards
            the linear estimate, because networks mistake such noise for detail.

    Raises:
        SettingError: if a setting is not a positive number.
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
    """Front end: the damped linear inverse of the degradation."""

    def __call__(self, lr: Tensor, operator: SeparableOperator, damping: Tensor) -> Tensor:
        """Map LR slices (B, 1, h, w) to their linear estimate (B, 1, H, W)."""
        return operator.restore(lr, damping)


class Interpolation:
    """Front end of the paper (Sec. 3.2): bicubic interpolation."""

    def __call__(self, lr: Tensor, operator: SeparableOperator, damping: Tensor) -> Tensor:
        """Map LR slices (B, 1, h, w) to their bicubic interpolation (B, 1, H, W)."""
        return operator.interpolate(lr)


class DataConsistency:
    """Back end: correct maps to be consistent with the LR slices, and mix in the linear estimate by the noise model."""

    def __call__(self, maps: Tensor, observed: Observation) -> Tensor:
        """Correct maps (B, C, H, W)."""
        maps = observed.operator.prox(maps, observed.lr, observed.damping)
        return torch.lerp(observed.linear, maps, observed.network_weight)


class NoConsistency:
    """Back end of the paper: no correction."""

    def __call__(self, maps: Tensor, observed: Observation) -> Tensor:
        """Return maps (B, C, H, W) unchanged."""
        return maps
