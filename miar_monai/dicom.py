"""DICOM series in: slices read with ITK (GDCM), placed where their own positions say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from miar_monai.errors import GeometryError, ImageError

__all__ = [
    "LPS_TO_RAS",
    "MAX_VOXELS",
    "check_num_voxels",
    "dicom_files",
    "dicom_tag",
    "is_dicom",
    "read_series",
    "series_files",
]

MAX_VOXELS = 2**29
"""The most voxels of a volume that is read; its result has sixteen times as many."""

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
"""From the patient axes of DICOM to those of NIfTI, and back."""


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


def dicom_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the DICOM files that lie directly in a folder, known by their content, whatever their names."""
    return [path for path in sorted(Path(folder).iterdir()) if path.is_file() and is_dicom(path)]


def is_dicom(path: Path) -> bool:
    """Return whether a file says that it is DICOM: ``DICM`` after a preamble of 128 bytes."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


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
    return _text(reader, tag)


def _text(reader: Any, tag: str) -> str:
    """Return the text of a tag of the image that ITK read last, or an empty text."""
    tags = reader.GetMetaDataDictionary()
    return str(tags[tag]).strip() if tags.HasKey(tag) else ""


def read_series(folder: Path, series: str = "") -> tuple[np.ndarray, np.ndarray, np.dtype, str]:
    """Read the one series in a folder, or one of several, its slices sorted by position.

    The affine is made of the positions of the slices, so the shear of a tilted gantry is kept.

    Args:
        folder: holds the slices of one series.
        series: SeriesInstanceUID of the one to read, where there are several.

    Returns:
        The rescaled intensities (HU for CT), (X, Y, Z), float32; the affine to millimeters in RAS+, (4, 4), float64;
        the dtype that results in these units are stored in: int16 where it holds them, float32 for fractions; and the
        file of one of the slices.

    Raises:
        ImageError: if there is no series, or an image cannot be read or is not a gray-value slice.
        GeometryError: if there are several series and it is not said which, or slices have no place in millimeters, or
            are missing, duplicate or unevenly spaced.
    """
    import itk

    slices = []
    files = series_files(folder, series)
    _check_headers(folder, files)
    for file in files:
        reader = itk.GDCMImageIO.New(FileName=str(file))
        try:
            reader.ReadImageInformation()
            check_num_voxels(file, [len(files), *(reader.GetDimensions(i) for i in range(2))])
            slices.append(itk.imread(file, imageio=reader))
        except RuntimeError as error:
            raise _unreadable(file, error) from error
    arrays = [itk.array_from_image(image) for image in slices]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][0] != 1:
        raise ImageError(
            f"{folder}: the images have the sizes {shapes}; gray-value slices of one size, one a file, are needed: "
            "put the slices of one volume into a folder of their own (multi-frame and color DICOM are not read)."
        )
    positions = np.array([image.GetOrigin() for image in slices])
    axes = np.array([itk.array_from_matrix(image.GetDirection()) for image in slices])
    spacings = np.array([image.GetSpacing() for image in slices])
    order = np.argsort(positions @ axes[0][:, 2], kind="stable")
    if len(files) == 1:  # ITK calls a single slice 1 mm thick, whatever its header says
        spacings[0, 2] = float(dicom_tag(files[0], "0018|0050"))
    _check_parallel(folder, files, axes, spacings)
    affine = _series_affine(folder, positions[order], axes, spacings)
    array = np.concatenate([arrays[i] for i in order]).transpose(2, 1, 0)
    return np.ascontiguousarray(array, dtype=np.float32), affine, _result_dtype(array), files[0]


def _unreadable(path: str | Path, error: Exception) -> ImageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return ImageError(f"{path} cannot be read ({reason}): a complete DICOM image is needed; copy it again.")


def _check_headers(folder: Path, files: Sequence[str]) -> None:
    """Refuse what ITK would fill with a guess, such as 1 mm for a missing PixelSpacing, or leave out."""
    needed = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"]
    needed += ["SliceThickness"] if len(files) == 1 else []  # otherwise the positions tell
    frames = {_check_header(file, needed) for file in files}
    if len(frames) > 1:
        raise GeometryError(
            f"{folder}: the slices have {len(frames)} frames of reference, so their positions do not belong together; "
            "slices of one are needed: put each stack into a folder of its own."
        )


def _check_header(file: str, needed: Sequence[str]) -> str:
    """Return the frame of reference of a slice, if its voxels are in units and it has the elements that are needed."""
    from pydicom import dcmread

    groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    others = ("PhotometricInterpretation", "ModalityLUTSequence", "FrameOfReferenceUID")
    try:
        header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=[*needed, *groups, *others])
        kind, frame = (str(header.get(name) or "") for name in ("PhotometricInterpretation", "FrameOfReferenceUID"))
        missing = [name for name in needed if not (item := header.get_item(name)) or not item.value]
    except Exception as error:  # whatever a damaged header does to its parser
        raise _unreadable(file, error) from error
    if any(name in header for name in groups):
        raise ImageError(
            f"{file} is an enhanced (multi-frame) image, which is not read: a series with one slice a file is needed; "
            "export it as such, or convert it to NIfTI."
        )
    if kind != "MONOCHROME2":  # ITK turns MONOCHROME1 around, units lost
        found = "inverted gray values" if kind == "MONOCHROME1" else "no gray values"
        raise ImageError(
            f"{file} holds {found} ({kind}), whose units would come out wrong: MONOCHROME2 is needed; convert the "
            "series."
        )
    if "ModalityLUTSequence" in header:
        raise ImageError(
            f"{file} gives its units by a table (Modality LUT), which is not read: rescaling by slope and intercept is "
            "needed; convert the series."
        )
    if missing:
        raise GeometryError(
            f"{file} has no {missing[0]}, so its voxels have no place in millimeters: a complete header is needed; "
            "export the series again."
        )
    return frame


def _result_dtype(array: np.ndarray) -> np.dtype:
    if array.dtype.kind == "f":
        return np.dtype(np.float32)
    return np.dtype(np.int16 if array.min() >= -(2**15) and array.max() < 2**15 else np.int32)


def series_files(folder: Path, wanted: str = "") -> Sequence[str]:
    """Return the files of the one series in a folder, or of one of several, in no order that means anything.

    Args:
        folder: where they lie.
        wanted: SeriesInstanceUID of one.

    Raises:
        ImageError: if there is no series, or a DICOM file cannot be read as an image.
        GeometryError: if there are several series and none is wanted, or the one that is wanted is not there.
    """
    import itk

    try:
        names = itk.GDCMSeriesFileNames.New(UseSeriesDetails=False, Directory=str(folder))
    except RuntimeError as error:  # one damaged file is enough
        raise _unreadable(f"a file in {folder}", error) from error
    series = {uid: list(names.GetFileNames(uid)) for uid in names.GetSeriesUIDs()}
    if not series:
        raise ImageError(
            f"{folder} holds no DICOM series: give a folder with the slices of one series, or a NIfTI file."
        )
    if wanted not in series if wanted else len(series) > 1:
        found = ", ".join(
            f"{uid} ({dicom_tag(files[0], '0008|103e') or 'no description'}, {len(files)} files)"
            for uid, files in sorted(series.items())
        )
        which = f"{len(series)} DICOM series{wanted and f' and none is {wanted}'}"
        raise GeometryError(
            f"{folder} holds {which}: {found}; one is needed: say which (--series UID, or series of"
            " miar_monai.io.read_volume), or move each into a folder of its own."
        )
    files = series[wanted] if wanted else next(iter(series.values()))
    known = {Path(file).name for some in series.values() for file in some}
    unread = sorted({path.name for path in dicom_files(folder)} - known - {"DICOMDIR"})
    if unread:
        raise ImageError(
            f"{folder}: {len(unread)} DICOM files cannot be read as images, the first is {unread[0]}; "
            "complete slices are needed: copy them again, or move what is not a slice out of the folder."
        )
    return files


def _check_parallel(folder: Path, files: Sequence[str], axes: np.ndarray, spacings: np.ndarray) -> None:
    """Refuse slices that lie unlike most of them, such as a localizer."""
    grids = np.concatenate([axes.reshape(len(files), -1), spacings[:, :2]], axis=1)
    odd = np.flatnonzero(np.abs(grids - np.median(grids, axis=0)).max(axis=1) > 1e-3)
    if len(odd):
        names = sorted(Path(file).name for i, file in enumerate(files) if i in odd)
        raise GeometryError(
            f"{folder}: {len(odd)} of {len(files)} slices differ from the others in orientation or voxel size, the "
            f"first is {names[0]}; parallel slices of one voxel size are needed: put each stack into a folder of its "
            "own, and localizers aside."
        )


def _series_affine(folder: Path, positions: np.ndarray, axes: np.ndarray, spacings: np.ndarray) -> np.ndarray:
    """Return the RAS+ affine of slices sorted along their normal, from where they really lie (LPS, millimeters)."""
    if len(positions) > 1:
        _check_gaps(folder, positions)
        step = (positions[-1] - positions[0]) / (len(positions) - 1)
    else:
        step = axes[0][:, 2] * spacings[0, 2]
    affine = np.eye(4)
    affine[:3, :2] = axes[0][:, :2] * spacings[0, :2]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return LPS_TO_RAS @ affine


def _check_gaps(folder: Path, positions: np.ndarray) -> None:
    """Refuse slices that are not evenly spaced on a straight line; 5 % of the spacing is left for rounded headers."""
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    spacing = np.median(gaps)
    uneven = np.flatnonzero(np.abs(gaps - spacing) > 0.05 * spacing)
    duplicates = np.count_nonzero(gaps < 1e-3)
    if duplicates:
        found = f"{duplicates} slices lie at the position of another one"
    elif len(uneven) and gaps[uneven].max() > 1.5 * spacing:
        missing = int(np.rint(gaps[uneven] / spacing - 1).clip(0).sum())
        a, b = positions[np.argmax(gaps) : np.argmax(gaps) + 2].round(2).tolist()
        found = f"{missing} slices are missing, the widest gap is {gaps.max():.2f} mm between {a} and {b}"
    elif len(uneven):
        found = f"the slices are {gaps.min():.3f} to {gaps.max():.3f} mm apart"
    else:
        return
    raise GeometryError(
        f"{folder}: {found} ({len(positions)} slices, usually {spacing:.3f} mm apart); "
        "a complete series of evenly spaced slices is needed: export the series again."
    )
