"""A volume in the units of its file, and what is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

import miar_monai

__all__ = ["Volume", "as_float", "as_stored", "parts_to_save", "result_description", "uncertainty_of"]

SOFTWARE = "miar-monai"
"""Results of this package say so by this name in their headers."""


class Volume(NamedTuple):
    """A volume in the units of its file.

    Attributes:
        array: intensities (HU for CT), (X, Y, Z), float32.
        affine: voxel indices to millimeters in RAS+, (4, 4), float64.
        dtype: what a result in these units is stored in: integers where the input has integers of 16 or 32 bits
            without scaling (NIfTI) or after rescaling (DICOM), otherwise float32.
        path: the file, or the folder of the series.
        modality: of the DICOM header, such as ``"CT"``; empty where no file says it.
        uncertainty: the expected absolute error of a super-resolved volume in its units, (X, Y, Z), float32; None
            where nobody asked for it.
        space: what the millimeters of the affine are counted from, as NIfTI's codes say it: 1 the scanner's origin, 2
            another image, 3 Talairach, 4 MNI; 0 where a file does not say where its voxels lie.
        description: what the file says of itself: ``descrip`` of NIfTI, ``DerivationDescription`` of DICOM.
        series: SeriesInstanceUID that was asked for, of a folder with several.
        remarks: what reading found that a user must know, a sentence each, such as which of two transforms was taken.
        select: what the headers of its slices hold, of a DICOM series with several volumes.
        qform: of a NIfTI file whose sform is the affine: the map from the millimeters of the affine to those of the
            qform, (4, 4), which is the same whatever grid the volume is resampled to, and the code of the qform. Where
            the qform has no code, only the sizes in pixdim differ. None where there is no second transform.
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

    @property
    def is_miar_result(self) -> bool:
        """Whether this is a result of this package already."""
        return SOFTWARE in self.description


def uncertainty_of(sr: Volume) -> Volume:
    """Return the expected error of a super-resolved volume as a volume of its own, which is never rounded."""
    assert sr.uncertainty is not None, "uncertainty was not asked for"
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
    """Return how a result describes itself in the 80 characters of a NIfTI header, or the map of its error.

    Example:
        >>> result_description().split(": ")[1]
        '4x super-resolution, detail may be invented'
    """
    image, error = "4x super-resolution, detail may be invented", "expected absolute error of a 4x super-resolution"
    return f"{SOFTWARE} {miar_monai.__version__}: {error if is_error else image}"


def parts_to_save(sr: Volume) -> list[tuple[Volume, str]]:
    """Return what is saved of a super-resolved volume, each part with the ``quantity`` that `write_series` names it by.

    The image itself, whose quantity is the source's and so has no name, comes last: when it is there, all is.
    """
    maps = [] if sr.uncertainty is None else [(uncertainty_of(sr), "expected error")]
    return [*maps, (sr, "")]


def as_float(volume: Volume) -> Volume:
    """Return a volume that is stored in float32, which all readers know."""
    return volume._replace(dtype=np.dtype(np.float32))


def as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return intensities as a file of a dtype holds them: for integers, rounded and saturated.

    Example:
        >>> as_stored(np.array([-0.6, 1.4, 300]), np.dtype(np.uint8))
        array([  0,   1, 255], dtype=uint8)
    """
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        array = np.rint(np.asarray(array, np.result_type(array, dtype)))  # a float that holds the limits exactly
        array = np.clip(array, limits.min, limits.max, out=array)
    return array.astype(dtype, copy=False)
