"""Inversion of the preprocessing for predictions on a finer grid."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform
from monai.transforms.utils import allow_missing_keys_mode
from monai.utils import ensure_tuple
from torch import Tensor

from miar_monai.data.io import result_description
from miar_monai.data.volume import SAMPLE_MAPS
from miar_monai.transforms.intensity import ScaleIntensityWindow
from miar_monai.transforms.metatensor import DESCRIPTION_KEY, DTYPE_KEY, resampled

__all__ = ["InvertSuperResolutiond", "SplitUncertaintyd"]


class SplitUncertaintyd(MapTransform):
    """Move the expected error of a prediction, and the maps of its samples, if it has any, to other keys.

    Args:
        keys: key of the prediction, an image (1, X', Y', Z'), or ``"image"``, ``"error"`` and maps of samples by name;
            the names of these are their keys.
        uncertainty_key: key of the error.
        allow_missing_keys: ignore missing predictions.

    Example:
        >>> import torch
        >>> prediction = {"image": torch.zeros(1, 8, 8, 3), "error": torch.ones(1, 8, 8, 3)}
        >>> data = SplitUncertaintyd("pred")({"pred": prediction})
        >>> {key: tuple(value.shape) for key, value in data.items()}
        {'pred': (1, 8, 8, 3), 'uncertainty': (1, 8, 8, 3)}
    """

    def __init__(
        self, keys: KeysCollection = "pred", uncertainty_key: str = "uncertainty", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.uncertainty_key = uncertainty_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` whose prediction is an image."""
        result = dict(data)
        for key in self.key_iterator(data):
            if isinstance(data[key], Mapping):
                maps = dict(data[key])
                result[key] = maps.pop("image")
                if "error" in maps:
                    result[self.uncertainty_key] = maps.pop("error")
                result |= maps
        return result


class InvertSuperResolutiond(MapTransform):
    """Map a super-resolved prediction back to the intensities and the voxel axes of its input.

    Unlike with `monai.transforms.Invertd`, which would give the prediction the affine of the LR image, the prediction
    keeps its own affine, that of the finer grid. A plain tensor covers the field of view of the LR image, as in
    `miar_monai.transforms.metatensor.resampled`.

    Non-negative inputs, such as the magnitude of an MR signal, give non-negative results.

    Args:
        keys: key of the prediction, (1, X', Y', Z').
        transform: the preprocessing of ``orig_key``; its invertible parts are inverted.
        orig_key: key of the network's input, a `MetaTensor` (1, X, Y, Z).
        difference_keys: the keys of differences of intensities, such as errors: scaled without an offset, and written
            in float32, as the maps of samples are.
        allow_missing_keys: ignore missing predictions.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transform: Compose,
        orig_key: str = "image",
        difference_keys: KeysCollection = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = transform
        self.orig_key = orig_key
        self.difference_keys = ensure_tuple(difference_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the predictions in the units and the orientation of the input."""
        inverted = {
            key: self._invert(data[key], data[self.orig_key], str(key), key in self.difference_keys)
            for key in self.key_iterator(data)
        }
        return {**data, **inverted}

    def _invert(self, prediction: Tensor, image: MetaTensor, key: str, is_difference: bool) -> MetaTensor:
        placed: Any = resampled(image, prediction.detach().cpu())
        placed.applied_operations = deepcopy(image.applied_operations)
        placed.meta[DESCRIPTION_KEY] = result_description(key)
        if is_difference or key in SAMPLE_MAPS:
            placed.meta[DTYPE_KEY] = "float32"
        if is_difference:
            ScaleIntensityWindow.remove_offset(placed)
        elif float(image.min()) >= (zero := ScaleIntensityWindow.scaled_zero(image)):
            placed = placed.clamp(min=zero)
        with allow_missing_keys_mode(self.transform):
            return self.transform.inverse({self.orig_key: placed})[self.orig_key]
