"""Conversion between volumes and MetaTensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.utils import scale_affine
from monai.utils import ImageMetaKey
from nibabel.affines import voxel_sizes
from torch import Tensor

from miar_monai.data.geometry import fov_corners
from miar_monai.data.grid import Grid
from miar_monai.data.volume import Volume

__all__ = [
    "DESCRIPTION_KEY",
    "DTYPE_KEY",
    "AcquiredSlices",
    "acquired_slices",
    "finer_batch",
    "grid_of",
    "image_name",
    "metatensor_to_volume",
    "resampled",
    "volume_to_metatensor",
    "with_affine",
]

DTYPE_KEY, DESCRIPTION_KEY = "original_dtype", "descrip"
_AXIS_KEY, _THICKNESS_KEY = "slice_axis", "slice_thickness"
_SPACE_KEY, _QFORM_KEY, _QFORM_CODE_KEY = "sform_code", "sform_to_qform", "qform_code"
_FRAME_KEY = "frame_of_reference"


def volume_to_metatensor(volume: Volume) -> MetaTensor:
    """Return a volume as a MetaTensor.

    Args:
        volume: array (X, Y, Z).

    Returns:
        The intensities, (1, X, Y, Z), float32. The metadata contain the affine, the path (``filename_or_obj``), the
        dtype of results (``original_dtype``), the space and the description under their names in NIfTI
        (``sform_code`` and ``descrip``), the qform (``sform_to_qform``, (4, 4), and ``qform_code``), what
        `acquired_slices` returns (``slice_axis``, -1 if unknown, and ``slice_thickness``, NaN if unknown), and
        ``frame_of_reference``.

    Example:
        >>> volume = Volume(np.zeros((5, 4, 3), np.float32), np.diag([2.0, 2, 3, 1]), np.dtype(np.int16), Path("a.nii"))
        >>> image = volume_to_metatensor(volume)
        >>> image.shape, image.meta["original_dtype"], metatensor_to_volume(image).path
        (torch.Size([1, 5, 4, 3]), 'int16', PosixPath('a.nii'))
    """
    axis = volume.slice_axis
    to_qform, code = volume.qform or (np.eye(4), volume.space)  # None cannot be collated
    return MetaTensor(
        torch.from_numpy(np.ascontiguousarray(volume.array))[None],
        affine=torch.as_tensor(volume.affine, dtype=torch.float64),
        meta={
            ImageMetaKey.FILENAME_OR_OBJ: str(volume.path),
            DTYPE_KEY: volume.dtype.name,
            _SPACE_KEY: volume.space,
            DESCRIPTION_KEY: volume.description,
            _QFORM_KEY: to_qform,
            _QFORM_CODE_KEY: code,
            _FRAME_KEY: volume.frame_of_reference,
            _AXIS_KEY: -1 if axis is None else volume.grid.patient_axes[axis],
            _THICKNESS_KEY: float("nan") if volume.slice_thickness is None else volume.slice_thickness,
        },
    )


def metatensor_to_volume(image: MetaTensor) -> Volume:
    """Return a MetaTensor as a volume, the inverse of `volume_to_metatensor`.

    Args:
        image: (1, X, Y, Z), on any device. Metadata that are missing get the defaults of `Volume`, the dtype float32.
    """
    meta, qform = image.meta, None
    if _QFORM_KEY in meta:
        qform = np.asarray(meta[_QFORM_KEY]), int(meta[_QFORM_CODE_KEY])
    return Volume(
        image.as_tensor()[0].cpu().float().numpy(),
        np.asarray(image.affine, dtype=np.float64),
        np.dtype(meta.get(DTYPE_KEY, "float32")),
        Path(image_name(image)),
        space=int(meta.get(_SPACE_KEY, 1)),
        description=str(meta.get(DESCRIPTION_KEY, "")),
        qform=qform,
        frame_of_reference=str(meta.get(_FRAME_KEY, "")),
    )


class AcquiredSlices(NamedTuple):
    """What the file of an image states of its slices."""

    axis: int | None
    """The patient axis across them; None if unknown."""
    thickness: float | None
    """In millimeters; None if unknown."""


def acquired_slices(image: Tensor) -> AcquiredSlices:
    """Return what the file of an image, loaded as by `volume_to_metatensor`, states of its slices."""
    meta = getattr(image, "meta", {})
    axis, thickness = int(meta.get(_AXIS_KEY, -1)), float(meta.get(_THICKNESS_KEY, "nan"))
    return AcquiredSlices(None if axis < 0 else axis, None if np.isnan(thickness) else thickness)


def grid_of(image: Tensor) -> Grid:
    """Return the grid of a volume (1, X, Y, Z); without an affine, one of millimeters in RAS+.

    Example:
        >>> grid_of(torch.zeros(1, 4, 3, 2)).spacing
        array([1., 1., 1.])
    """
    width, height, depth = image.shape[1:]
    affine = np.asarray(image.affine.cpu(), dtype=np.float64) if isinstance(image, MetaTensor) else np.eye(4)
    return Grid((width, height, depth), affine.reshape(4, 4))


def image_name(image: Tensor) -> str:
    """Return the name of an image in messages: the path of its file."""
    return str(getattr(image, "meta", {}).get(ImageMetaKey.FILENAME_OR_OBJ, "the volume"))


def with_affine(image: MetaTensor, voxels: Tensor, affine: np.ndarray) -> MetaTensor:
    """Return ``voxels`` with the metadata of ``image`` and another affine, (4, 4)."""
    result = MetaTensor(voxels).copy_meta_from(image)
    result.affine = torch.as_tensor(affine, dtype=torch.float64)
    return result


def finer_batch(inputs: MetaTensor, voxels: Tensor, scales: Sequence[float] | None = None) -> MetaTensor:
    """Return the finer voxels of a batch with the metadata of their inputs and the affines of the finer grids.

    The grids are those of `miar_monai.data.grid.Grid.resized`: of exact spacing, around the center of the input.

    Args:
        inputs: slices (B, 1, h, w) or volumes (B, 1, h, w, D), with one affine or (B, 4, 4).
        voxels: (B, C, H, W) or (B, C, H, W, D).
        scales: how many times finer each axis is, for as many as change; by default the ratios of the sizes, which are
            right for whole numbers only.

    Example:
        >>> coarse = MetaTensor(torch.zeros(1, 1, 8, 8, 3), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
        >>> finer_batch(coarse, torch.zeros(1, 1, 32, 32, 3)).affine[:3, 3].tolist()
        [-0.75, -0.75, 0.0]
    """
    sizes, finer_sizes = ([*image.shape[2:], 1][:3] for image in (inputs, voxels))
    ratios = [new / old for new, old in zip(finer_sizes, sizes, strict=True)]
    steps = [1 / factor for factor in (*(scales or ()), *ratios[len(scales or ()) :])]
    affines = torch.as_tensor(inputs.affine, dtype=torch.float64).cpu().reshape(-1, 4, 4).numpy()
    width, height, depth = sizes
    finer = np.stack([Grid((width, height, depth), affine).resized(steps).affine for affine in affines])
    output = MetaTensor(voxels).copy_meta_from(inputs)
    output.affine = torch.from_numpy(finer).reshape(inputs.affine.shape)
    return output


def resampled(image: MetaTensor, voxels: Tensor) -> MetaTensor:
    """Return ``voxels``, of another resolution, with the metadata of ``image``.

    A `MetaTensor` of voxels keeps its affine if that covers the field of view of ``image`` to within half a voxel, as
    the finer grid of a broken factor does. Otherwise the affine follows from the sizes, for whole factors. Voxel
    indices are voxel centers: on a grid with four times as many voxels, voxel 0 moves by -3/8 voxels of the image.

    Args:
        image: (C, X, Y, Z).
        voxels: (C', X', Y', Z').

    Example:
        >>> image = MetaTensor(torch.zeros(1, 8, 8, 3), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
        >>> resampled(image, torch.zeros(1, 32, 32, 3)).affine[:3, 3].tolist()
        [-0.75, -0.75, 0.0]
    """
    coarse = np.asarray(image.affine, dtype=np.float64)
    if isinstance(voxels, MetaTensor):
        own, voxels = np.asarray(voxels.affine.cpu(), dtype=np.float64), voxels.as_tensor()
        shift = fov_corners(own, voxels.shape[1:]) - fov_corners(coarse, image.shape[1:])
        if np.linalg.norm(shift, axis=1).max() <= 0.5 * voxel_sizes(own).max():
            return with_affine(image, voxels, own)
    return with_affine(image, voxels, coarse @ scale_affine(image.shape[1:], voxels.shape[1:]))
