"""Inversion of the preprocessing for predictions on a finer grid."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Orientation
from monai.transforms.utils import allow_missing_keys_mode
from monai.utils import TraceKeys, ensure_tuple
from nibabel.orientations import inv_ornt_aff, io_orientation
from torch import Tensor

from miar_monai.data.io import result_description
from miar_monai.data.volume import SAMPLE_MAPS
from miar_monai.transforms.intensity import ScaleIntensityWindow
from miar_monai.transforms.metatensor import DESCRIPTION_KEY, DTYPE_KEY, resampled

__all__ = ["InvertSuperResolutiond", "SplitUncertaintyd", "restored"]


def restored(image: MetaTensor, transform: Compose, key: str = "image") -> MetaTensor:
    """Return an image as it was before its preprocessing, in its own memory if that scaled and flipped it.

    Args:
        image: float, with the record of its preprocessing; changed.
        transform: the preprocessing; its invertible parts are inverted.
        key: key of the image.

    Example:
        >>> import torch
        >>> from miar_monai.transforms import ScaleIntensityHUd
        >>> scale = Compose([ScaleIntensityHUd("image")])
        >>> restored(scale({"image": torch.tensor([[[-1024.0, 512]]])})["image"], scale).tolist()
        [[[-1024.0, 512.0]]]
    """
    with torch.inference_mode():  # which the voxels of an inferer may have been made in
        _undo_in_place(image)
    with allow_missing_keys_mode(transform):
        inverted: MetaTensor = transform.inverse({key: image})[key]
    return inverted


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
    """Map a super-resolved prediction back to the intensities and the voxel axes of its input, in its memory.

    Unlike with `monai.transforms.Invertd`, which would give the prediction the affine of the LR image, the prediction
    keeps its own affine, that of the finer grid. A plain tensor covers the field of view of the LR image, as in
    `miar_monai.transforms.metatensor.resampled`.

    A float prediction on a CPU is changed in its own memory, since a large one does not fit into it twice: clone it if
    it is needed as it was.

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
        voxels = prediction if prediction.is_floating_point() else prediction.float()
        placed = resampled(image, voxels.detach().cpu())
        placed.applied_operations = deepcopy(image.applied_operations)
        placed.meta[DESCRIPTION_KEY] = result_description(key)
        if is_difference or key in SAMPLE_MAPS:
            placed.meta[DTYPE_KEY] = "float32"
        if is_difference:
            ScaleIntensityWindow.remove_offset(placed)
        if not is_difference and float(image.min()) >= (zero := ScaleIntensityWindow.scaled_zero(image)):
            with torch.inference_mode():
                placed.as_tensor().clamp_(min=zero)
        return restored(placed, self.transform, self.orig_key)


def _undo_in_place(image: MetaTensor) -> None:
    """Undo the scaling and the flips of an image in its own memory, where they are the last operations.

    Their inverse would hold two more volumes; afterwards it only exchanges axes, which copies nothing.
    """
    for operation in reversed(image.applied_operations):
        if operation[TraceKeys.CLASS_NAME] == Orientation.__name__:
            _flip_in_place(image, operation[TraceKeys.EXTRA_INFO]["original_affine"])
        elif not ScaleIntensityWindow.undo_in_place(image, operation):
            return


def _flip_in_place(image: MetaTensor, affine: Any) -> None:
    """Flip the voxel axes of an image (1, X, Y, Z) that run against those of an affine."""
    directions = {axis: direction for axis, direction in io_orientation(np.asarray(affine)).tolist()}
    flips = np.array([(i, step * directions[axis]) for i, (axis, step) in enumerate(io_orientation(image.affine))])
    voxels, flipped = image.as_tensor(), [1 + i for i, step in enumerate(flips[:, 1]) if step < 0]
    if not flipped:
        return
    outer = max(range(1, voxels.ndim), key=voxels.stride)  # the voxels of a slice across it are close in memory
    within, count = [axis - (axis > outer) for axis in flipped if axis != outer], voxels.shape[outer]
    for k in range((count + 1) // 2 if outer in flipped else count):
        one, other = voxels.select(outer, k), voxels.select(outer, count - 1 - k if outer in flipped else k)
        turned = one.flip(within)  # a copy
        one.copy_(other.flip(within))
        other.copy_(turned)
    image.affine = image.affine @ torch.from_numpy(inv_ornt_aff(flips, voxels.shape[1:]))
