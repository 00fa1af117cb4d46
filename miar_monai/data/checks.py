"""Checks of a volume before super-resolution."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod

import numpy as np
from nibabel.affines import voxel_sizes

from miar_monai.data.geometry import is_singular
from miar_monai.data.labels import RESAMPLING_ADVICE, label_evidence, label_map_error
from miar_monai.data.spectrum import PLANES
from miar_monai.data.volume import Volume
from miar_monai.errors import GeometryError, ImageError

__all__ = ["MAX_SIDE", "MAX_VOXELS", "check_affine", "check_num_voxels", "check_volume"]

MAX_VOXELS = 2**29
"""Maximum number of voxels of a volume; its result has sixteen times as many."""

MAX_SIDE = 2048
"""Maximum side of an axial slice, or of a single slice, in voxels. The linear estimate needs a singular value
decomposition for each side, whose time is cubic in it: half a minute for 2048 voxels, half an hour for 8192."""

_MIN_SIZE, _MAX_SIZE = 1e-6, 1e6  # of voxels in millimeters
_MAX_INTENSITY = 1e18  # its square fits into single precision


def check_num_voxels(path: str | os.PathLike[str], shape: Sequence[int]) -> None:
    """Check, before memory is allocated, that a volume is small enough to be super-resolved.

    Raises:
        ImageError: if it has more than `MAX_VOXELS` voxels.
    """
    if prod(shape) > MAX_VOXELS:
        raise ImageError(
            f"{path} declares {' x '.join(map(str, shape))} voxels, but at most {MAX_VOXELS} are supported: "
            "check the file, or cut the volume into parts."
        )


def check_volume(volume: Volume, can_be_labels: bool = True) -> Volume:
    """Check that a volume can be super-resolved, and return it, with a remark if it may be a label map.

    Args:
        volume: just read.
        can_be_labels: whether it may be a label map: it comes from a file, or from an array of integers.

    Raises:
        ImageError: if voxels are not finite, all equal, or too large for single precision; if a slice is larger
            than `MAX_SIDE`; if the volume is a label map.
        GeometryError: if the affine is unusable (see `check_affine`), or the volume is a line across the axial plane.
    """
    _check_intensities(volume)
    check_affine(volume)
    _check_sides(volume)
    return _check_labels(volume) if can_be_labels else volume


def check_affine(volume: Volume) -> None:
    """Check that the affine of a volume gives its voxels a position and a size that can be meant.

    Raises:
        GeometryError: if it is singular, or a voxel is smaller than a nanometer or larger than a kilometer.
    """
    if is_singular(volume.affine):
        raise GeometryError(
            f"{volume.path}: the affine {np.round(volume.affine, 4).tolist()} is singular, so voxels have no position "
            "in millimeters; an invertible affine, from a valid sform or qform, is needed: convert the file again from "
            "its source, or correct the affine."
        )
    sizes = voxel_sizes(volume.affine)
    if not (sizes.min() >= _MIN_SIZE and sizes.max() <= _MAX_SIZE):
        raise GeometryError(
            f"{volume.path}: its voxels have {' x '.join(f'{mm:.3g}' for mm in sizes)} mm, but sizes from {_MIN_SIZE:g}"
            f" to {_MAX_SIZE:g} mm are supported: check the file for damage, or correct the affine."
        )


def _check_intensities(volume: Volume) -> None:
    bad = int(np.count_nonzero(~np.isfinite(volume.array)))
    if bad:
        nan = int(np.count_nonzero(np.isnan(volume.array)))
        raise ImageError(
            f"{volume.path}: {nan} voxels are NaN and {bad - nan} infinite, of {volume.array.size}; finite "
            "intensities are needed: repair the volume, for example by setting these voxels to the background."
        )
    low, high = float(volume.array.min()), float(volume.array.max())
    if low == high:
        raise ImageError(
            f"{volume.path}: all {volume.array.size} voxels are {low:g}; "
            "an image with contrast is needed: check the export of this volume."
        )
    if max(-low, high) > _MAX_INTENSITY or high - low < 1 / _MAX_INTENSITY:
        raise ImageError(
            f"{volume.path}: the voxels range from {low:g} to {high:g}, outside of single precision; ordinary "
            "intensities are needed: check the file for damage, or scale it."
        )


def _check_sides(volume: Volume) -> None:
    """Check that slices are small enough for the linear estimate, and more than a line."""
    grid = volume.grid
    sides = np.delete(grid.shape, grid.patient_axes.index(grid.normal_axis))
    plane = tuple(PLANES)[grid.normal_axis]
    if sides.max() > MAX_SIDE:
        raise ImageError(
            f"{volume.path}: the {plane} slices have {' x '.join(map(str, sides))} voxels, but"
            f" sides of at most {MAX_SIDE} are supported: cut the volume into parts, or check which of its axes is the"
            " axial one."
        )
    if sides.max() == 1:
        sizes = " x ".join(map(str, grid.shape))
        raise GeometryError(
            f"{volume.path} ({sizes} voxels) is a line across the axial plane, but a slice or a volume is needed:"
            " check the axes of the image."
        )


def _check_labels(volume: Volume) -> Volume:
    evidence = label_evidence(volume.array)
    if evidence is None:
        return volume
    shown = ", ".join(map(str, evidence.values[:5])) + (
        f" to {evidence.values[-1]}" if len(evidence.values) > 5 else ""
    )
    if evidence.is_certain:
        raise label_map_error(volume.path, f"its values are {shown}", "multiply its values by 1000")
    remark = (
        f"the voxels have only {len(evidence.values)} values ({shown}), in flat areas: if they are labels, "
        f"{RESAMPLING_ADVICE}."
    )
    return volume._replace(remarks=(*volume.remarks, remark))
