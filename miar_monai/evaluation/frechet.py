"""Fréchet distance between the features of two sets of images: how different their distributions are.

The distance of single images to their truths does not matter to it, so images with plausible detail that is not true
are close. With the features of a network for photographs and a few patients, it orders methods measured on the same
slices, and no more: it is not comparable with other features, data or numbers of images.

Reference:
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from miar_monai.evaluation.metrics import METRICS, load_model

__all__ = ["LAYERS", "FeatureMoments", "alexnet_features", "frechet_distance"]

LAYERS = {"layer 2": 1, "layer 5": 4}
"""Layers of AlexNet by name: 192 features of patches of 51 voxels, and 256 of patches of 163 voxels."""


@dataclass(frozen=True)
class FeatureMoments:
    """Number, sum and sum of products of n feature vectors, in double precision; sets are added and subtracted.

    Example:
        >>> features = torch.randn(50, 3)
        >>> first, rest = FeatureMoments.of(features[:20]), FeatureMoments.of(features[20:])
        >>> mean, covariance = (first + rest).normal()
        >>> mean.allclose(features.double().mean(dim=0)), covariance.allclose(features.double().T.cov())
        (True, True)
    """

    count: int
    total: Tensor
    """(C,)."""
    products: Tensor
    """(C, C)."""

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """Return the moments of feature vectors, (n, C), on the CPU."""
        values = features.double()
        return cls(len(values), values.sum(dim=0).cpu(), (values.T @ values).cpu())

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        return FeatureMoments(self.count + other.count, self.total + other.total, self.products + other.products)

    def __sub__(self, other: FeatureMoments) -> FeatureMoments:
        return FeatureMoments(self.count - other.count, self.total - other.total, self.products - other.products)

    def normal(self) -> tuple[Tensor, Tensor]:
        """Return the mean, (C,), and the covariance, (C, C), of the vectors."""
        mean = self.total / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """Return the Fréchet distance between normal distributions with the moments of two sets of features.

    It is above 0 for two sets of the same distribution, the more so the fewer vectors there are for each feature.

    Args:
        first: with clearly more vectors than features.
        second: the same.

    Returns:
        The distance; NaN if a set has fewer than 2 vectors.

    Example:
        >>> features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> moments, moved = FeatureMoments.of(features), FeatureMoments.of(features + torch.tensor([3.0, 4.0, 0.0]))
        >>> round(frechet_distance(moments, moved), 3)
        25.0
    """
    if min(first.count, second.count) < 2:
        return float("nan")
    (mean, covariance), (other_mean, other_covariance) = first.normal(), second.normal()
    # monai.metrics.fid fails for singular covariances, of few vectors; those of a symmetric product are no problem
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    common = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    shift = (mean - other_mean).square().sum()
    return float(shift + covariance.trace() + other_covariance.trace() - 2 * common)


def alexnet_features(device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Load AlexNet, as LPIPS uses it, and return a function from images and masks to features.

    Args:
        device: where the network runs.

    Returns:
        ``features(images, mask)`` takes images (N, 1, H, W) in [0, 1] and a bool mask of the same shape, and returns
        the feature vectors of each of the `LAYERS` at the positions of which the mask covers at least a half: (n, C).

    Raises:
        MissingWeightsError: if lpips or the weights are missing.
    """
    model = load_model(replace(METRICS["LPIPS"], name="Fréchet distance"), device)

    @torch.no_grad()
    def features(images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        rgb = 2 * images.float().clamp(0, 1).expand(-1, 3, -1, -1) - 1
        outputs = model.net(model.scaling_layer(rgb))
        found = {}
        for name, layer in LAYERS.items():
            inside = F.interpolate(mask.float(), outputs[layer].shape[-2:], mode="area")[:, 0] >= 0.5
            found[name] = outputs[layer].movedim(1, -1)[inside]  # (n, C)
        return found

    return features
