"""Which error to expect of a super-resolved voxel: from what the network itself leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from miar_monai.degradation import blur_matrix
from miar_monai.resampling import resample

__all__ = ["SIGNS", "ErrorModel", "signs", "smoothed"]

SIGNS = ("disagreement", "edges", "entropy")
"""What errors are expected from, see `signs`."""

_SIGMA = 1.5  # SR voxels: where errors are is known no better
_FLOOR = 1e-3  # of the range of intensities: smaller differences say nothing


def signs(sr: Tensor, estimates: Tensor, entropy: Tensor) -> Tensor:
    """Return what grows where errors do.

    Args:
        sr: super-resolved slices in network intensities, about [0, 1]: (B, 1, H, W).
        estimates: the perceptual and the faithful estimate that they are mixed of, (B, 2, H, W).
        entropy: of the tokens, in [0, 1], (B, 1, H, W).

    Returns:
        (B, 3, H, W): the logarithm of the absolute difference of both estimates, the logarithm of the length of the
        gradient, both averaged over a Gaussian neighborhood before, and the entropy.
    """
    with torch.autocast(sr.device.type, enabled=False):
        perceptual, faithful = estimates.split(1, dim=1)
        edges = torch.linalg.vector_norm(torch.stack(torch.gradient(sr, dim=(2, 3))), dim=0)
        sizes = smoothed(torch.cat([(perceptual - faithful).abs(), edges], dim=1))
        return torch.cat([(sizes + _FLOOR).log(), entropy.to(sr)], dim=1)


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
    hold for the weights, the fidelity and the kind of input that they were fitted to.

    Args:
        offset: in the logarithm of network intensities.
        disagreement: weight of the difference between the perceptual and the faithful estimate.
        edges: weight of the gradient.
        entropy: weight of the entropy of the tokens.

    Example:
        >>> flat = torch.full((1, 1, 8, 8), 0.5)
        >>> model = ErrorModel(offset=0.0, disagreement=1.0, edges=0.0, entropy=0.0)
        >>> model(flat, torch.cat([flat + 0.1, flat - 0.1], dim=1), torch.zeros(1, 1, 8, 8)).mean()
        tensor(0.2010)
    """

    offset: float
    disagreement: float
    edges: float
    entropy: float

    def __call__(self, sr: Tensor, estimates: Tensor, entropy: Tensor) -> Tensor:
        """Return the expected absolute error in network intensities, (B, 1, H, W); see `signs` for the arguments."""
        weights = sr.new_tensor([self.disagreement, self.edges, self.entropy]).view(1, -1, 1, 1)
        return (self.offset + (weights * signs(sr, estimates, entropy)).sum(dim=1, keepdim=True)).exp()
