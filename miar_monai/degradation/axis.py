"""The degradation along one axis: description and linear operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from miar_monai.errors import check_choice

__all__ = ["PROFILES", "AxisDegradation", "AxisOperator", "blur_matrix"]

_LEVEL_SIGMA = 1.5  # LR voxels; preserves the mean of blocks of 8 × 8 LR voxels to about 0.1 %
_FWHM = 2 * np.sqrt(2 * np.log(2))  # of a Gaussian with a standard deviation of 1


def blur_matrix(size: int, sigma: float) -> Tensor:
    """Return the matrix (size, size), float64, of a Gaussian blur truncated at 4 sigma, edges replicated."""
    return torch.from_numpy(gaussian_filter(np.eye(size), (sigma, 0), mode="nearest", truncate=4))


def _cubic(x: Tensor, a: float) -> Tensor:
    """Return Keys' cubic kernel: PyTorch has a = -0.5 with antialiasing, as Pillow, and a = -0.75 without."""
    x = x.abs()
    inner = ((a + 2) * x - (a + 3)) * x**2 + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return inner.where(x <= 1, outer.where(x < 2, torch.zeros_like(x)))


def _box(distance: Tensor, width: float) -> Tensor:
    """Return the overlap of voxels of width 1 with an interval, as a function of the distance of their centers."""
    return ((1 + width) / 2 - distance.abs()).clamp(min=0, max=min(1, width))


def _slr(distance: Tensor, width: float) -> Tensor:
    """Return the profile of a slice-selective pulse: a box whose edges rise over a fifth of its width."""
    edge = width / 10  # standard deviation
    return torch.erf((distance + width / 2) / edge) - torch.erf((distance - width / 2) / edge)


PROFILES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "bicubic": lambda distance, width: _cubic(distance / max(width, 1.0), -0.5),
    "gaussian": lambda distance, width: torch.exp(-0.5 * (distance * _FWHM / width) ** 2),
    "box": _box,
    "slr": _slr,
}
"""Point spread functions of an LR voxel, of the distance from its center and the width, both in HR voxels.

``"bicubic"`` is antialiased bicubic downsampling, with the width of an LR voxel; for the others the width is the full
width at half maximum, the thickness of a slice. ``"slr"`` resembles a Shinnar-Le Roux pulse.
"""


@dataclass(frozen=True)
class AxisDegradation:
    """Degradation of a line of HR voxels to a line of LR voxels with the same center.

    Args:
        hr_size: number of HR voxels.
        lr_size: number of LR voxels.
        factor: size of an LR voxel in HR voxels, at least 1, not necessarily whole.
        profile: see `PROFILES`.
        thickness: width of the profile in LR voxels, if it is not bicubic: gaps below 1, overlap above 1.
        sigma: standard deviation of a Gaussian blur, in voxels of the side it acts on; 0 for no blur.
        blur_on: ``"lr"`` blurs after downsampling, ``"hr"`` before.

    Example:
        >>> AxisDegradation(4, 2, 2.0, profile="box").matrix()
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000, 0.5000]], dtype=torch.float64)
        >>> torch.equal(AxisDegradation(5, 5, 1.0).matrix(), torch.eye(5, dtype=torch.float64))
        True
    """

    hr_size: int
    lr_size: int
    factor: float
    profile: str = "bicubic"
    thickness: float = 1.0
    sigma: float = 0.0
    blur_on: str = "lr"

    @property
    def lr_sigma(self) -> float:
        """Standard deviation of the blur in LR voxels."""
        return self.sigma if self.blur_on == "lr" else self.sigma / self.factor

    def matrix(self) -> Tensor:
        """Return the matrix of the degradation, (lr_size, hr_size), float64; its rows sum to 1."""
        weights = PROFILES[self.profile](self._distances(), self.factor * self.thickness)  # (lr_size, hr_size)
        down = weights / weights.sum(dim=1, keepdim=True)
        if self.sigma == 0:
            return down
        if self.blur_on == "lr":
            return blur_matrix(self.lr_size, self.sigma) @ down
        return down @ blur_matrix(self.hr_size, self.sigma)

    def upsampling(self) -> Tensor:
        """Return the matrix of bicubic interpolation to the HR grid, edges replicated, (hr_size, lr_size), float64."""
        positions = (torch.arange(self.hr_size, dtype=torch.float64) - (self.hr_size - 1) / 2) / self.factor
        positions = positions + (self.lr_size - 1) / 2  # of the HR voxels, in LR voxels
        taps = positions.floor()[:, None] + torch.arange(-1, 3)  # (hr_size, 4)
        weights = _cubic(positions[:, None] - taps, -0.75)
        matrix = torch.zeros(self.hr_size, self.lr_size, dtype=torch.float64)
        return matrix.scatter_add_(1, taps.long().clamp(0, self.lr_size - 1), weights)

    def _distances(self) -> Tensor:
        """Return the signed distances of the centers of HR and LR voxels, (lr_size, hr_size)."""
        hr, lr = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2 for size in (self.hr_size, self.lr_size))
        return hr - self.factor * lr[:, None]


