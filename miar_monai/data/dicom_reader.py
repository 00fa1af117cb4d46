"""DICOM series in: slices read with ITK (GDCM), placed where their own positions say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from miar_monai.data.dicom_grid import LPS_TO_RAS, check_gaps, even_grid, in_plane_axes
from miar_monai.data.dicom_headers import (
    as_they_are,
    dicom_files,
    holds_slices,
    is_dicom,
    is_missing,
    is_mosaic,
    numbers,
    read_folder,
    slice_files,
    text,
    values,
)
from miar_monai.data.dicom_select import DIFFERENCES, check_one_volume, conditions, selected, uncovered
from miar_monai.errors import GeometryError, ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "LPS_TO_RAS",
    "MAX_VOXELS",
    "check_num_voxels",
    "dicom_files",
    "dicom_tag",
    "holds_slices",
    "is_dicom",
    "read_series",
    "series_files",
    "slice_files",
]

MAX_VOXELS = 2**29
"""The most voxels of a volume that is read; its result has sixteen times as many."""

_ROUNDED_COSINES = 0.01
"""How far direction cosines may be from perpendicular unit vectors: two decimals."""


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


def dicom_tag(path: str | os.PathLike[str], tag: str) -> str:
    """Return the text of one tag of a DICOM image, or an empty text where the tag or the image is missing.

    Args:
        path: a DICOM file.
        tag: group and element in hexadecimal, such as ``"0010|0020"`` for the PatientID.
    """
    import itk

    reader = itk.GDCMImageIO.New(FileName=str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # a DICOM file without an image, such as a structured report
        return ""
    tags = reader.GetMetaDataDictionary()
    return str(tags[tag]).strip() if tags.HasKey(tag) else ""


@as_they_are()
def read_series(
    folder: Path, series: str = "", select: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, np.dtype, str, tuple[str, ...]]:
    """Read the one series in a folder, or one of several, its slices sorted by position.

    The affine is that of the even grid that fits the positions of the slices best, so the shear of a tilted gantry is
    kept.

    Args:
        folder: holds the slices of one series.
        series: SeriesInstanceUID of the one to read, where there are several.
        select: what the headers of the slices must hold, such as ``"EchoTime=80"``, where a series has several volumes.

    Returns:
        The rescaled intensities (HU for CT), (X, Y, Z), float32; the affine to millimeters in RAS+, (4, 4), float64;
        the dtype that results in these units are stored in: int16 where it holds them, float32 for fractions; the
        file of one of the slices; and remarks for `miar_monai.data.io.Volume`.

    Raises:
        ImageError: if there is no series, or an image cannot be read or is not a gray-value slice.
        SettingError: if ``select`` is of another form, or chooses nothing.
        GeometryError: if there are several series or volumes and it is not said which, or slices have no place in
            millimeters, or are missing, duplicate or unevenly spaced.
    """
    headers, remarks = _series_headers(folder, series, select)
    _check_headers(folder, headers)
    affine, order = _series_affine(folder, headers)
    files = [str(headers[i].filename) for i in order]
    array = _read_slices(folder, files)
    array, dtype = np.ascontiguousarray(array.transpose(2, 1, 0), dtype=np.float32), _result_dtype(array)
    return array, affine, dtype, files[0], remarks


def _read_slices(folder: Path, files: Sequence[str]) -> np.ndarray:
    """Return the rescaled slices in the order of the files, (Z, Y, X)."""
    import itk

    arrays, unread = [], []
    for file in files:
        reader = itk.GDCMImageIO.New(FileName=file)
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            unread.append(Path(file).name)
            continue
        check_num_voxels(file, [len(files), *(reader.GetDimensions(i) for i in range(2))])
        if not unread:
            try:
                arrays.append(itk.array_from_image(itk.imread(file, imageio=reader)))
            except RuntimeError as error:
                raise _unreadable(file, error) from error
    _check_unread(folder, unread)
    _check_sizes(folder, {array.shape for array in arrays})
    return np.concatenate(arrays)


def _check_unread(folder: Path, names: Sequence[str]) -> None:
    if names:
        raise ImageError(
            f"{folder}: {len(names)} DICOM files cannot be read as images, the first is {min(names)}; "
            "complete slices are needed: copy them again, or move what is not a slice out of the folder."
        )


def _check_sizes(folder: Path, shapes: set[tuple[int, ...]]) -> None:
    if len(shapes) > 1 or len(shape := min(shapes)) != 3 or shape[0] != 1:
        raise ImageError(
            f"{folder}: the images have the sizes {sorted(shapes)}; gray-value slices of one size, one a file, are "
            "needed: put the slices of one volume into a folder of their own (multi-frame and color DICOM are not "
            "read)."
        )


def _unreadable(path: str | Path, error: Exception) -> ImageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return ImageError(f"{path} cannot be read ({reason}): a complete DICOM image is needed; copy it again.")


def _check_headers(folder: Path, headers: Sequence[Dataset]) -> None:
    """Refuse what ITK would fill with a guess, such as 1 mm for a missing PixelSpacing, or leave out."""
    needed = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    needed |= {"SliceThickness": 1} if len(headers) == 1 else {}  # otherwise the positions tell
    for header in headers:
        _check_kind(header)
        _check_units(header)
        for name, count in needed.items():
            _check_place(header, name, count)
    frames = {text(header, "FrameOfReferenceUID") for header in headers}
    if len(frames) > 1:
        raise GeometryError(
            f"{folder}: the slices have {len(frames)} frames of reference, so their positions do not belong together; "
            "slices of one are needed: put each stack into a folder of its own."
        )
    largest = max(headers, key=lambda header: int(header.Rows * header.Columns))
    check_num_voxels(str(largest.filename), [len(headers), largest.Columns, largest.Rows])


def _check_kind(header: Dataset) -> None:
    """Refuse an image that is no single slice of gray values."""
    file = header.filename
    if any(f"{part}FunctionalGroupsSequence" in header for part in ("Shared", "PerFrame")):
        raise ImageError(
            f"{file} is an enhanced (multi-frame) image, which is not read: a series with one slice a file is needed; "
            "export it as such, or convert it to NIfTI."
        )
    if is_mosaic(header):
        raise ImageError(
            f"{file} is a mosaic, which shows the slices of a volume as tiles of one image: a series with one slice a "
            "file is needed; convert the mosaic to NIfTI, for example with dcm2niix."
        )
    kind = text(header, "PhotometricInterpretation")[:64]
    if kind != "MONOCHROME2":  # ITK turns MONOCHROME1 around, units lost
        found = "inverted gray values" if kind == "MONOCHROME1" else "no gray values"
        raise ImageError(
            f"{file} holds {found} ({kind}), whose units would come out wrong: MONOCHROME2 is needed; convert the "
            "series."
        )


def _check_units(header: Dataset) -> None:
    """Refuse an image whose stored values have no slope and intercept to make units of them."""
    if "ModalityLUTSequence" in header:
        raise ImageError(
            f"{header.filename} gives its units by a table (Modality LUT), which is not read: rescaling by slope and "
            "intercept is needed; convert the series."
        )
    for name in ("RescaleSlope", "RescaleIntercept"):
        given = (element := header.get_item(name)) is not None and element.value not in (None, "", b"")
        found = numbers(header, name)  # of blanks, which ITK takes for 0, there are none
        useless = len(found) != 1 or not np.isfinite(found[0]) or (name == "RescaleSlope" and found[0] == 0)
        if given and useless:
            raise ImageError(
                f"{header.filename} has the {name} {_shown(header, name)}, which gives its voxels no units: a "
                "number, and a slope other than 0, is needed; export the series again."
            )


def _shown(header: Dataset, name: str) -> str:
    """Return the values of an element as a header has them, as far as a message holds them."""
    return "\\".join(values(header, name))[:64] or "without a number"


def _check_place(header: Dataset, name: str, count: int) -> None:
    """Refuse an image that lacks an element, or has one that does not hold as many numbers as it should."""
    if is_missing(header, name):
        raise GeometryError(
            f"{header.filename} has no {name}, so its voxels have no place in millimeters: a complete header is "
            "needed; export the series again."
        )
    found = np.array(numbers(header, name))
    size = name in ("PixelSpacing", "SliceThickness")
    if len(found) != count or not np.isfinite(found).all() or (size and found.min() <= 0):
        what = "1 number is" if count == 1 else f"{count} numbers are"
        raise GeometryError(
            f"{header.filename} has the {name} {_shown(header, name)}, so its voxels have no place in millimeters: "
            f"{what} needed{', greater than 0' * size}; export the series again."
        )


def _result_dtype(array: np.ndarray) -> np.dtype:
    if array.dtype.kind == "f":
        return np.dtype(np.float32)
    return np.dtype(np.int16 if array.min() >= -(2**15) and array.max() < 2**15 else np.int32)


@as_they_are()
def series_files(folder: Path, wanted: str = "", select: Sequence[str] = ()) -> list[str]:
    """Return the files of the one series in a folder, or of one of several, in no order that means anything.

    Args:
        folder: where they lie.
        wanted: SeriesInstanceUID of one.
        select: what their headers must hold, see `read_series`.

    Raises:
        ImageError: if there is no series, or a DICOM file cannot be read as an image.
        SettingError: if ``select`` is of another form, or chooses nothing.
        GeometryError: if there are several series and none is wanted, or the one that is wanted is not there.
    """
    return [str(header.filename) for header in _series_headers(folder, wanted, select)[0]]


def _series_headers(folder: Path, wanted: str, select: Sequence[str]) -> tuple[list[Dataset], tuple[str, ...]]:
    """Return the headers of one volume, and what is to be said of the choice."""
    found = read_folder(folder, [*DIFFERENCES, *(condition.keyword for condition in conditions(select))])
    series = found.series
    if not (series or found.unread):
        others = ", ".join(f"{count} {name}" for name, count in sorted(found.others.items()))
        raise ImageError(
            f"{folder} holds no DICOM series{others and f', but other objects ({others})'}: give a folder with the "
            "slices of one series, or a NIfTI file."
        )
    _check_unread(folder, found.unread)
    if wanted not in series if wanted else len(series) > 1:
        listed = ", ".join(
            f"{uid or 'one without UID'} ({text(headers[0], 'SeriesDescription') or 'no description'}, "
            f"{len(headers)} files)"
            for uid, headers in sorted(series.items())
        )
        which = f"{len(series)} DICOM series{wanted and f' and none is {wanted}'}"
        raise GeometryError(
            f"{folder} holds {which}: {listed}; one is needed: say which (--series UID, or series of"
            " miar_monai.data.io.read_volume), or move each into a folder of its own."
        )
    headers = series[wanted] if wanted else next(iter(series.values()))
    chosen = selected(folder, headers, select)
    return chosen, uncovered(headers, chosen)


def _series_affine(folder: Path, headers: Sequence[Dataset]) -> tuple[np.ndarray, list[int]]:
    """Return the RAS+ affine of slices, and their order along their normal, from where they really lie."""
    frames = [int(max(1, *numbers(header, "NumberOfFrames"), 1)) for header in headers]
    sizes = zip(frames, headers, strict=True)
    _check_sizes(folder, {(count, header.Rows, header.Columns) for count, header in sizes})
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
        origin, step = even_grid(positions[order])
    else:
        origin, step = positions[0], normal * numbers(headers[0], "SliceThickness")[0]
    affine = np.eye(4)
    affine[:3, :2] = axes.T * np.median(spacings, axis=0)[::-1]
    affine[:3, 2] = step
    affine[:3, 3] = origin
    return LPS_TO_RAS @ affine, order.tolist()


def _axes(folder: Path, orientation: np.ndarray) -> np.ndarray:
    """Return the directions along a row and along a column, (2, 3), made perpendicular where they were rounded."""
    axes = in_plane_axes(orientation)
    if np.abs(axes - orientation).max() > _ROUNDED_COSINES:
        raise GeometryError(
            f"{folder}: ImageOrientationPatient is {orientation.ravel().tolist()}, but perpendicular unit vectors are "
            "needed: export the series again."
        )
    return axes


def _check_parallel(folder: Path, headers: Sequence[Dataset], orientations: np.ndarray, spacings: np.ndarray) -> None:
    """Refuse slices that lie unlike most of them, such as a localizer."""
    turned = np.abs(orientations - np.median(orientations, axis=0)).max(axis=1) > 2e-3  # more than they are rounded
    odd = np.flatnonzero(turned | (np.abs(spacings - np.median(spacings, axis=0)).max(axis=1) > 1e-3)).tolist()
    if odd:
        first = min(Path(str(headers[i].filename)).name for i in odd)
        raise GeometryError(
            f"{folder}: {len(odd)} of {len(headers)} slices differ from the others in orientation or voxel size, the "
            f"first is {first}; parallel slices of one voxel size are needed: put each stack into a folder of its "
            "own, and localizers aside."
        )
