"""Which error to expect of a super-resolved voxel: from what the network itself leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from miar_monai.degradation.operators import blur_matrix
from miar_monai.degradation.resampling import resample

__all__ = ["SIGNS", "ErrorModel", "signs", "smoothed"]

SIGNS = ("disagreement", "edges", "entropy", "noise")
"""What errors are expected from, see `signs`."""

_SIGMA = 1.5  # SR voxels: where errors are is known no better
_FLOOR = 1e-3  # of the range of intensities: smaller differences say nothing
_LEAST_TRUST = 1e-3  # below, rounding is most of what is left of a disagreement


def signs(sr: Tensor, estimates: Tensor, entropy: Tensor, trust: Tensor, noise: Tensor) -> Tensor:
    """Return what grows where errors do.

    Args:
        sr: super-resolved slices in network intensities, about [0, 1]: (B, 1, H, W).
        estimates: the perceptual and the faithful estimate that they are mixed of, (B, 2, H, W).
        entropy: of the tokens, in [0, 1], (B, 1, H, W).
        trust: share of what was learned in the estimates, (B, 1, 1, 1).
        noise: share of the LR slice that noise takes from the linear estimate, in [0, 1], (B, 1, 1, 1).

    Returns:
        (B, 4, H, W): the logarithm of the absolute difference of both estimates (as it was before the linear estimate,
        in which they agree, got its share), the logarithm of the length of the gradient, both averaged over a Gaussian
        neighborhood before, the entropy and the noise.
    """
    with torch.autocast(sr.device.type, enabled=False):
        perceptual, faithful = estimates.split(1, dim=1)
        disagreement = (perceptual - faithful).abs() / trust.clamp(min=_LEAST_TRUST)
        edges = torch.linalg.vector_norm(torch.stack(torch.gradient(sr, dim=(2, 3))), dim=0)
        sizes = smoothed(torch.cat([disagreement, edges], dim=1))
        return torch.cat([(sizes + _FLOOR).log(), entropy.to(sr), noise.to(sr).expand_as(sr)], dim=1)


def smoothed(images: Tensor) -> Tensor:
    """Return the means of images, (B, C, H, W), over Gaussian neighborhoods, edges replicated."""
    rows, columns = (_neighborhood(size, images.dtype, images.device) for size in images.shape[2:])
    return resample(images, rows, columns)


@lru_cache(maxsize=16)
def _neighborhood(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cache outlives the caller's inference mode
        return blur_matrix(size, _SIGMA).to(device, dtype)


@dataclass(frozen=True)
class ErrorModel:
    """The expected absolute error of each voxel: ``exp(offset + Σ weight · sign)``, see `signs`.

    A Poisson regression on the absolute errors of validation patients gives the numbers, so their mean is met; they
    hold for the weights, the fidelity and the kind of input that they were fitted to. What noise takes from an LR
    slice, the other signs do not show: it has a weight of its own, fitted to noisy slices afterwards.

    Args:
        offset: in the logarithm of network intensities.
        disagreement: weight of the difference between the perceptual and the faithful estimate.
        edges: weight of the gradient.
        entropy: weight of the entropy of the tokens.
        noise: weight of the noise of the LR slice.

    Example:
        >>> flat, one = torch.full((1, 1, 8, 8), 0.5), torch.ones(1, 1, 1, 1)
        >>> model = ErrorModel(offset=0.0, disagreement=1.0, edges=0.0, entropy=0.0)
        >>> model(flat, torch.cat([flat + 0.1, flat - 0.1], dim=1), torch.zeros(1, 1, 8, 8), one, 0 * one).mean()
        tensor(0.2010)
    """

    offset: float
    disagreement: float
    edges: float
    entropy: float
    noise: float = 0.0

    def __call__(self, sr: Tensor, estimates: Tensor, entropy: Tensor, trust: Tensor, noise: Tensor) -> Tensor:
        """Return the expected absolute error in network intensities, (B, 1, H, W); see `signs` for the arguments."""
        weights = sr.new_tensor([getattr(self, name) for name in SIGNS]).view(1, -1, 1, 1)
        return (self.offset + (weights * signs(sr, estimates, entropy, trust, noise)).sum(dim=1, keepdim=True)).exp()
