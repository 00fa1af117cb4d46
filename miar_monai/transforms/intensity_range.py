"""Intensities outside of the range of the training: padding below, metal above."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miar_monai.errors import SettingError

__all__ = ["IntensityRange"]

_PADDING_MARGIN = 0.125  # distance of padding from the range, larger than noise in air (256 of 2048 HU)
_MIN_CORNERS = 0.05  # fraction of a slice with the minimum: 0.21 outside of a circle, near 0 in noise


class IntensityRange:
    """The range of intensities that is super-resolved; values outside of it are interpolated, to avoid ringing.

    Padding, the constant below the range in the corners of a CT slice, keeps its value, as do all values far below the
    range. Values slightly below are noise in air, and clipped to the lower limit. Values above, such as metal, are
    clipped to the upper limit for the network; the excess is interpolated linearly and added to the result.

    Args:
        low: lower limit.
        high: upper limit.

    Raises:
        SettingError: if ``low`` is not below ``high``.

    Example:
        >>> lr = torch.tensor([[[[-1.0, 0.25, 0.5, 3.0]]]])
        >>> known = IntensityRange(0, 2)
        >>> known.clip(lr)
        tensor([[[[0.0000, 0.2500, 0.5000, 2.0000]]]])
        >>> known.restore(torch.tensor([[[[0.1, 0.3, 0.5, 1.9]]]]), lr)
        tensor([[[[-1.0000,  0.3000,  0.5000,  2.9000]]]])
    """

    def __init__(self, low: float, high: float) -> None:
        if not low < high:
            raise SettingError(
                f"intensity_range is {[low, high]}, but a lower and a higher limit are needed; correct it."
            )
        self.low, self.high = float(low), float(high)

    @classmethod
    def of(cls, limits: Sequence[float] | None) -> IntensityRange | None:
        """Return the range between two limits, or None without limits."""
        return None if limits is None else cls(*limits)

    def is_padding(self, images: Tensor) -> Tensor:
        """Return a mask of the padding of slices, (N, C, H, W)."""
        lowest = images == images.amin(dim=(-2, -1), keepdim=True)
        is_constant = lowest.float().mean(dim=(-2, -1), keepdim=True) >= _MIN_CORNERS
        return (images < self.low - _PADDING_MARGIN) | (lowest & is_constant & (images < self.low))

    def clip(self, images: Tensor) -> Tensor:
        """Return images clipped to the range, the input of the network."""
        return images.clamp(self.low, self.high)

    def restore(self, sr: Tensor, lr: Tensor) -> Tensor:
        """Return super-resolved slices with padding and with the excess above the range.

        Args:
            sr: of the clipped slices, (N, C, H, W); channels after the first contain an error, set to 0 in padding.
            lr: the slices, (N, 1, h, w).
        """
        size, image, error = sr.shape[2:], sr[:, :1], sr[:, 1:]
        above, padding = (lr - self.high).clamp(min=0), self.is_padding(lr)
        if bool(above.any()):
            image = image + F.interpolate(above.to(sr), size, mode="bilinear", align_corners=False)
        if bool(padding.any()):
            outside = F.interpolate(padding.to(sr), size, mode="nearest-exact") > 0
            image = torch.where(outside, F.interpolate(lr.to(sr), size, mode="nearest-exact"), image)
            error = error.masked_fill(outside, 0)
        return torch.cat([image, error], dim=1)
