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
from miar_monai.data.io import Volume, check_labels, sampled_volumes, uncertainty_of
from miar_monai.data.nifti import check_layout, nifti_to_volume, volume_to_nifti
from miar_monai.errors import ImageError
from miar_monai.transforms.metatensor import with_affine

__all__ = ["Image", "image_like", "image_volume", "label_volume"]

Image = str | os.PathLike[str] | np.ndarray | nib.Nifti1Image | nib.MGHImage | MetaTensor
"""Types of images that can be super-resolved."""

_IN_MEMORY, _LABELS = Path("the image"), Path("the label map")  # names of images without files in messages


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
    else:
        array, affine = _array_and_affine(image)
        can_be_labels = array.dtype.kind != "f"
        volume = Volume(np.array(array, dtype=np.float32), affine, np.dtype(np.float32), _IN_MEMORY)  # a copy
    return check_volume(volume, can_be_labels)


def label_volume(labels: np.ndarray | nib.Nifti1Image | nib.MGHImage | MetaTensor) -> Volume:
    """Return a label map in memory as a volume of whole numbers in their dtype; booleans become uint8.

    Raises:
        ImageError, GeometryError: if it cannot be used.
    """
    if isinstance(labels, nib.Nifti1Pair | nib.MGHImage):
        check_layout(_LABELS, labels)
        return check_labels(nifti_to_volume(labels, _LABELS, as_labels=True))
    array, affine = _array_and_affine(labels)
    array = array.astype(np.uint8) if array.dtype.kind == "b" else array
    return check_labels(Volume(array, affine, array.dtype, _LABELS))


def _array_and_affine(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels of an array or a MetaTensor, (X, Y, Z), and their affine."""
    if isinstance(image, MetaTensor):
        array = _voxels(image.detach().cpu().numpy(), image.ndim - 1, "a MetaTensor (1, X, Y) or (1, X, Y, Z)", (3, 4))
        return array, to_affine_nd(3, np.asarray(image.affine.cpu(), dtype=np.float64))
    if isinstance(image, np.ndarray):
        return _voxels(image, image.ndim, "an array (X, Y) or (X, Y, Z)", (2, 3)), np.eye(4)
    kind = "torch.Tensor" if isinstance(image, Tensor) else type(image).__name__
    hint = "; give tensor.numpy(), or a MetaTensor (1, X, Y, Z) with its affine" if kind == "torch.Tensor" else ""
    raise ImageError(
        f"the image is a {kind}: a path, a NumPy array, a nibabel NIfTI or MGH image, or a MetaTensor is needed{hint}."
    )


def _voxels(array: np.ndarray, num_spatial: int, expected: str, ndims: tuple[int, int]) -> np.ndarray:
    """Return the voxels (X, Y, Z) of an array with or without a channel and a slice axis."""
    if array.dtype.kind not in "biuf" or array.ndim not in ndims or array.size == 0:
        problem = f"has the shape {array.shape} and the type {array.dtype}"
    elif num_spatial < array.ndim and array.shape[0] != 1:
        problem = f"has {array.shape[0]} channels"
    else:
        array = array[0] if num_spatial < array.ndim else array
        return array[..., None] if array.ndim == 2 else array
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
