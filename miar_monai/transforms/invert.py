"""Predictions back to the units, orientation and grid of their inputs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform
from monai.transforms.utils import allow_missing_keys_mode
from monai.utils import convert_to_tensor, ensure_tuple
from torch import Tensor

from miar_monai.data.geometry import upscaled_affine
from miar_monai.data.io import what_it_is
from miar_monai.transforms.intensity import ScaleIntensityWindow
from miar_monai.transforms.metatensor import DESCRIPTION_KEY, DTYPE_KEY, moved

__all__ = ["InvertSuperResolutiond", "SplitUncertaintyd"]


class SplitUncertaintyd(MapTransform):
    """Take the second channel of a prediction, the expected error if there is one, to a key of its own.

    Args:
        keys: key of the prediction, (1 or 2, X', Y', Z').
        uncertainty_key: where the second channel goes.
        allow_missing_keys: pass over missing predictions.

    Example:
        >>> import torch
        >>> data = SplitUncertaintyd("pred")({"pred": torch.zeros(2, 8, 8, 3)})
        >>> {key: tuple(value.shape) for key, value in data.items()}
        {'pred': (1, 8, 8, 3), 'uncertainty': (1, 8, 8, 3)}
    """

    def __init__(
        self, keys: KeysCollection = "pred", uncertainty_key: str = "uncertainty", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.uncertainty_key = uncertainty_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` whose prediction has one channel."""
        result = dict(data)
        for key in self.key_iterator(data):
            if len(data[key]) == 2:
                result[key], result[self.uncertainty_key] = data[key][:1], data[key][1:]
        return result


class InvertSuperResolutiond(MapTransform):
    """Bring a super-resolved prediction back to the intensities and the voxel axes of its input.

    `monai.transforms.Invertd` gives the prediction the affine of the LR image, four times too large in millimeters.
    Here the prediction covers the field of view of the LR image: its affine follows from the two sizes.

    What is nowhere negative, such as the magnitude of an MR signal, does not become so.

    Args:
        keys: key of the prediction, (1, X', Y', Z').
        transform: the preprocessing that was applied to ``orig_key``; its invertible parts are undone.
        orig_key: key of the network's input, a `MetaTensor` (1, X, Y, Z).
        difference_keys: those of the keys that hold differences of intensities, such as errors: they are scaled
            without an offset, and are not rounded when they are written.
        allow_missing_keys: pass over missing predictions.
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
            key: self._invert(data[key], data[self.orig_key], key in self.difference_keys)
            for key in self.key_iterator(data)
        }
        return {**data, **inverted}

    def _invert(self, prediction: Tensor, image: MetaTensor, is_difference: bool) -> MetaTensor:
        factors = [new / old for new, old in zip(prediction.shape[1:], image.shape[1:], strict=True)]
        affine = upscaled_affine(np.asarray(image.affine), factors)
        placed: Any = moved(image, convert_to_tensor(prediction, track_meta=False).detach().cpu(), affine)
        placed.applied_operations = deepcopy(image.applied_operations)
        placed.meta[DESCRIPTION_KEY] = what_it_is(is_difference)
        if is_difference:
            ScaleIntensityWindow.forget_offset(placed)
            placed.meta[DTYPE_KEY] = "float32"
        elif float(image.min()) >= (zero := ScaleIntensityWindow.zero(image)):
            placed = placed.clamp(min=zero)
        with allow_missing_keys_mode(self.transform):
            return self.transform.inverse({self.orig_key: placed})[self.orig_key]
