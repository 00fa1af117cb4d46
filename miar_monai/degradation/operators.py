"""How a low-resolution slice comes from a high-resolution one, and what follows from that in closed form.

The one place of the degradation: simulation, data consistency and the linear baseline share one pair of matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from miar_monai.degradation.resampling import interpolation_matrix, resample
from miar_monai.errors import ConfigurationError

__all__ = [
    "Degradation",
    "Degradations",
    "Matrices",
    "SeparableDegradation",
    "SquareDegradation",
    "blur_matrix",
    "with_blurs",
]


_LEVEL_SIGMA, _LEVEL_STEPS = 1.5, 8  # LR voxels; so that blocks of 8 × 8 keep their mean to about 0.1 %
_MOST = 64  # of scale and blur: beyond, nothing is left of an image, and matrices need any amount of memory


def blur_matrix(size: int, sigma: float) -> Tensor:
    """Return a Gaussian blur, truncated at 4 sigma, edges replicated, as a matrix (size, size), float64."""
    return torch.from_numpy(gaussian_filter(np.eye(size), (sigma, 0), mode="nearest", truncate=4))


@lru_cache(maxsize=64)
def _matrix(degradation: Degradation, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cache outlives the caller's inference mode; training must be able to use it
        lr_size = size // degradation.scale
        down = interpolation_matrix(size, lr_size, "bicubic", antialias=True)
        if degradation.blur_on == "lr":
            return (blur_matrix(lr_size, degradation.sigma) @ down).to(device, dtype)
        return (down @ blur_matrix(size, degradation.sigma)).to(device, dtype)


@lru_cache(maxsize=64)
def _bicubic_up(lr_size: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return interpolation_matrix(lr_size, size, "bicubic").to(device, dtype)


@lru_cache(maxsize=64)
def _smooth_up(lr_size: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        up = _bicubic_up(lr_size, size, torch.float64, torch.device("cpu"))
        return (up @ blur_matrix(lr_size, _LEVEL_SIGMA)).to(device, dtype)


@lru_cache(maxsize=64)
def _svd(
    degradation: Degradation, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (h, h), the singular values (h,) and V^T (h, size) of the degradation of a line."""
    with torch.inference_mode(False):
        u, s, vt = torch.linalg.svd(_matrix(degradation, size, torch.float64, torch.device("cpu")), full_matrices=False)
        return u.to(device, dtype), s.to(device, dtype), vt.to(device, dtype)


