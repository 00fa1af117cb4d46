"""Proper scores of posterior samples: their expectation is lowest for samples of the true distribution.

Of two samples and the truth, the fair energy score is the mean distance of the samples to the truth less half their
distance to each other. With more spread than the truth has, the first term grows faster than the second; with less, the
second shrinks faster than the first. For numbers it is the continuous ranked probability score (CRPS).

Reference:
    Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, 2007; Lang et al., AIFS-CRPS:
    Ensemble Forecasting Using a Model Trained with a Loss Function Based on the CRPS, 2024 (fair scores as losses).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.errors import check_range
from miar_monai.training.losses import perceptual_distance

__all__ = ["PosteriorScore", "fair_energy_score", "random_filters"]

_SMALL = 1e-8  # added to squared distances, whose root has no gradient at 0; the score stays proper


def fair_energy_score(errors: Tensor, dim: int | None = None) -> Tensor:
    """Return the fair energy score of two samples, averaged over all elements: scalar.

    Args:
        errors: differences of the two samples to the truth, (B, 2, ...).
        dim: axis of the vectors that are compared by their Euclidean distance; by default each number is compared.

    Example:
        >>> truth, samples = torch.tensor([[1.0]]), torch.tensor([[0.0, 4.0]])
        >>> fair_energy_score(samples - truth)  # (1 + 3) / 2 - 4 / 2
        tensor(0.)
    """
    first, second = errors.unbind(dim=1)

    def distance(x: Tensor) -> Tensor:
        return (x.abs() if dim is None else (x.square().sum(dim=dim - 1) + _SMALL).sqrt()).mean()

    return (distance(first) + distance(second) - distance(first - second)) / 2


def random_filters(count: int, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw filters with a mean of 0 and a norm of 1: (count, 1, side, side).

    A half of them is white noise; the others are plane waves of all frequencies under a Hann window, since the response
    to white noise is mostly that of the strongest frequencies of an image.

    Args:
        count: number of filters.
        side: their side in voxels.
        device: where to draw them.

    Example:
        >>> filters = random_filters(3, 8)
        >>> bool(filters.mean().abs() < 1e-6), [round(x, 3) for x in filters.square().sum(dim=(1, 2, 3)).tolist()]
        (True, [1.0, 1.0, 1.0])
    """
    noise = torch.randn(count - count // 2, side, side, device=device)
    frequency = torch.rand(2, count // 2, 1, 1, device=device) - 0.5  # of rows and columns, in cycles per voxel
    phase = torch.rand(count // 2, 1, 1, device=device)
    position = torch.arange(side, device=device)
    cycles = frequency[0] * position[:, None] + frequency[1] * position + phase
    window = torch.hann_window(side + 2, periodic=False, device=device)[1:-1]
    waves = torch.cos(2 * torch.pi * cycles) * window[:, None] * window
    filters = torch.cat([noise, waves])[:, None]
    filters = filters - filters.mean(dim=(2, 3), keepdim=True)
    return filters / (filters.square().sum(dim=(2, 3), keepdim=True) + _SMALL).sqrt()


class PosteriorScore(nn.Module):
    """Fair energy score of two samples of images, of their voxels, patches and features.

    The score of single voxels sees only the distribution of each. That of patches sees also how voxels depend on each
    other, and with it the spectrum: patches are projected on random directions, that is, images and their averages over
    2 × 2 voxels are filtered by `random_filters`, which are new in each call (a sliced score). All filters have the
    same weight relative to the errors that they see, so that weak high frequencies count as much as strong low ones.

    Args:
        voxels: weight of the score of single voxels.
        patches: weight of the score of patches.
        features: weight of the score of LPIPS features, as vectors of unit length at each position of each layer; 0
            needs no weights.
        num_filters: number of filters for each of both resolutions.
        filter_side: side of the filters, in voxels; images have at least twice this side.
        network: backbone of the features; see `miar_monai.training.losses.ReconstructionLoss`.

    Raises:
        SettingError: if a weight is negative or a number is not positive.
        MissingWeightsError: if the backbone's weights are neither present nor downloadable.

    Reference:
        Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018 (features).

    Example:
        >>> score = PosteriorScore(features=0.0)
        >>> sorted(score(torch.rand(1, 2, 32, 32), torch.rand(1, 1, 32, 32)))
        ['patch_score', 'voxel_score']
    """

    def __init__(
        self,
        voxels: float = 1.0,
        patches: float = 1.0,
        features: float = 0.05,
        num_filters: int = 16,
        filter_side: int = 12,
        network: str = "alex",
    ) -> None:
        super().__init__()
        for name, value in (("voxels", voxels), ("patches", patches), ("features", features)):
            check_range(name, value, 0, float("inf"))
        for name, value in (("num_filters", num_filters), ("filter_side", filter_side)):
            check_range(name, value, 1, float("inf"))
        self.voxels, self.patches, self.features = voxels, patches, features
        self.num_filters = num_filters
        self.filter_side = filter_side
        self.lpips: Any = perceptual_distance(network).perceptual_function if features else None

    def train(self, mode: bool = True) -> PosteriorScore:
        """Stay in evaluation mode, whatever ``mode`` is, since LPIPS has dropout."""
        return super().train(False)

    def forward(self, samples: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the weighted scores of two samples (B, 2, H, W) of images in about [0, 1], by name.

        Args:
            samples: two samples of each image, (B, 2, H, W).
            target: the true images, (B, 1, H, W).
        """
        with torch.autocast(samples.device.type, enabled=False):  # small differences of large values
            samples, target = samples.float(), target.float()
            errors = samples - target
            parts = {"voxel_score": self.voxels * fair_energy_score(errors)}
            if self.patches:
                parts["patch_score"] = self.patches * self._patch_score(errors)
            if self.lpips is not None:
                parts["feature_score"] = self.features * self._feature_score(samples, target)
        return parts

    def _patch_score(self, errors: Tensor) -> Tensor:
        maps, scores = errors.flatten(0, 1)[:, None], []  # (B · 2, 1, H, W)
        for resolution in (maps, F.avg_pool2d(maps, 2)):
            filters = random_filters(self.num_filters, self.filter_side, errors.device)
            responses = F.conv2d(resolution, filters, stride=2)  # (B · 2, K, h, w); neighbors are nearly equal
            sizes = responses.detach().abs().mean(dim=(0, 2, 3), keepdim=True) + _SMALL  # (1, K, 1, 1)
            scores.append(fair_energy_score((responses * (sizes.mean() / sizes)).unflatten(0, (-1, 2))))
        return torch.stack(scores).mean()

    def _feature_score(self, samples: Tensor, target: Tensor) -> Tensor:
        images = torch.cat([samples, target], dim=1).flatten(0, 1)[:, None]  # (B · 3, 1, H, W)
        layers = self.lpips.net(self.lpips.scaling_layer(2 * images - 1))  # LPIPS expects images in [-1, 1]
        scores = []
        for layer in layers:
            features = F.normalize(layer, dim=1).unflatten(0, (-1, 3))  # (B, 3, C, H / s, W / s)
            scores.append(fair_energy_score(features[:, :2] - features[:, 2:], dim=2))
        return torch.stack(scores).mean()
