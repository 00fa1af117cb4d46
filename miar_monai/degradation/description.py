"""Description of a degradation, as in configs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from miar_monai.degradation.axis import AxisDegradation, AxisOperator, check_profile
from miar_monai.degradation.separable import SeparableOperator
from miar_monai.errors import ConfigurationError

__all__ = ["Degradation", "operators", "with_blurs"]

_MAX = 64  # limit of scale, blur and thickness, beyond which matrices need too much memory

T = TypeVar("T")
OnePerAxis: TypeAlias = float | Sequence[float]


@dataclass(frozen=True)
class Degradation:
    """Downsampling of the rows and columns of an image on the cell-centered grid, and a Gaussian blur.

    The defaults are the paper's Section 4.1: antialiased bicubic downsampling by 4 and a blur of radius 1 on the LR
    image. `for_hr` and `for_lr` return the linear operator for images of a given size.

    Args:
        scale: size of an LR voxel in HR voxels, not necessarily whole; one number, or one each for rows and columns. 1
            for no downsampling.
        sigma: standard deviation of the blur in voxels of the side it acts on, one number or two; 0 for no blur.
        blur_on: ``"lr"`` blurs after downsampling (the paper's), ``"hr"`` before.
        profile: point spread function of an LR voxel, one for both axes or two: ``"bicubic"``, ``"gaussian"``,
            ``"box"`` or ``"slr"``; see `miar_monai.degradation.axis.PROFILES`.
        thickness: width of the profile in LR voxels, if it is not bicubic; one number or two.

    Raises:
        ConfigurationError: if a setting is out of range.

    Example:
        >>> degradation = Degradation()
        >>> lr = degradation(torch.ones(1, 64, 32))
        >>> lr.shape, bool(torch.allclose(lr, torch.ones(1)))
        (torch.Size([1, 16, 8]), True)
        >>> Degradation(scale=(2.5, 1), sigma=0)(torch.ones(1, 50, 32)).shape
        torch.Size([1, 20, 32])
    """

    scale: OnePerAxis = 4
    sigma: OnePerAxis = 1.0
    blur_on: str = "lr"
    profile: str | Sequence[str] = "bicubic"
    thickness: OnePerAxis = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "sigma", "thickness", "profile"):
            if isinstance(value := getattr(self, name), Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # lists of JSON are not hashable
        for profile in self.profiles:
            check_profile(profile)
        scales, sigmas, widths = self.scales, self.sigmas, _pair(self.thickness)
        fits = all(1 <= scale <= _MAX for scale in scales) and all(0 <= sigma <= _MAX for sigma in sigmas)
        if not (fits and all(0 < width <= _MAX for width in widths) and self.blur_on in ("lr", "hr")):
            raise ConfigurationError(
                f"Degradation(scale={self.scale}, sigma={self.sigma}, blur_on={self.blur_on!r}, thickness="
                f"{self.thickness}) is out of range: scale must be from 1 to {_MAX}, sigma from 0 to {_MAX}, blur_on "
                f"'lr' or 'hr', and thickness above 0 and at most {_MAX}."
            )

    @property
    def scales(self) -> tuple[float, float]:
        """Scale of rows and columns."""
        return _pair(self.scale)

    @property
    def sigmas(self) -> tuple[float, float]:
        """Standard deviation of the blur of rows and columns."""
        return _pair(self.sigma)

    @property
    def profiles(self) -> tuple[str, str]:
        """Profile of rows and columns."""
        return _pair(self.profile)

    @property
    def lr_sigma(self) -> float:
        """Standard deviation of the blur in LR voxels, the mean of both axes."""
        axes = zip(self.sigmas, self.scales, strict=True)
        return sum(sigma if self.blur_on == "lr" else sigma / scale for sigma, scale in axes) / 2

    def for_hr(self, hr: Tensor) -> SeparableOperator:
        """Return the operator for HR images (..., H, W), in their dtype and on their device.

        A size n becomes n / scale, rounded if the scale is not a whole number.

        Raises:
            ConfigurationError: if H or W is not a multiple of its scale, a whole number.
        """
        shape = _plane(hr)
        height, width = (self._lr_size(*axis) for axis in zip(shape, self.scales, strict=True))
        return operators((self,), shape, (height, width), hr)

    def for_lr(self, lr: Tensor) -> SeparableOperator:
        """Return the operator for LR images (..., h, w), in their dtype and on their device.

        A size m belongs to the HR size m · scale, rounded.
        """
        shape = _plane(lr)
        height, width = (max(round(size * scale), 1) for size, scale in zip(shape, self.scales, strict=True))
        return operators((self,), (height, width), shape, lr)

    def __call__(self, hr: Tensor) -> Tensor:
        """Return the LR images, (..., h, w), of HR images (..., H, W); see `for_hr`."""
        return self.for_hr(hr).A(hr)

    def axes(self, hr_shape: tuple[int, int], lr_shape: tuple[int, int]) -> tuple[AxisDegradation, AxisDegradation]:
        """Return the degradations of rows and columns for images of given sizes."""
        sizes = zip(hr_shape, lr_shape, strict=True)
        settings = zip(self.scales, self.profiles, _pair(self.thickness), self.sigmas, strict=True)
        rows, columns = (
            AxisDegradation(hr_size, lr_size, scale, profile, thickness, sigma, self.blur_on)
            for (hr_size, lr_size), (scale, profile, thickness, sigma) in zip(sizes, settings, strict=True)
        )
        return rows, columns

    @staticmethod
    def _lr_size(size: int, scale: float) -> int:
        if scale % 1:
            return max(round(size / scale), 1)
        scale = int(scale)
        if size % scale:
            raise ConfigurationError(
                f"an image side of {size} voxels cannot be downsampled by {scale}: it must be a multiple of {scale};"
                f" crop or pad the image to {size // scale * scale or scale} voxels."
            )
        return size // scale


def operators(
    kinds: tuple[Degradation, ...], hr_shape: tuple[int, int], lr_shape: tuple[int, int], like: Tensor
) -> SeparableOperator:
    """Return the operator of a degradation, or a stack of the operators of several, for `SeparableOperator.select`.

    Recently used operators are cached on the device of their images.

    Args:
        kinds: one or more degradations.
        hr_shape: shape of the HR images, (H, W).
        lr_shape: shape of the LR images, (h, w).
        like: tensor with the dtype and the device of the result.

    Example:
        >>> kinds = with_blurs(Degradation(), [0.0, 0.5])
        >>> hr, index = torch.rand(2, 1, 16, 16), torch.tensor([2, 0])
        >>> operators(kinds, (16, 16), (4, 4), hr).select(index).A(hr).shape
        torch.Size([2, 1, 4, 4])
    """
    return _operators(kinds, hr_shape, lr_shape, like.dtype, like.device)


@lru_cache(maxsize=32)
def _operators(
    kinds: tuple[Degradation, ...],
    hr_shape: tuple[int, int],
    lr_shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> SeparableOperator:
    def build() -> SeparableOperator:
        built = []
        for kind in kinds:
            rows, columns = kind.axes(hr_shape, lr_shape)
            vertical = AxisOperator.of(rows)
            built.append(SeparableOperator.of(vertical, vertical if columns == rows else AxisOperator.of(columns)))
        operator = built[0] if len(built) == 1 else SeparableOperator.stack(built)
        return operator.to(torch.empty(0, dtype=dtype, device=device))

    # cached tensors must not depend on modes of the caller, such as inference mode, which apply to its thread only
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(build).result()


def with_blurs(degradation: Degradation, sigmas: Iterable[float]) -> tuple[Degradation, ...]:
    """Return a degradation, followed by copies with other blurs.

    Example:
        >>> [kind.sigma for kind in with_blurs(Degradation(), [0.0, 0.5])]
        [1.0, 0.0, 0.5]
    """
    return degradation, *(replace(degradation, sigma=sigma) for sigma in sigmas)


def _plane(images: Tensor) -> tuple[int, int]:
    """Return the sizes of the last two axes, which are tensors in `torch.jit.trace`."""
    height, width = images.shape[-2:]
    return int(height), int(width)


def _pair(value: T | Sequence[T]) -> tuple[T, T]:
    """Return the values of rows and columns, given one for both or two."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        rows, columns = value
        return rows, columns
    return value, value
