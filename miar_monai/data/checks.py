"""What is asked of a volume before it is super-resolved, wherever it comes from; each refusal is one sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod

import numpy as np

from miar_monai.data.geometry import axial_axis, is_singular
from miar_monai.data.labels import NEAREST, label_look, refusal_of_labels
from miar_monai.data.volume import Volume
from miar_monai.errors import GeometryError, ImageError

__all__ = ["MAX_SIDE", "MAX_VOXELS", "check_num_voxels", "checked"]

MAX_VOXELS = 2**29
"""The most voxels of a volume that is read; its result has sixteen times as many."""

MAX_SIDE = 2048
"""The most voxels of a side of an axial slice. The linear estimate needs a singular value decomposition of each side,
whose time grows with its third power: half a minute for 2048 voxels, half an hour for 8192."""

_LARGEST = 1e18  # its square is a number of single precision


def check_num_voxels(path: str | os.PathLike[str], shape: Sequence[int]) -> None:
    """Refuse a volume that is too large to be super-resolved, before memory is asked for.

    Raises:
        ImageError: if it has more than `MAX_VOXELS` voxels.
    """
    if prod(shape) > MAX_VOXELS:
        raise ImageError(
            f"{path} speaks of {' x '.join(map(str, shape))} voxels, but at most {MAX_VOXELS} are read: "
            "check the file, or cut the volume into parts."
        )


def checked(volume: Volume, can_be_labels: bool = True) -> Volume:
    """Return a volume, with remarks if it looks like labels, if it can be super-resolved.

    Args:
        volume: just read.
        can_be_labels: whether it comes from where label maps do: a file, or an array of integers.

    Raises:
        ImageError: if voxels are not finite, or all the same, or beyond what can be computed with; if an axial slice is
            larger than `MAX_SIDE`; if the volume is a label map.
        GeometryError: if the affine is singular, or the only slice is not an axial one.
    """
    _check_intensities(volume)
    if is_singular(volume.affine):
        raise GeometryError(
            f"{volume.path}: the affine {np.round(volume.affine, 4).tolist()} is singular, so voxels have no place in "
            "millimeters; a file with a valid sform or qform, or another invertible affine, is needed: convert it "
            "again from its source, or correct the affine."
        )
    _check_sides(volume)
    return _check_labels(volume) if can_be_labels else volume


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
    if max(-low, high) > _LARGEST or high - low < 1 / _LARGEST:
        raise ImageError(
            f"{volume.path}: the voxels reach from {low:g} to {high:g}, beyond what can be computed with; usual "
            "intensities are needed: check the file for damage, or scale it."
        )


def _check_sides(volume: Volume) -> None:
    """Refuse slices too large for the linear estimate, and a single slice across the axial plane."""
    axis = axial_axis(volume.affine)
    slices, sides = volume.array.shape[axis], np.delete(volume.array.shape, axis)
    if sides.max() > MAX_SIDE:
        raise ImageError(
            f"{volume.path}: the axial slices have {' x '.join(map(str, sides))} voxels, but at most {MAX_SIDE} on a"
            " side are super-resolved: cut the volume into parts, or check which of its axes is the axial one."
        )
    if sides.min() == 1 and slices > 1:
        sizes = " x ".join(map(str, volume.array.shape))
        raise GeometryError(
            f"{volume.path} ({sizes} voxels) is one slice that is not axial, and only the axial plane becomes finer:"
            " give an axial slice, a volume, or the voxels of the slice as a NumPy array (X, Y)."
        )


def _check_labels(volume: Volume) -> Volume:
    look = label_look(volume.array)
    if look is None:
        return volume
    shown = ", ".join(map(str, look.values[:5])) + (f" to {look.values[-1]}" if len(look.values) > 5 else "")
    if look.is_certain:
        raise refusal_of_labels(volume.path, f"its values are {shown}", "multiply its values by 1000")
    remark = f"the voxels have only {len(look.values)} values ({shown}), in flat areas: if they are labels, {NEAREST}."
    return volume._replace(remarks=(*volume.remarks, remark))
