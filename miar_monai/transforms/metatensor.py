"""Volumes as MetaTensors."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import ImageMetaKey
from torch import Tensor

__all__ = ["DESCRIPTION_KEY", "DTYPE_KEY", "QFORM_CODE_KEY", "QFORM_KEY", "SPACE_KEY", "moved", "name_of"]

DTYPE_KEY, SPACE_KEY, DESCRIPTION_KEY = "original_dtype", "sform_code", "descrip"
QFORM_KEY, QFORM_CODE_KEY = "sform_to_qform", "qform_code"


def name_of(image: Tensor) -> str:
    """Return what the user knows an image by: its file."""
    return str(getattr(image, "meta", {}).get(ImageMetaKey.FILENAME_OR_OBJ, "the volume"))


def moved(image: MetaTensor, voxels: Tensor, affine: np.ndarray) -> MetaTensor:
    """Return ``voxels`` with the metadata of ``image`` and a new affine."""
    result = MetaTensor(voxels).copy_meta_from(image)
    result.affine = torch.as_tensor(affine, dtype=torch.float64)
    return result
