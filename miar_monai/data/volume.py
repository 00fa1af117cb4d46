"""A volume in the units of its file, and the description of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from miar_monai._version import __version__
from miar_monai.data.formats import volume_stem
from miar_monai.data.grid import Grid

__all__ = [
    "SAMPLE_MAPS",
    "VOXEL_BYTES",
    "Volume",
    "as_float",
    "as_stored",
    "dtype_among",
    "parts_to_save",
    "quantity_in",
    "quantity_of",
    "result_description",
    "sample_maps",
    "sampled_volumes",
    "shown_maps",
    "uncertainty_of",
]

SOFTWARE = "miar-monai"
"""Name of this package in the headers of its results."""

SAMPLE_MAPS = ("mean", "std", "p05", "p95")
"""Names of the maps of posterior samples: mean, standard deviation, and the limits of the interval of 90 %."""

VOXEL_BYTES = 4
"""Memory of a voxel of a result, in float32."""

_QUANTITIES = {
    "uncertainty": "expected error",
    "mean": "mean of samples",
    "std": "standard deviation of samples",
    "p05": "5th percentile of samples",
    "p95": "95th percentile of samples",
}
_DESCRIPTIONS = {
    "uncertainty": "expected absolute error of a super-resolved image",
    "mean": "mean of samples, detail may be invented",
    "std": "standard deviation of samples of a super-resolved image",
    "p05": "5th percentile of samples of a super-resolved image",
    "p95": "95th percentile of samples of a super-resolved image",
}


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
        sampled: maps of posterior samples of a super-resolved volume by the names of `sample_maps`, in its units, each
            (X, Y, Z), float32; None without samples.
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
    sampled: Mapping[str, np.ndarray] | None = None

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
    return _map_of(sr, sr.uncertainty, "uncertainty")


def sampled_volumes(sr: Volume) -> dict[str, Volume]:
    """Return the maps of the posterior samples of a super-resolved volume as volumes in float32, by their names."""
    return {name: _map_of(sr, array, name) for name, array in (sr.sampled or {}).items()}


def _map_of(sr: Volume, array: np.ndarray, name: str) -> Volume:
    """Return values of the voxels of a super-resolved volume as a volume in float32."""
    return Volume(
        array,
        sr.affine,
        np.dtype(np.float32),
        sr.path,
        space=sr.space,
        description=result_description(name),
        select=sr.select,
        qform=sr.qform,
    )


def sample_maps(count: int, keep: bool = False) -> list[str]:
    """Return the names of the maps of some samples: `SAMPLE_MAPS`, and one for each sample if they are kept.

    Example:
        >>> sample_maps(2, keep=True)
        ['mean', 'std', 'p05', 'p95', 'sample_01', 'sample_02']
        >>> sample_maps(0)
        []
    """
    names = [f"sample_{number:02}" for number in range(1, count + 1)] if keep else []
    return [*SAMPLE_MAPS, *names] if count else []


def result_description(name: str = "") -> str:
    """Return the description of a result, or of one of its maps, for the 80 characters of a NIfTI header.

    Args:
        name: ``"uncertainty"`` or a name from `sample_maps`; others stand for the result and its samples.

    Example:
        >>> result_description().split(": ")[1]
        'super-resolved, detail may be invented'
    """
    return f"{SOFTWARE} {__version__}: {_DESCRIPTIONS.get(name, 'super-resolved, detail may be invented')}"


def parts_to_save(sr: Volume) -> list[tuple[Volume, str]]:
    """Return the volumes to save of a result, each with its kind: ``"uncertainty"``, or a name of `sample_maps`.

    The image, whose kind is empty, comes last: once it exists, the result is complete.
    """
    maps = {} if sr.uncertainty is None else {"uncertainty": uncertainty_of(sr)}
    return [*((volume, kind) for kind, volume in (maps | sampled_volumes(sr)).items()), (sr, "")]


def shown_maps(sr: Volume) -> dict[str, Volume]:
    """Return the maps of a result that tell how certain it is, in float32, by what they show.

    They are the expected error and the standard deviation of the samples, or those of both that the result has.
    """
    return {quantity_of(kind): volume for volume, kind in parts_to_save(sr) if kind in ("uncertainty", "std")}


def quantity_of(kind: str) -> str:
    """Return the short name of the values of a map for `write_series`, given its kind; empty for an image.

    Example:
        >>> [quantity_of(kind) for kind in ("", "p95", "sample_02")]
        ['', '95th percentile of samples', 'sample 02']
    """
    return _QUANTITIES.get(kind, kind.replace("_", " "))


def quantity_in(volume: Volume) -> str:
    """Return what a map shows, as `quantity_of` names it: by its description, or by the end of its name.

    Returns:
        The name of the file or the folder if neither tells, as for a map of other software.

    Example:
        >>> from pathlib import Path
        >>> other = Volume(np.zeros((1, 1, 1)), np.eye(4), np.dtype("float32"), Path("a.nii"))
        >>> quantity_in(other._replace(description=result_description("std"))), quantity_in(other)
        ('standard deviation of samples', 'a.nii')
    """
    stem = volume_stem(volume.path)
    for kind, quantity in _QUANTITIES.items():
        if f": {_DESCRIPTIONS[kind]}" in volume.description or volume.description.startswith(f"{quantity} of "):
            return quantity
    return next((quantity for kind, quantity in _QUANTITIES.items() if stem.endswith(f"_{kind}")), volume.path.name)


def as_float(volume: Volume) -> Volume:
    """Return a volume to be stored in float32, which all readers support."""
    return volume._replace(dtype=np.dtype(np.float32))


def as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return intensities as stored in a dtype: for integers, rounded and saturated, in the order of NIfTI.

    Example:
        >>> as_stored(np.array([-0.6, 1.4, 300]), np.dtype(np.uint8))
        array([  0,   1, 255], dtype=uint8)
    """
    if dtype.kind not in "iu" or array.dtype == dtype:
        return array.astype(dtype, copy=False)
    limits, stored = np.iinfo(dtype), np.empty(array.shape, dtype, order="F")
    exact = np.result_type(array, dtype)  # a float that represents the limits
    for k in range(array.shape[-1]):  # not at once, which would take the memory of two more floats
        stored[..., k] = np.rint(array[..., k].astype(exact)).clip(limits.min, limits.max)
    return stored


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