@lru_cache(maxsize=64)
def _quiet(degradation: Degradation, height: int, width: int, device: torch.device) -> Tensor:
    """Return the indices of that eighth of the coefficients, flattened (h, w), through which the least passes."""
    rows, columns = (_svd(degradation, size, torch.float64, torch.device("cpu"))[1] for size in (height, width))
    passing = torch.outer(rows, columns).flatten()
    return passing.argsort()[: max(len(passing) // 8, 1)].to(device)


def _singular_values(rows: Tensor, columns: Tensor) -> Tensor:
    """Return those of images, (..., h, w), of those of their rows, (..., h), and columns, (..., w)."""
    return rows[..., :, None] * columns[..., None, :]


def _damping_of_each(rows: Tensor, columns: Tensor, damping: float | Tensor) -> Tensor:
    """Return the damping of each coefficient, (..., h, w): `SeparableDegradation.enforce` says why they differ.

    Singular values, (..., h) and (..., w), fall as the frequency of their vectors rises. So the frequency of a vector,
    relative to the resolution limit, is its index over the number of coefficients that pass.
    """
    vertical, horizontal = (
        torch.arange(s.shape[-1], device=s.device) * s[..., :1] / s.sum(dim=-1, keepdim=True) for s in (rows, columns)
    )
    return damping * torch.hypot(vertical[..., :, None], horizontal[..., None, :]).clamp(max=1)


class SeparableDegradation(ABC):
    """What follows from ``y = P x P^T``, whatever ``P`` is: one for all images or one for each.

    Everything is computed in the dtype and on the device of the input, and never in a lower precision by autocast.
    """

    scale: int

    @property
    @abstractmethod
    def lr_sigma(self) -> float | Tensor:
        """Standard deviation of the blur in LR voxels: for all images, or (B, 1, 1, 1)."""

    @abstractmethod
    def _operator(self, size: int, like: Tensor) -> Tensor:
        """Return ``P``, (..., size / scale, size)."""

    @abstractmethod
    def _decomposition(self, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (..., h, h), the singular values (..., h) and V^T (..., h, size) of ``P``."""

    @abstractmethod
    def _quiet_coefficients(self, height: int, width: int, like: Tensor) -> Tensor:
        """Return the indices of the coefficients, flattened (h, w), through which the least passes: (..., n)."""

    def _bicubic(self, lr_size: int, like: Tensor) -> Tensor:
        """Return the upsampling of a line, (scale · lr_size, lr_size)."""
        return _bicubic_up(lr_size, lr_size * self.scale, like.dtype, like.device)

    def _smooth(self, lr_size: int, like: Tensor) -> Tensor:
        """Return the upsampling of a line after a blur, (scale · lr_size, lr_size)."""
        return _smooth_up(lr_size, lr_size * self.scale, like.dtype, like.device)

    def __call__(self, hr: Tensor) -> Tensor:
        """Return the low-resolution images, (..., H / scale, W / scale), of ``hr``, (..., H, W).

        Raises:
            ConfigurationError: if H or W is not a multiple of the scale.
        """
        for size in hr.shape[-2:]:
            self._check_size(size)
        rows, columns = (self._operator(size, hr) for size in hr.shape[-2:])
        with torch.autocast(hr.device.type, enabled=False):
            return resample(hr, rows, columns)

    def noise_level(self, lr: Tensor) -> Tensor:
        """Return the standard deviation of the noise of ``lr``: what it holds where the degradation lets least pass.

        Rounding counts as noise (one step of integers is 0.29), and so does detail that this blur would have removed,
        in an ``lr`` that came about in another way. Where much passes everywhere (without a blur), fine detail counts
        too. Robust: the median of the absolute coefficients, but for those that a symmetry makes zero.

        Args:
            lr: low-resolution images, (..., h, w).

        Returns:
            (..., 1, 1), in units of the intensities.

        Example:
            >>> noise = 0.01 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
            >>> round(Degradation().noise_level(noise).item(), 3)
            0.01
        """
        height, width = (size * self.scale for size in lr.shape[-2:])
        u_rows, u_columns = (self._decomposition(size, lr)[0] for size in (height, width))
        with torch.autocast(lr.device.type, enabled=False):
            coefficients = resample(lr, u_rows.mT, u_columns.mT).flatten(-2)  # (..., h · w)
        quiet = self._quiet_coefficients(height, width, lr).expand(*lr.shape[:-2], -1)
        sizes = coefficients.gather(-1, quiet).abs()
        rounding = torch.finfo(sizes.dtype).eps * coefficients.abs().amax(dim=-1, keepdim=True)
        level = sizes.where(sizes > rounding, torch.nan).nanmedian(dim=-1).values / 0.6745  # of a normal distribution
        return level.nan_to_num(nan=0.0)[..., None, None]

    def share_lost(self, height: int, width: int, damping: Tensor) -> Tensor:
        """Return the share of the coefficients of an LR image that a damped inverse leaves out: in [0, 1], (..., 1, 1).

        With a blur, which most coefficients hardly pass, a little damping costs many of them, without one next to none.

        Args:
            height: of the HR image.
            width: likewise.
            damping: as in `enforce`, (..., 1, 1).

        Example:
            >>> damping = torch.full((1, 1), 0.05)
            >>> [round(Degradation(sigma=sigma).share_lost(64, 64, damping).item(), 2) for sigma in (0.0, 1.0)]
            [0.05, 0.71]
        """
        s_rows, s_columns = (self._decomposition(size, damping)[1] for size in (height, width))
        s, damping = _singular_values(s_rows, s_columns), _damping_of_each(s_rows, s_columns, damping)
        return (damping**2 / (s**2 + damping**2)).mean(dim=(-2, -1), keepdim=True)

    def enforce(self, sr: Tensor, lr: Tensor, damping: float | Tensor) -> Tensor:
        r"""Return the images closest to ``sr`` that degrade to ``lr``: ``x + V[(U^T (y - P x P^T) U) * w] V^T``.

        With ``P = U diag(s) V^T`` and ``w = S / (S^2 + D^2)``, ``S`` the outer product of the singular values and ``D``
        the damping. Without damping and with an exact ``lr`` this is the orthogonal projection on all images that
        explain ``lr``, which holds the truth: the mean squared error cannot grow (the range-null-space idea of DDNM).

        ``D`` is ``damping`` at the resolution limit of ``lr`` and falls in proportion to the frequency, as in a Wiener
        filter for images, whose spectra fall about as 1/f. So the low frequencies of ``lr``, and with them the level of
        every tissue, hold whatever its noise and whatever the level of ``sr``.

        Args:
            sr: estimates, (..., H, W).
            lr: low-resolution images, (..., H / scale, W / scale).
            damping: noise of ``lr`` relative to the detail that is sought, one for all or (..., 1, 1); with a larger
                one ``lr`` counts for less. 0 needs a noiseless ``lr`` in float64: the operator with blur amplifies
                noise by up to 10 000.

        Returns:
            The corrected estimates, (..., H, W).
        """
        for size in sr.shape[-2:]:
            self._check_size(size)
        (u_rows, s_rows, vt_rows), (u_columns, s_columns, vt_columns) = (
            self._decomposition(size, sr) for size in sr.shape[-2:]
        )
        residual = lr - self(sr)
        s, damping = _singular_values(s_rows, s_columns), _damping_of_each(s_rows, s_columns, damping)
        with torch.autocast(sr.device.type, enabled=False):
            coefficients = resample(residual, u_rows.mT, u_columns.mT) * (s / (s**2 + damping**2))
            return sr + resample(coefficients, vt_rows.mT, vt_columns.mT)

    def restore(self, lr: Tensor, damping: float | Tensor) -> Tensor:
        """Return the damped linear inverse: bicubic upsampling, corrected to explain ``lr``.

        The strongest linear baseline: 4 dB above bicubic where ``lr`` is exact and blurred.

        Args:
            lr: low-resolution images, (..., h, w).
            damping: as in `enforce`.

        Returns:
            The estimates, (..., h * scale, w * scale).
        """
        rows, columns = (self._bicubic(size, lr) for size in lr.shape[-2:])
        with torch.autocast(lr.device.type, enabled=False):
            start = resample(lr, rows, columns)
        return self.enforce(start, lr, damping)

    def bounded(self, sr: Tensor, floor: float | Tensor) -> Tensor:
        """Return images none of whose voxels is below a floor, and whose low-resolution images are about the same.

        Voxels that are only clipped leave their surroundings too bright, so that the low frequencies of what clipping
        adds are taken off, and the result is clipped again: projected Landweber iterations, accelerated by momentum
        (Beck and Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems, 2009).

        Args:
            sr: images, (..., H, W); those that are nowhere below the floor stay as they are.
            floor: such as 0 for magnitudes; one for all, or (..., 1, 1).

        Example:
            >>> line = torch.arange(-31.5, 32)
            >>> lr = Degradation()((torch.hypot(line[:, None], line) < 20).float())
            >>> linear = Degradation().restore(lr, 1e-3)
            >>> clipped, bounded = linear.clamp(min=0), Degradation().bounded(linear, 0)
            >>> [round((x.mean() / lr.mean()).item(), 3) for x in (linear, clipped, bounded)], bounded.min().item() >= 0
            ([1.0, 1.029, 1.003], True)
        """
        operators = [self._operator(size, sr) for size in sr.shape[-2:]]
        smooth = [self._smooth(size // self.scale, sr) for size in sr.shape[-2:]]
        with torch.autocast(sr.device.type, enabled=False):
            lr = resample(sr, *operators)
            sr = ahead = sr.clamp(min=floor)
            for step in range(_LEVEL_STEPS):
                before = sr
                sr = (ahead + resample(lr - resample(ahead, *operators), *smooth)).clamp(min=floor)
                ahead = torch.lerp(before, sr, 1 + step / (step + 3))
        return sr

    def _check_size(self, size: int) -> None:
        if size % self.scale:
            raise ConfigurationError(
                f"an image side of {size} voxels cannot be degraded by {self.scale}: the side must be a multiple of "
                f"{self.scale}; crop or pad the image to {size // self.scale * self.scale or self.scale} voxels."
            )


@dataclass(frozen=True)
class Degradation(SeparableDegradation):
    """Bicubic antialiased downsampling on the cell-centered grid, and a Gaussian blur: ``y = P x P^T``.

    The operator is linear and separable, so a line of n voxels is degraded by the matrix ``P`` (n / scale, n) and an
    image by two of them. The defaults are the paper's Section 4.1: 4x and a blur of radius 1 on the LR image.
    Everything is computed in the dtype and on the device of the input, and never in a lower precision by autocast.

    Args:
        scale: HR voxels for each LR voxel along an axis.
        sigma: standard deviation of the blur in voxels of the side it acts on; 0 leaves the blur out.
        blur_on: ``"lr"`` blurs after downsampling (the paper's words), ``"hr"`` before.

    Raises:
        ConfigurationError: if a setting is out of range.

    Example:
        >>> degradation = Degradation()
        >>> lr = degradation(torch.ones(1, 64, 32))
        >>> lr.shape, bool(torch.allclose(lr, torch.ones(1)))
        (torch.Size([1, 16, 8]), True)
    """

    scale: int = 4
    sigma: float = 1.0
    blur_on: str = "lr"

    def __post_init__(self) -> None:
        scale_fits = 1 <= self.scale <= _MOST and self.scale % 1 == 0
        if not (scale_fits and 0 <= self.sigma <= _MOST and self.blur_on in ("lr", "hr")):
            raise ConfigurationError(
                f"Degradation(scale={self.scale}, sigma={self.sigma}, blur_on={self.blur_on!r}) is out of range: "
                f"scale must be a whole number from 1 to {_MOST}, sigma from 0 to {_MOST}, and blur_on 'lr' or 'hr'."
            )

    def matrix(self, size: int) -> Tensor:
        """Return the degradation of a line of ``size`` voxels, (size / scale, size), float64; its rows sum to 1.

        Raises:
            ConfigurationError: if ``size`` is not a multiple of the scale.
        """
        self._check_size(size)
        return _matrix(self, size, torch.float64, torch.device("cpu")).clone()

    @property
    def lr_sigma(self) -> float:
        """Standard deviation of the blur in LR voxels."""
        return self.sigma if self.blur_on == "lr" else self.sigma / self.scale

    def _operator(self, size: int, like: Tensor) -> Tensor:
        return _matrix(self, size, like.dtype, like.device)

    def _decomposition(self, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _svd(self, size, like.dtype, like.device)

    def _quiet_coefficients(self, height: int, width: int, like: Tensor) -> Tensor:
        return _quiet(self, height, width, like.device)


@dataclass(frozen=True, eq=False)
class Degradations(SeparableDegradation):
    """A degradation for each image of a batch: that of image i is ``kinds[index[i]]``.

    Args:
        kinds: degradations of one scale.
        index: (B,), int64, on the device of the images.

    Example:
        >>> kinds = with_blurs(Degradation(), [0.0, 0.5])
        >>> lr = Degradations(kinds, torch.tensor([2, 0]))(torch.rand(2, 1, 16, 16))
        >>> lr.shape
        torch.Size([2, 1, 4, 4])
    """

    kinds: tuple[Degradation, ...]
    index: Tensor

    @property
    def scale(self) -> int:  # type: ignore[override]  # a field there, the same for all here
        """HR voxels for each LR voxel along an axis."""
        return self.kinds[0].scale

    @property
    def lr_sigma(self) -> Tensor:
        """Standard deviation of the blur in LR voxels: (B, 1, 1, 1)."""
        return _sigmas(self.kinds, self.index.device)[self.index][:, None, None, None]

    def _operator(self, size: int, like: Tensor) -> Tensor:
        return _stacked(self.kinds, "_operator", (size,), like.dtype, like.device)[0][self.index][:, None]

    def _decomposition(self, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = _stacked(self.kinds, "_decomposition", (size,), like.dtype, like.device)
        return u[self.index][:, None], s[self.index][:, None], vt[self.index][:, None]

    def _quiet_coefficients(self, height: int, width: int, like: Tensor) -> Tensor:
        parts = _stacked(self.kinds, "_quiet_coefficients", (height, width), like.dtype, like.device)
        return parts[0][self.index][:, None]


class Matrices(NamedTuple):
    """All that a `Degradation` does to square images of one side, as tensors; ``n`` is a number of coefficients."""

    operator: Tensor
    """P, (h, H)."""
    bicubic: Tensor
    """(H, h)."""
    smooth: Tensor
    """(H, h)."""
    u: Tensor
    """(h, h)."""
    s: Tensor
    """(h,)."""
    vt: Tensor
    """(h, H)."""
    quiet: Tensor
    """(n,), int64."""
    sigma: Tensor
    """Of the blur, in LR voxels: ()."""

    @classmethod
    def of(cls, degradation: Degradation, size: int, like: Tensor) -> Matrices:
        """Return those of images (size, size) with the dtype and on the device of a tensor."""
        return _matrices(degradation, size, like.dtype, like.device)


@dataclass(frozen=True, eq=False)
class SquareDegradation(SeparableDegradation):
    """The degradation of square images of one side, by matrices of the caller: a CUDA graph has them as its inputs.

    One recording then is for every blur.

    Example:
        >>> matrices = Matrices.of(Degradation(sigma=0.5), 64, torch.empty(0))
        >>> lr = torch.rand(1, 1, 16, 16)
        >>> torch.equal(SquareDegradation(4, matrices).restore(lr, 1e-3), Degradation(sigma=0.5).restore(lr, 1e-3))
        True
    """

    scale: int
    matrices: Matrices

    @property
    def lr_sigma(self) -> Tensor:
        """Standard deviation of the blur in LR voxels: ()."""
        return self.matrices.sigma

    def _operator(self, size: int, like: Tensor) -> Tensor:
        return self.matrices.operator

    def _decomposition(self, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.matrices.u, self.matrices.s, self.matrices.vt

    def _quiet_coefficients(self, height: int, width: int, like: Tensor) -> Tensor:
        return self.matrices.quiet

    def _bicubic(self, lr_size: int, like: Tensor) -> Tensor:
        return self.matrices.bicubic

    def _smooth(self, lr_size: int, like: Tensor) -> Tensor:
        return self.matrices.smooth


@lru_cache(maxsize=64)
def _matrices(degradation: Degradation, size: int, dtype: torch.dtype, device: torch.device) -> Matrices:
    with torch.inference_mode(False):
        lr_size, like = size // degradation.scale, torch.empty(0, dtype=dtype, device=device)
        return Matrices(
            degradation._operator(size, like),
            degradation._bicubic(lr_size, like),
            degradation._smooth(lr_size, like),
            *degradation._decomposition(size, like),
            degradation._quiet_coefficients(size, size, like),
            torch.tensor(degradation.lr_sigma, dtype=dtype, device=device),
        )


def with_blurs(degradation: Degradation, sigmas: Iterable[float]) -> tuple[Degradation, ...]:
    """Return a degradation, and after it the same with other blurs.

    Example:
        >>> [kind.sigma for kind in with_blurs(Degradation(), [0.0, 0.5])]
        [1.0, 0.0, 0.5]
    """
    return degradation, *(replace(degradation, sigma=sigma) for sigma in sigmas)


@lru_cache(maxsize=64)
def _stacked(
    kinds: tuple[Degradation, ...], name: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return what a method of each kind returns, stacked along a first axis."""
    with torch.inference_mode(False):
        found = [getattr(kind, name)(*sizes, torch.empty(0, dtype=dtype, device=device)) for kind in kinds]
        parts = zip(*(x if isinstance(x, tuple) else (x,) for x in found), strict=True)
        return tuple(torch.stack(part) for part in parts)


@lru_cache(maxsize=64)
def _sigmas(kinds: tuple[Degradation, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([kind.lr_sigma for kind in kinds], device=device)
