"""Quality of posterior samples and of expected errors: spread, scores, order of errors, and spectra."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["fair_crps", "laplace_crps", "radial_power", "sparsification_error", "spread_over_skill"]


def spread_over_skill(errors: Tensor) -> Tensor:
    """Return the ratio of the spread of samples to the error of their mean, which is 1 for the true distribution.

    Args:
        errors: differences of N samples to the truth, (B, N, ...).

    Returns:
        The root of (N + 1) / N · mean variance / mean squared error of the mean: scalar.

    Reference:
        Fortin et al., Why Should Ensemble Spread Match the RMSE of the Ensemble Mean?, 2014.

    Example:
        >>> samples = torch.randn(200000, 4, generator=torch.Generator().manual_seed(0))
        >>> truth = torch.randn(200000, 1, generator=torch.Generator().manual_seed(1))
        >>> round(spread_over_skill(samples - truth).item(), 2)
        1.0
    """
    count = errors.shape[1]
    variance, squared_error = errors.var(dim=1).mean(), errors.mean(dim=1).square().mean()
    return ((count + 1) / count * variance / squared_error.clamp(min=1e-12)).sqrt()


def fair_crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Return the continuous ranked probability score (CRPS) of samples, whose expectation does not depend on N.

    Args:
        samples: N samples of each number, (n, N), with N of at least 2.
        truth: the true numbers, (n,).

    Returns:
        (n,): the mean distance of the samples to the truth less half their mean distance to each other.

    Reference:
        Ferro, Fair Scores for Ensemble Forecasts, 2014.

    Example:
        >>> fair_crps(torch.tensor([[0.0, 4.0]]), torch.tensor([1.0]))
        tensor([0.])
    """
    count = samples.shape[1]
    ordered = samples.sort(dim=1).values
    # each number is above those before it and below those after it
    weights = torch.arange(1 - count, count, 2, dtype=samples.dtype, device=samples.device)
    among = (ordered * weights).sum(dim=1) / (count * (count - 1) / 2)  # mean distance of two samples
    return (samples - truth[:, None]).abs().mean(dim=1) - among / 2


def laplace_crps(median: Tensor, scale: Tensor, truth: Tensor) -> Tensor:
    """Return the CRPS of Laplace distributions; the scale is the expected absolute error of the median.

    Args:
        median: (n,).
        scale: (n,).
        truth: the true numbers, (n,).

    Example:
        >>> laplace_crps(torch.zeros(1), torch.ones(1), torch.zeros(1))
        tensor([0.2500])
    """
    distance = (truth - median).abs() / scale
    return scale * (distance + (-distance).exp() - 0.75)


def sparsification_error(uncertainty: Tensor, error: Tensor) -> float:
    """Return the area under the sparsification error (AUSE), 0 if the uncertainty orders the errors as they are.

    The voxels that are most uncertain are left out one by one. The area is that between the mean error of the others
    and what it would be if the largest errors had been left out, relative to the mean error of all.

    Args:
        uncertainty: (n,).
        error: absolute errors, (n,).

    Reference:
        Ilg et al., Uncertainty Estimates and Multi-Hypotheses Networks for Optical Flow, 2018.

    Example:
        >>> error = torch.tensor([3.0, 1.0, 2.0])
        >>> sparsification_error(error, error), round(sparsification_error(-error, error), 2)
        (0.0, 0.5)
    """
    kept = torch.arange(1, len(error) + 1, dtype=torch.float64, device=error.device)

    def curve(order: Tensor) -> Tensor:
        return error.double()[order].cumsum(dim=0) / kept  # mean error of the most certain voxels

    area = (curve(uncertainty.argsort()) - curve(error.argsort())).mean()
    return float(area / error.double().mean().clamp(min=1e-12))


def radial_power(images: Tensor, edges: Sequence[float]) -> Tensor:
    """Return the power of images in bands of spatial frequency, whatever its direction, under a Hann window.

    Args:
        images: (B, H, W).
        edges: limits of the bands, in shares of the Nyquist frequency.

    Returns:
        The mean squared magnitude of the Fourier coefficients in each band, (B, len(edges) - 1).

    Example:
        >>> stripes = torch.arange(32).remainder(2).float().expand(1, 32, 32)
        >>> radial_power(stripes, (0.1, 0.5, 0.9, 1.1)).argmax().item()
        2
    """
    height, width = images.shape[1:]
    windows = (torch.hann_window(side, periodic=False, device=images.device) for side in (height, width))
    rows, columns = windows
    centered = images - images.mean(dim=(1, 2), keepdim=True)
    power = torch.fft.rfft2(centered * rows[:, None] * columns).abs().square()  # (B, H, W / 2 + 1)
    vertical = torch.fft.fftfreq(height, device=images.device)[:, None]
    frequency = 2 * torch.hypot(vertical, torch.fft.rfftfreq(width, device=images.device))
    bands = [(frequency >= low) & (frequency < high) for low, high in pairwise(edges)]
    return torch.stack([power[:, band].mean(dim=1) for band in bands], dim=1)
