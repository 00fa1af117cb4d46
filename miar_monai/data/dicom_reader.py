"""Reads DICOM series: pixels by ITK (GDCM), geometry from the positions of the slices.

highdicom has similar functions, but needs pydicom 3, whereas MONAI Label needs pydicom 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from miar_monai.data.checks import check_num_voxels
from miar_monai.data.dicom_checks import check_headers, check_sizes
from miar_monai.data.dicom_frames import FRAME_NUMBER, single_slices, slice_name
from miar_monai.data.dicom_grid import LPS_TO_RAS, check_gaps, fit_grid, in_plane_axes
from miar_monai.data.dicom_headers import lenient_pydicom, numbers, read_dicom_folder, text
from miar_monai.data.dicom_select import (
    DISTINGUISHING_ELEMENTS,
    check_one_volume,
    coverage_remarks,
    parse_conditions,
    select_slices,
)
from miar_monai.data.dicom_stacks import check_one_stack, localizer_remarks, localizers
from miar_monai.data.volume import Volume
from miar_monai.errors import GeometryError, ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "acquired_pixel_spacing",
    "read_series",
    "series_headers",
]

_COSINE_TOLERANCE = 0.01
"""Tolerance of direction cosines, which may be rounded to two decimals."""

_THICKNESS_TOLERANCE = 0.05
"""Thicknesses that differ by less are considered equal; fraction of the thickness."""


@lenient_pydicom()
def read_series(folder: Path, series: str = "", select: Sequence[str] = ()) -> Volume:
    """Read a DICOM series, with its slices sorted by position.

    The affine is that of the regular grid that fits the positions of the slices best (least squares). It includes the
    shear of a tilted gantry. Frames of enhanced MR and CT images are slices, with positions, spacing and rescaling of
    their own. Localizers are left aside, with a remark.

    Args:
        folder: of the slices, or the file of an enhanced image.
        series: SeriesInstanceUID; needed if there are several series.
        select: conditions on the headers, such as ``"EchoTime=80"``; needed if the series has several volumes.

    Returns:
        The volume, in rescaled intensities (HU for CT). Its dtype is int16, int32 where that is too small, or float32
        for fractions.

    Raises:
        ImageError: if there is no series, or an image cannot be read or is not a gray-value slice.
        SettingError: if ``select`` is malformed, or matches no slice.
        GeometryError: if there are several series, stacks or volumes to choose from, or slices have no position in
            millimeters, or are missing, duplicate or unevenly spaced.
    """
    headers, remarks = _series_headers(folder, series, select)
    check_headers(folder, headers)
    affine, order = _series_affine(folder, headers)
    array = _read_slices(folder, [headers[i] for i in order])
    first = headers[order[0]]
    return Volume(
        np.ascontiguousarray(array.transpose(2, 1, 0), dtype=np.float32),
        affine,
        _result_dtype(array),
        folder,
        text(first, "Modality"),
        description=text(first, "DerivationDescription"),
        series=series,
        remarks=remarks,
        select=tuple(select),
        frame_of_reference=text(first, "FrameOfReferenceUID"),
        slice_thickness=_slice_thickness(headers),
        acquired_spacing=acquired_pixel_spacing(first),
    )


def _slice_thickness(headers: Sequence[Dataset]) -> float | None:
    """Return the thickness that all headers state in millimeters, or None if one states another or none."""
    found = [numbers(header, "SliceThickness") for header in headers]
    if any(len(one) != 1 or not 0 < one[0] < np.inf for one in found):
        return None
    thicknesses = np.array(found)
    middle = float(np.median(thicknesses))
    return middle if np.abs(thicknesses - middle).max() <= _THICKNESS_TOLERANCE * middle else None


def acquired_pixel_spacing(header: Dataset) -> float | None:
    """Return the spacing at which an MR slice was acquired along its frequency direction, by its AcquisitionMatrix.

    It is the field of view over the number of samples. That of the phase direction is nominally the same: the scanner
    acquires fewer lines there to save time (PercentSampling, PercentPhaseFieldOfView), by which the lines do not
    determine it.

    Args:
        header: with the standard elements of an MR image.

    Returns:
        Millimeters, or None for other images, or if elements are missing or contradict each other.

    Example:
        >>> from pydicom import Dataset
        >>> header = Dataset()
        >>> header.Modality, header.Rows, header.Columns, header.PixelSpacing = "MR", 512, 448, [0.45, 0.45]
        >>> header.AcquisitionMatrix = [0, 256, 168, 0]  # frequency along rows, along columns, phase likewise
        >>> acquired_pixel_spacing(header)
        0.9
    """
    matrix, spacing = numbers(header, "AcquisitionMatrix"), numbers(header, "PixelSpacing")
    if text(header, "Modality") != "MR" or len(matrix) != 4 or len(spacing) != 2:
        return None
    along_rows, along_columns = matrix[:2]
    phase = text(header, "InPlanePhaseEncodingDirection")[:3]
    if (along_rows > 0) == (along_columns > 0) or phase not in ("", "COL" if along_rows > 0 else "ROW"):
        return None
    field = header.Columns * spacing[1] if along_rows > 0 else header.Rows * spacing[0]
    diameters = [mm for mm in numbers(header, "ReconstructionDiameter") if mm > 0]  # without padding of the image
    return float(min([field, *diameters]) / max(along_rows, along_columns))


def _read_slices(folder: Path, headers: Sequence[Dataset]) -> np.ndarray:
    """Return the rescaled slices in the order of their headers, (Z, Y, X)."""
    import itk

    arrays, unread = [], []
    with single_slices(headers) as files:
        for file, header in zip(files, headers, strict=True):
            reader = itk.GDCMImageIO.New(FileName=file)
            try:
                reader.ReadImageInformation()
            except RuntimeError:
                unread.append(Path(slice_name(header)).name)
                continue
            check_num_voxels(slice_name(header), [len(files), *(reader.GetDimensions(i) for i in range(2))])
            if not unread:
                try:
                    arrays.append(itk.array_from_image(itk.imread(file, imageio=reader)))
                except RuntimeError as error:
                    raise _unreadable(slice_name(header), error) from error
    _check_unread(folder, unread)
    check_sizes(folder, {array.shape for array in arrays})
    return np.concatenate(arrays)


def _check_unread(folder: Path, names: Sequence[str]) -> None:
    if names:
        raise ImageError(
            f"{folder}: {len(names)} DICOM files cannot be read as images, the first is {min(names)}; "
            "complete slices are needed: copy them again, or move files that are not slices out of the folder."
        )


def _unreadable(path: str | Path, error: Exception) -> ImageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return ImageError(f"{path} cannot be read ({reason}): a complete DICOM image is needed; copy it again.")


def _result_dtype(array: np.ndarray) -> np.dtype:
    if array.dtype.kind == "f":
        return np.dtype(np.float32)
    return np.dtype(np.int16 if array.min() >= -(2**15) and array.max() < 2**15 else np.int32)


@lenient_pydicom()
def series_headers(folder: Path, series: str = "", select: Sequence[str] = ()) -> list[Dataset]:
    """Return the headers of the slices of a series, in arbitrary order, with the elements needed for a volume.

    Args:
        folder: of the slices.
        series: as in `read_series`.
        select: as in `read_series`.

    Raises:
        ImageError: if there is no series, or a DICOM file cannot be read as an image.
        SettingError: if ``select`` is malformed, or matches no slice.
        GeometryError: if the series is not found, or there are several to choose from.
    """
    return _series_headers(folder, series, select)[0]


def _series_headers(folder: Path, uid: str, select: Sequence[str]) -> tuple[list[Dataset], tuple[str, ...]]:
    """Return the headers of one volume, and remarks on its selection."""
    found = read_dicom_folder(
        folder, [*DISTINGUISHING_ELEMENTS, *(condition.keyword for condition in parse_conditions(select))]
    )
    series = found.series
    if not (series or found.unreadable):
        others = ", ".join(f"{count} {name}" for name, count in sorted(found.others.items()))
        only = f", only other objects ({others})" if others else ""
        raise ImageError(
            f"{folder} contains no DICOM series{only}: give a folder with the slices of one series, or a NIfTI file."
        )
    _check_unread(folder, found.unreadable)
    is_ambiguous = uid not in series if uid else len(series) > 1
    if is_ambiguous:
        listed = ", ".join(
            f"{name or 'one without UID'} ({text(headers[0], 'SeriesDescription') or 'no description'}, "
            f"{len(headers)} {'frames' if FRAME_NUMBER in headers[0] else 'files'})"
            for name, headers in sorted(series.items())
        )
        which = f"{len(series)} DICOM series" + (f", but not {uid}" if uid else "")
        raise GeometryError(
            f"{folder} contains {which}: {listed}; one is needed: choose it (--series UID, or series of"
            " miar_monai.data.io.read_volume), or move each into its own folder."
        )
    headers = series[uid] if uid else next(iter(series.values()))
    chosen = select_slices(folder, headers, select)
    aside = localizers(chosen)
    kept = _without(chosen, aside)
    check_one_stack(folder, kept)
    return kept, (*localizer_remarks(aside), *coverage_remarks(_without(headers, aside), kept))


def _without(headers: Sequence[Dataset], others: Sequence[Dataset]) -> list[Dataset]:
    left_out = {id(header) for header in others}  # equal headers may be those of several slices
    return [header for header in headers if id(header) not in left_out]


def _series_affine(folder: Path, headers: Sequence[Dataset]) -> tuple[np.ndarray, list[int]]:
    """Return the RAS+ affine of slices, and their order along their normal, from their positions."""
    frames = [int(max(1, *numbers(header, "NumberOfFrames"), 1)) for header in headers]
    sizes = zip(frames, headers, strict=True)
    check_sizes(folder, {(count, header.Rows, header.Columns) for count, header in sizes})
    positions, orientations, spacings = (
        np.array([numbers(header, name) for header in headers])
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    _check_parallel(folder, headers, orientations, spacings)
    check_one_volume(folder, headers)
    axes = _axes(folder, np.median(orientations, axis=0).reshape(2, 3))
    normal = np.cross(*axes)
    order = np.argsort(positions @ normal, kind="stable")
    if len(headers) > 1:
        check_gaps(folder, positions[order])
        origin, step = fit_grid(positions[order])
    else:
        origin, step = positions[0], normal * numbers(headers[0], "SliceThickness")[0]
    affine = np.eye(4)
    affine[:3, :2] = axes.T * np.median(spacings, axis=0)[::-1]
    affine[:3, 2] = step
    affine[:3, 3] = origin
    return LPS_TO_RAS @ affine, order.tolist()


def _axes(folder: Path, orientation: np.ndarray) -> np.ndarray:
    """Return the directions along a row and along a column, (2, 3), corrected for rounding."""
    axes = in_plane_axes(orientation)
    if np.abs(axes - orientation).max() > _COSINE_TOLERANCE:
        raise GeometryError(
            f"{folder}: ImageOrientationPatient is {orientation.ravel().tolist()}, but perpendicular unit vectors are "
            "needed: export the series again."
        )
    return axes


def _check_parallel(folder: Path, headers: Sequence[Dataset], orientations: np.ndarray, spacings: np.ndarray) -> None:
    """Check that no slice, such as a localizer, differs from the others in orientation or voxel size."""
    turned = np.abs(orientations - np.median(orientations, axis=0)).max(axis=1) > 2e-3  # beyond rounding
    odd = np.flatnonzero(turned | (np.abs(spacings - np.median(spacings, axis=0)).max(axis=1) > 1e-3)).tolist()
    if odd:
        first = min(Path(str(headers[i].filename)).name for i in odd)
        raise GeometryError(
            f"{folder}: {len(odd)} of {len(headers)} slices differ from the others in orientation or voxel size, the "
            f"first is {first}; parallel slices of one voxel size are needed: put each stack into its own "
            "folder, and remove localizers."
        )
