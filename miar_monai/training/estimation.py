"""The objective of the estimator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.degradation import OperatorFamily
from miar_monai.errors import check_range
from miar_monai.networks import Estimator
from miar_monai.networks.results import Observation

__all__ = ["EstimatorObjective"]


class EstimatorObjective(nn.Module):
    """Losses of an `Estimator` on HR slices, each degraded by an operator of its own.

    Degradation, noise and the dropout of the guide are drawn on the device in each call. Both maps are corrected by the
    data consistency before they are compared, so that the network only learns what the LR image does not determine.

    Args:
        network: the network to train.
        family: the degradations.
        reconstruction: loss of the perceptual map; that of the faithful map is the mean absolute error.
        noise: lowest and highest standard deviation of the noise, in intensity units; the logarithm is uniform.
        noise_prob: fraction of the LR images with noise.
        guide_prob: fraction of the images that keep their guide.
        mismatch_prob: fraction of the images whose degradation is assumed wrongly, as a similar one of the family.
            Native images are never degraded exactly as assumed; a blur that they do not have amplifies their detail.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> from miar_monai.degradation import Member, through_plane_degradations
        >>> from miar_monai.training.losses import ReconstructionLoss
        >>> family = OperatorFamily([Member(through_plane_degradations([2, 3]), 1)], 16)
        >>> network = Estimator(channels=(8, 16), blocks=(1, 1))
        >>> objective = EstimatorObjective(network, family, ReconstructionLoss(1.0, 0.0, perceptual=0.0))
        >>> sorted(objective(torch.rand(2, 1, 16, 16)))
        ['faithful_loss', 'loss', 'perceptual_loss']
    """

    def __init__(
        self,
        network: Estimator,
        family: OperatorFamily,
        reconstruction: nn.Module,
        noise: Sequence[float] = (1e-4, 0.02),
        noise_prob: float = 0.35,
        guide_prob: float = 0.5,
        mismatch_prob: float = 0.0,
    ) -> None:
        super().__init__()
        shares = {"noise_prob": noise_prob, "guide_prob": guide_prob, "mismatch_prob": mismatch_prob}
        for name, share in shares.items():
            check_range(name, share, 0, 1)
        for value in noise:
            check_range("noise", value, 1e-9, 1)
        self.network = network
        self.family = family
        self.reconstruction = reconstruction
        self.noise = tuple(noise)
        self.noise_prob = noise_prob
        self.guide_prob = guide_prob
        self.mismatch_prob = mismatch_prob

    def forward(self, hr: Tensor, guide: Tensor | None = None) -> dict[str, Tensor]:
        """Return the named losses of a batch; ``"loss"`` is the sum.

        Args:
            hr: HR images, (B, 1, H, W), H and W as the family has them.
            guide: another contrast of each, (B, 1, H, W); 0 where there is none.
        """
        observed = self.observe(hr, guide)
        maps = self.network.maps(observed.images, self.network.condition(observed))[:, :2]
        return self.losses(self.network.correct(maps, observed).float(), hr)

    def observe(self, hr: Tensor, guide: Tensor | None = None) -> Observation:
        """Degrade HR images, each by an operator and noise of its own, and observe the LR images.

        Args:
            hr: HR images, (B, 1, H, W).
            guide: another contrast of each, some of which are left out.
        """
        one_each = (len(hr), 1, 1, 1)
        drawn = self.family.sample(len(hr))
        operator = self.family.select(drawn)
        low, high = self.noise
        std = low * (high / low) ** torch.rand(one_each, device=hr.device)
        std = std * (torch.rand(one_each, device=hr.device) < self.noise_prob)
        lr = self.family.noisy(operator.A(hr), operator, std)
        if guide is not None:
            guide = guide * (torch.rand(one_each, device=hr.device) < self.guide_prob)
        assumed = self.family.select(self.family.mistaken(drawn, self.mismatch_prob))
        return self.network.observe(lr, assumed, guide)

    def losses(self, maps: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Return the named losses of corrected maps, the perceptual and the faithful one, (B, 2, H, W)."""
        perceptual, faithful = maps.split(1, dim=1)
        parts = {
            "faithful_loss": F.l1_loss(faithful, hr),
            "perceptual_loss": self.reconstruction(perceptual, hr),
        }
        return parts | {"loss": parts["faithful_loss"] + parts["perceptual_loss"]}
