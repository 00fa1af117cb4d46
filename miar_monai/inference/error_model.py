"""The expected error of each voxel, predicted from the uncertainty of the networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from miar_monai.degradation import blur_matrix
from miar_monai.degradation.resampling import resample
from miar_monai.networks.results import Estimate

__all__ = ["PREDICTORS", "ErrorModel", "error_predictors", "smoothed"]

PREDICTORS = ("disagreement", "edges", "entropy", "noise")
"""Names of the predictors; see `error_predictors`."""

_SIGMA = 1.5  # SR voxels: localization accuracy of errors
_FLOOR = 1e-3  # of the intensity range: smaller differences carry no information
_MIN_WEIGHT = 1e-3  # below, the disagreement is mostly rounding error


def error_predictors(estimate: Estimate, entropy: Tensor | None, suppressed: Tensor) -> Tensor:
    """Return predictors of the error of super-resolved slices, in network intensities, about [0, 1].

    Args:
        estimate: the super-resolved slices.
        entropy: entropy of the tokens, in [0, 1], (B, 1, H, W); None without tokens.
        suppressed: fraction of the coefficients suppressed because of noise, in [0, 1], (B, 1, 1, 1).

    Returns:
        (B, 4, H, W): the log of the absolute difference of the perceptual and the faithful estimate (divided by the
        network weight, because both share the linear estimate), the log of the gradient magnitude, both after Gaussian
        smoothing, the entropy, and the suppressed fraction.
    """
    image = estimate.image
    with torch.autocast(image.device.type, enabled=False):
        difference = (estimate.perceptual - estimate.faithful).abs()
        disagreement = difference / estimate.network_weight.clamp(min=_MIN_WEIGHT)
        edges = torch.linalg.vector_norm(torch.stack(torch.gradient(image, dim=(2, 3))), dim=0)
        sizes = smoothed(torch.cat([disagreement, edges], dim=1))
        entropy = torch.zeros_like(image) if entropy is None else entropy.to(image)
        return torch.cat([(sizes + _FLOOR).log(), entropy, suppressed.to(image).expand_as(image)], dim=1)


def smoothed(images: Tensor) -> Tensor:
    """Smooth images (B, C, H, W) with a Gaussian, edges replicated."""
    rows, columns = (_neighborhood(size, images.dtype, images.device) for size in images.shape[2:])
    return resample(images, rows, columns)


@lru_cache(maxsize=16)
def _neighborhood(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cache outlives the caller's inference mode
        return blur_matrix(size, _SIGMA).to(device, dtype)


@dataclass(frozen=True)
class ErrorModel:
    """The expected absolute error of each voxel: ``exp(offset + Σ weight · predictor)``, see `error_predictors`.

    The coefficients come from a Poisson regression on the absolute errors of validation patients, which reproduces
    their mean; they are valid for the weights, the fidelity and the kind of input used for the fit. Noise destroys
    information without changing the other predictors, so it has its own coefficient, fitted to noisy slices afterwards.

    Args:
        offset: intercept, in the log of network intensities.
        disagreement: coefficient of the difference between the perceptual and the faithful estimate.
        edges: coefficient of the gradient magnitude.
        entropy: coefficient of the entropy of the tokens.
        noise: coefficient of the suppressed fraction.

    Example:
        >>> flat, one = torch.full((1, 1, 8, 8), 0.5), torch.ones(1, 1, 1, 1)
        >>> model = ErrorModel(offset=0.0, disagreement=1.0, edges=0.0, entropy=0.0)
        >>> model(Estimate(flat, flat + 0.1, flat - 0.1, one), torch.zeros(1, 1, 8, 8), 0 * one).mean()
        tensor(0.2010)
    """

    offset: float
    disagreement: float
    edges: float
    entropy: float
    noise: float = 0.0

    def __call__(self, estimate: Estimate, entropy: Tensor | None, suppressed: Tensor) -> Tensor:
        """Return the expected error in network intensities, (B, 1, H, W); for the arguments see `error_predictors`."""
        predictors = error_predictors(estimate, entropy, suppressed)  # (B, 4, H, W)
        log_error = torch.full_like(predictors[:, :1], self.offset)
        for name, predictor in zip(PREDICTORS, predictors.split(1, dim=1), strict=True):
            log_error = log_error + getattr(self, name) * predictor  # a tensor of weights cannot reach a CUDA graph
        return log_error.exp()
