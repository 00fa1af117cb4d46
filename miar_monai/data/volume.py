"""A volume in the units of its file, and the description of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from miar_monai._version import __version__
from miar_monai.data.grid import Grid

__all__ = ["Volume", "as_float", "as_stored", "dtype_among", "parts_to_save", "result_description", "uncertainty_of"]

SOFTWARE = "miar-monai"
"""Name of this package in the headers of its results."""


class Volume(NamedTuple):
    """A volume in the units of its file.

    Attributes:
        array: intensities (HU for CT), (X, Y, Z), float32; labels in any dtype.
        affine: voxel indices to millimeters in RAS+, (4, 4), float64.
        dtype: for results in these units: integers if the input has unscaled (NIfTI) or rescaled (DICOM) integers of 16
            or 32 bits, otherwise float32.
        path: the file, or the folder of the series.
        modality: of the DICOM header, such as ``"CT"``; empty for other formats.
        uncertainty: the expected absolute error of a super-resolved volume in its units, (X, Y, Z), float32, or None.
        space: origin of the millimeters of the affine, by NIfTI's codes: 1 the scanner, 2 another image, 3 Talairach,
            4 MNI, 0 unknown.
        description: ``descrip`` of NIfTI, ``DerivationDescription`` of DICOM.
        series: SeriesInstanceUID that was selected in a folder with several series.
        remarks: warnings for the user about what was read, one sentence each.
        select: conditions that selected the slices of a DICOM series with several volumes.
        qform: of a NIfTI file whose affine is the sform: the map from the millimeters of the affine to those of the
            qform, (4, 4), which does not depend on the grid, and the code of the qform. If that code is 0, the map
            contains only the voxel sizes in pixdim. None if there is no second transform.
        frame_of_reference: FrameOfReferenceUID of DICOM; positions in different frames cannot be compared.
        slice_thickness: of a DICOM series in millimeters, along its third axis, as its headers state it; None if they
            state none, or several, and for other formats.
        acquired_spacing: of a DICOM series of MR, within its slices in millimeters, as its AcquisitionMatrix states it;
            smaller voxels were interpolated by the scanner. None if unknown.
    """

    array: np.ndarray
    affine: np.ndarray
    dtype: np.dtype
    path: Path
    modality: str = ""
    uncertainty: np.ndarray | None = None
    space: int = 1
    description: str = ""
    series: str = ""
    remarks: tuple[str, ...] = ()
    select: tuple[str, ...] = ()
    qform: tuple[np.ndarray, int] | None = None
    frame_of_reference: str = ""
    slice_thickness: float | None = None
    acquired_spacing: float | None = None

    @property
    def grid(self) -> Grid:
        """The voxel grid."""
        width, height, depth = self.array.shape
        return Grid((width, height, depth), self.affine)

    @property
    def slice_axis(self) -> int | None:
        """The voxel axis across the slices of a DICOM series; None for other formats, which do not state it."""
        return 2 if self.modality or self.slice_thickness is not None else None

    @property
    def is_miar_result(self) -> bool:
        """Whether this is a result of this package."""
        return SOFTWARE in self.description


def uncertainty_of(sr: Volume) -> Volume:
    """Return the expected error of a super-resolved volume as a volume in float32."""
    assert sr.uncertainty is not None, "the volume has no uncertainty"
    return Volume(
        sr.uncertainty,
        sr.affine,
        np.dtype(np.float32),
        sr.path,
        space=sr.space,
        description=result_description(True),
        qform=sr.qform,
    )


def result_description(is_error: bool = False) -> str:
    """Return the description of a result, or of the map of its error, for the 80 characters of a NIfTI header.

    Example:
        >>> result_description().split(": ")[1]
        'super-resolved, detail may be invented'
    """
    image, error = "super-resolved, detail may be invented", "expected absolute error of a super-resolved image"
    return f"{SOFTWARE} {__version__}: {error if is_error else image}"


def parts_to_save(sr: Volume) -> list[tuple[Volume, str]]:
    """Return the volumes to save of a result, each with the ``quantity`` for `write_series`.

    The image, with an empty quantity, comes last: once it exists, the result is complete.
    """
    maps = [] if sr.uncertainty is None else [(uncertainty_of(sr), "expected error")]
    return [*maps, (sr, "")]


def as_float(volume: Volume) -> Volume:
    """Return a volume to be stored in float32, which all readers support."""
    return volume._replace(dtype=np.dtype(np.float32))


def as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return intensities as stored in a dtype: for integers, rounded and saturated.

    Example:
        >>> as_stored(np.array([-0.6, 1.4, 300]), np.dtype(np.uint8))
        array([  0,   1, 255], dtype=uint8)
    """
    if dtype.kind in "iu" and array.dtype != dtype:
        limits = np.iinfo(dtype)
        array = np.rint(np.asarray(array, np.result_type(array, dtype)))  # a float that represents the limits exactly
        array = np.clip(array, limits.min, limits.max, out=array)
    return array.astype(dtype, copy=False)


def dtype_among(volume: Volume, names: Sequence[str]) -> np.dtype:
    """Return the dtype in which a file format can store a volume: its own, or the first one that holds its range.

    Args:
        volume: the volume.
        names: dtypes of the format; the last one is taken if no other holds the range.

    Example:
        >>> volume = Volume(np.array([[[0, 70000.0]]]), np.eye(4), np.dtype("uint32"), Path("a.nii"))
        >>> dtype_among(volume, ("uint8", "int16", "int32", "float32")).name
        'int32'
    """
    if volume.dtype.name in names:
        return volume.dtype
    whole = [np.dtype(name) for name in names if np.dtype(name).kind in "iu" and volume.dtype.kind in "iu"]
    low, high = float(volume.array.min()), float(volume.array.max())
    fitting = [dtype for dtype in whole if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max]
    return fitting[0] if fitting else np.dtype(names[-1])
