"""Invertible scaling of the intensities of MRI and CT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform
from monai.utils import TraceKeys, convert_to_tensor
from torch import Tensor

from miar_monai.errors import ImageError
from miar_monai.transforms.intensity_range import IntensityRange
from miar_monai.transforms.metatensor import image_name

__all__ = ["ScaleIntensityHU", "ScaleIntensityRobust", "limits_in_units"]


class ScaleIntensityWindow(InvertibleTransform):
    """Map an intensity window linearly to [0, 1], without clipping, and back; subclasses define the window."""

    def window(self, image: Tensor) -> tuple[float, float]:
        """Return the intensities that are mapped to 0 and 1."""
        raise NotImplementedError

    def __call__(self, image: Tensor) -> MetaTensor:
        """Return the scaled image, float32, of the same shape."""
        image = convert_to_tensor(image, track_meta=True)
        low, high = self.window(image)
        scaled = (image.float() - low).div_(high - low)
        return self.push_transform(scaled, extra_info={"low": low, "high": high})

    def inverse(self, image: MetaTensor) -> MetaTensor:
        """Return the image in its former units, float32."""
        window = self.pop_transform(image)[TraceKeys.EXTRA_INFO]
        if (window["low"], window["high"]) == (0, 1):
            return image
        return image * (window["high"] - window["low"]) + window["low"]

    @staticmethod
    def scaled_zero(image: MetaTensor) -> float:
        """Return the value to which intensity 0 was mapped in a scaled image."""
        zero = 0.0
        for window in ScaleIntensityWindow._windows(image):
            zero = (zero - window["low"]) / (window["high"] - window["low"])
        return zero

    @staticmethod
    def remove_offset(image: MetaTensor) -> None:
        """Remove the offset from the inverse, for differences of intensities."""
        for window in ScaleIntensityWindow._windows(image):
            window.update(low=0.0, high=window["high"] - window["low"])

    @staticmethod
    def undo_in_place(image: MetaTensor, operation: Mapping[str, Any]) -> bool:
        """Undo an operation, if it is a scaling, in the memory of an image; its inverse then changes nothing.

        Args:
            image: float, whose voxels are changed.
            operation: one of its applied operations, no later one of which changes intensities.

        Returns:
            Whether it is a scaling.
        """
        window = operation.get(TraceKeys.EXTRA_INFO, {})
        if not {"low", "high"} <= set(window):
            return False
        image.as_tensor().mul_(window["high"] - window["low"]).add_(window["low"])
        window.update(low=0.0, high=1.0)
        return True

    @staticmethod
    def _windows(image: MetaTensor) -> list[dict[str, float]]:
        """Return the windows by which an image was scaled, in that order; the inverse uses these dictionaries."""
        found = (operation.get(TraceKeys.EXTRA_INFO, {}) for operation in image.applied_operations)
        return [window for window in found if {"low", "high"} <= set(window)]


def limits_in_units(image: MetaTensor, known: IntensityRange | None) -> tuple[float, float] | None:
    """Return the limits of an intensity range in the units of a preprocessed image before scaling, or None.

    Example:
        >>> import torch
        >>> limits_in_units(ScaleIntensityHU()(torch.zeros(1, 4, 4)), IntensityRange(0, 2))
        (-1024.0, 3072.0)
    """
    if known is None:
        return None
    low, high = known.low, known.high
    for window in reversed(ScaleIntensityWindow._windows(image)):
        low, high = (x * (window["high"] - window["low"]) + window["low"] for x in (low, high))
    return low, high


class ScaleIntensityRobust(ScaleIntensityWindow):
    """Scale an MRI volume: its background is mapped to 0, a high percentile of the voxels above it to 1.

    The background is 0 if at least a tenth of the voxels are exactly 0 and fewer than a hundredth are negative
    (interpolation leaves a few negative voxels in skull-stripped volumes), otherwise the minimum (standardized
    volumes). The percentile excludes the background, so the size of the field of view does not affect the scale. Darker
    voxels stay below 0, brighter ones above 1. Invertible.

    Args:
        percentile: the percentile that is mapped to 1, in (0, 100].

    Example:
        >>> import torch
        >>> ScaleIntensityRobust(100)(torch.tensor([[0.0, 0.0, 50.0, 200.0]])).tolist()
        [[0.0, 0.0, 0.25, 1.0]]
    """

    def __init__(self, percentile: float = 99.5) -> None:
        self.percentile = percentile

    def window(self, image: Tensor) -> tuple[float, float]:
        """Return the background and the percentile.

        Raises:
            ImageError: if the volume is constant.
        """
        voxels = convert_to_tensor(image, track_meta=False).cpu().numpy()
        zero_is_background = np.mean(voxels == 0) >= 0.1 and np.mean(voxels < 0) < 0.01
        low = 0.0 if zero_is_background else float(voxels.min())
        above = voxels[voxels > low]
        if not above.size:
            raise ImageError(
                f"{image_name(image)}: none of the {voxels.size} voxels is above {low:g}; a volume with contrast is "
                "needed to scale its intensities: omit this volume."
            )
        return low, float(np.percentile(above, self.percentile, overwrite_input=True))


class ScaleIntensityHU(ScaleIntensityWindow):
    """Scale a CT volume by a fixed window: ``low`` HU are mapped to 0, ``high`` HU to 1.

    Values outside of the window stay outside of [0, 1]. Invertible.

    Args:
        low: HU that are mapped to 0.
        high: HU that are mapped to 1.

    Example:
        >>> import torch
        >>> ScaleIntensityHU()(torch.tensor([[-1024.0, 0.0, 1024.0]])).tolist()
        [[0.0, 0.5, 1.0]]
    """

    def __init__(self, low: float = -1024, high: float = 1024) -> None:
        self.low = low
        self.high = high

    def window(self, image: Tensor) -> tuple[float, float]:
        """Return ``low`` and ``high``."""
        return self.low, self.high