class AxisOperator(NamedTuple):
    """The linear operator P of one axis and its singular value decomposition; stacks have leading batch axes."""

    matrix: Tensor
    """P, (..., m, n)."""
    upsample: Tensor
    """Bicubic interpolation, (..., n, m)."""
    smooth: Tensor
    """Bicubic interpolation after a Gaussian blur, (..., n, m)."""
    u: Tensor
    """Left singular vectors of P in the order of their frequency, (..., m, m)."""
    s: Tensor
    """Singular values of P, (..., m)."""
    vt: Tensor
    """Right singular vectors of P, (..., m, n)."""
    sigma: Tensor
    """Standard deviation of the blur in LR voxels, (...)."""

    @classmethod
    def of(cls, axis: AxisDegradation) -> AxisOperator:
        """Build the operator of a description, in float64."""
        matrix, upsample = axis.matrix(), axis.upsampling()
        u, s, vt = by_frequency(*torch.linalg.svd(matrix, full_matrices=False))
        smooth = upsample @ blur_matrix(axis.lr_size, _LEVEL_SIGMA)
        return cls(matrix, upsample, smooth, u, s, vt, torch.tensor(axis.lr_sigma, dtype=torch.float64))

    @property
    def frequency(self) -> Tensor:
        """Frequencies of the left singular vectors, 1 for the Nyquist frequency of the HR grid, (..., m)."""
        return frequencies(self.u) / self.factor[..., None]

    @property
    def factor(self) -> Tensor:
        """HR voxels for each LR voxel, (...)."""
        return self.matrix.shape[-1] / self.matrix.sum(dim=(-2, -1))  # rows sum to 1, those of a padding to 0

    @property
    def effective_factor(self) -> Tensor:
        """HR voxels for each singular value, weighted by its size relative to the largest, (...)."""
        return self.matrix.shape[-1] * self.s[..., 0] / self.s.sum(dim=-1)

    def padded(self, size: int) -> AxisOperator:
        """Return the operator of a line with more LR voxels, ``size``, which are all 0."""
        missing = size - self.matrix.shape[-2]
        below, right = (0, 0, 0, missing), (0, missing)
        return AxisOperator(
            F.pad(self.matrix, below),
            F.pad(self.upsample, right),
            F.pad(self.smooth, right),
            F.pad(self.u, (0, missing, 0, missing)),
            F.pad(self.s, right),
            F.pad(self.vt, below),
            self.sigma,
        )

    @classmethod
    def stack(cls, operators: Sequence[AxisOperator]) -> AxisOperator:
        """Stack operators of equal sizes along a new first axis."""
        return cls(*(torch.stack(tensors) for tensors in zip(*operators, strict=True)))


def frequencies(vectors: Tensor) -> Tensor:
    """Return the mean frequencies of unit vectors (..., m, n), columns, 1 for the Nyquist frequency: (..., n)."""
    roughness = torch.diff(vectors, dim=-2).square().sum(dim=-2)  # 4 sin²(πf / 2) for a cosine of frequency f
    return 2 / torch.pi * (roughness / 4).clamp(max=1).sqrt().asin()


def by_frequency(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a singular value decomposition (m, m), (m,), (m, n) in the order of the frequencies of ``u``.

    Vectors of equal singular values, such as all of a box profile, are arbitrary mixtures; they are rotated to separate
    their frequencies.
    """
    start, u, vt = 0, u.clone(), vt.clone()
    for end in range(1, len(s) + 1):
        if end < len(s) and s[end - 1] - s[end] <= 1e-6 * s[0]:
            continue
        if end - start > 1:
            steps = torch.diff(u[:, start:end], dim=0)
            rotation = torch.linalg.eigh(steps.mT @ steps).eigenvectors
            u[:, start:end] = u[:, start:end] @ rotation
            vt[start:end] = rotation.mT @ vt[start:end]
        start = end
    order = frequencies(u).argsort(stable=True)
    return u[:, order], s[order], vt[order]


def check_profile(profile: str) -> None:
    """Check the name of a profile.

    Raises:
        SettingError: if it is not one of `PROFILES`.
    """
    check_choice("profile", profile, PROFILES)
