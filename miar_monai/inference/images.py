"""Conversion between images in memory and volumes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from torch import Tensor

from miar_monai.data.checks import check_volume
from miar_monai.data.io import Volume, sampled_volumes, uncertainty_of
from miar_monai.data.nifti import check_layout, nifti_to_volume, volume_to_nifti
from miar_monai.errors import ImageError
from miar_monai.transforms.metatensor import with_affine

__all__ = ["Image", "image_like", "image_volume"]

Image = str | os.PathLike[str] | np.ndarray | nib.Nifti1Image | nib.MGHImage | MetaTensor
"""Types of images that can be super-resolved."""

_IN_MEMORY = Path("the image")  # the name of an image without a file in messages


def image_volume(image: np.ndarray | nib.Nifti1Image | nib.MGHImage | MetaTensor) -> Volume:
    """Return an image in memory as a volume, checked like those from files.

    One check is skipped: floating-point arrays are never label maps, so that small synthetic images are accepted.

    Raises:
        ImageError, GeometryError: if the image cannot be used.
    """
    can_be_labels = True
    if isinstance(image, nib.Nifti1Pair | nib.MGHImage):
        check_layout(_IN_MEMORY, image)
        volume = nifti_to_volume(image, _IN_MEMORY)
    elif isinstance(image, MetaTensor):
        array = _voxels(image.detach().cpu().numpy(), image.ndim - 1, "a MetaTensor (1, X, Y) or (1, X, Y, Z)", (3, 4))
        affine = to_affine_nd(3, np.asarray(image.affine.cpu(), dtype=np.float64))
        volume = Volume(array, affine, np.dtype(np.float32), _IN_MEMORY)
        can_be_labels = not image.dtype.is_floating_point
    elif isinstance(image, np.ndarray):
        array = _voxels(image, image.ndim, "an array (X, Y) or (X, Y, Z)", (2, 3))
        volume = Volume(array, np.eye(4), np.dtype(np.float32), _IN_MEMORY)
        can_be_labels = image.dtype.kind != "f"
    else:
        kind = "torch.Tensor" if isinstance(image, Tensor) else type(image).__name__
        hint = "; give tensor.numpy(), or a MetaTensor (1, X, Y, Z) with its affine" if kind == "torch.Tensor" else ""
        raise ImageError(
            f"the image is a {kind}: a path, a NumPy array, a nibabel NIfTI or MGH image, or a MetaTensor is needed"
            f"{hint}."
        )
    return check_volume(volume, can_be_labels)


def _voxels(array: np.ndarray, num_spatial: int, expected: str, ndims: tuple[int, int]) -> np.ndarray:
    """Return the voxels (X, Y, Z), float32, of an array with or without a channel and a slice axis."""
    if array.dtype.kind not in "biuf" or array.ndim not in ndims or array.size == 0:
        problem = f"has the shape {array.shape} and the type {array.dtype}"
    elif num_spatial < array.ndim and array.shape[0] != 1:
        problem = f"has {array.shape[0]} channels"
    else:
        array = array[0] if num_spatial < array.ndim else array
        return np.array(array[..., None] if array.ndim == 2 else array, dtype=np.float32)  # a copy
    raise ImageError(f"the image {problem}: {expected} of real numbers, not empty, is needed.")


def image_like(image: Image, sr: Volume) -> Any:
    """Return a result as the same type as its input; with uncertainty a pair of them, with samples all by name."""
    if sr.sampled is not None:
        named = {"image": sr._replace(sampled=None, uncertainty=None)}
        named |= {} if sr.uncertainty is None else {"uncertainty": uncertainty_of(sr)}
        return {name: image_like(image, one) for name, one in (named | sampled_volumes(sr)).items()}
    if sr.uncertainty is not None:
        return image_like(image, sr._replace(uncertainty=None)), image_like(image, uncertainty_of(sr))
    if isinstance(image, MetaTensor):
        result = with_affine(image, torch.from_numpy(sr.array)[None], sr.affine)
        return result[..., 0] if image.ndim == 3 else result
    if isinstance(image, np.ndarray):
        return sr.array[..., 0] if image.ndim == 2 else sr.array
    return volume_to_nifti(sr)
