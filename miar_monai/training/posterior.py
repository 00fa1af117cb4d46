"""The objective of posterior samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from miar_monai.evaluation.probabilistic import spread_over_skill
from miar_monai.training.estimation import EstimatorObjective

__all__ = ["PosteriorObjective"]


class PosteriorObjective(EstimatorObjective):
    """Losses of an `Estimator` that samples: those of its two estimates, and the score of two samples of each image.

    Estimates and samples are one batch: each image once without noise, and twice with noise of its own. The samples are
    corrected by the data consistency before they are scored, as the estimates are.

    Args:
        score: maps samples (B, 2, H, W) and HR images (B, 1, H, W) to named losses, such as
            `miar_monai.training.scores.PosteriorScore`.
        **settings: see `EstimatorObjective`.

    Raises:
        SettingError: if the network has no ``noise_channels``, or a setting is out of range.

    Reference:
        Alet et al., Skillful Joint Probabilistic Weather Forecasting from Marginals, 2025.

    Example:
        >>> from miar_monai.degradation import Member, OperatorFamily, through_plane_degradations
        >>> from miar_monai.networks import Estimator
        >>> from miar_monai.training.losses import ReconstructionLoss
        >>> from miar_monai.training.scores import PosteriorScore
        >>> family = OperatorFamily([Member(through_plane_degradations([2, 3]), 1)], 32)
        >>> network = Estimator(channels=(8, 16), blocks=(1, 1), noise_channels=1)
        >>> loss = ReconstructionLoss(1.0, 0.0, perceptual=0.0)
        >>> objective = PosteriorObjective(PosteriorScore(features=0.0), network=network, family=family,
        ...     reconstruction=loss)
        >>> sorted(objective(torch.rand(2, 1, 32, 32)))
        ['faithful_loss', 'loss', 'patch_score', 'perceptual_loss', 'spread_over_skill', 'voxel_score']
    """

    def __init__(self, score: nn.Module, **settings: Any) -> None:
        super().__init__(**settings)
        self.network.check_samples()
        self.score = score

    def forward(self, hr: Tensor, guide: Tensor | None = None) -> dict[str, Tensor]:
        """Return the named losses of a batch; ``"loss"`` is the sum, ``"spread_over_skill"`` is not a loss.

        Args:
            hr: see `EstimatorObjective`.
            guide: see `EstimatorObjective`.
        """
        observed = self.observe(hr, guide)
        images, condition = (torch.cat([x] * 3) for x in (observed.images, self.network.condition(observed)))
        noise = self.network.white_noise(observed.operator, [2 * len(hr)])  # (2 · B, noise_channels, H, W)
        noise = torch.cat([torch.zeros_like(noise[: len(hr)]), noise])
        estimates, first, second = self.network.maps(images, condition, noise).chunk(3)  # (B, 3, H, W)
        maps = torch.cat([estimates[:, :2], first[:, 2:], second[:, 2:]], dim=1)  # (B, 4, H, W)
        corrected = self.network.correct(maps, observed).float()
        samples = corrected[:, 2:]
        parts = self.losses(corrected[:, :2], hr)
        scores: Mapping[str, Tensor] = self.score(samples, hr)
        total = parts["loss"] + torch.stack([*scores.values()]).sum()
        with torch.no_grad():
            ratio = spread_over_skill(samples - hr)
        return {**parts, **scores, "spread_over_skill": ratio, "loss": total}
