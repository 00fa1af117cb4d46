"""Checks of the headers of a DICOM series, before its pixels are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from miar_monai.data.checks import check_num_voxels
from miar_monai.data.dicom_frames import slice_name
from miar_monai.data.dicom_headers import is_missing, is_mosaic, numbers, text, values
from miar_monai.errors import GeometryError, ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["check_headers", "check_sizes"]


def check_headers(folder: Path, headers: Sequence[Dataset]) -> None:
    """Check the elements that ITK would replace by a guess, such as 1 mm for a missing PixelSpacing, or ignore.

    Args:
        folder: of the series.
        headers: of its slices.

    Raises:
        ImageError: if an image is not a single gray-value slice in known units, or the volume is too large.
        GeometryError: if an image has no place in millimeters, or the slices have several frames of reference.
    """
    needed = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    needed |= {"SliceThickness": 1} if len(headers) == 1 else {}  # otherwise it follows from the positions
    for header in headers:
        _check_kind(header)
        _check_units(header)
        for name, count in needed.items():
            _check_place(header, name, count)
    frames = {text(header, "FrameOfReferenceUID") for header in headers}
    if len(frames) > 1:
        raise GeometryError(
            f"{folder}: the slices have {len(frames)} frames of reference, so their positions do not belong together; "
            "slices of one frame are needed: put each stack into its own folder."
        )
    largest = max(headers, key=lambda header: int(header.Rows * header.Columns))
    check_num_voxels(str(largest.filename), [len(headers), largest.Columns, largest.Rows])


def _check_kind(header: Dataset) -> None:
    """Check that an image is a single gray-value slice."""
    file = header.filename
    if is_mosaic(header):
        raise ImageError(
            f"{file} is a mosaic, with the slices of a volume as tiles of one image: a series with one slice per file "
            "is needed; convert the mosaic to NIfTI, for example with dcm2niix."
        )
    kind = text(header, "PhotometricInterpretation")[:64]
    if kind != "MONOCHROME2":  # ITK inverts MONOCHROME1 and loses the units
        found = "inverted gray values" if kind == "MONOCHROME1" else "colors"
        raise ImageError(
            f"{file} contains {found} ({kind}): MONOCHROME2 is needed for correct units; convert the series."
        )


def _check_units(header: Dataset) -> None:
    """Check that stored values can be rescaled to units by a slope and an intercept."""
    if "ModalityLUTSequence" in header:
        raise ImageError(
            f"{header.filename} defines its units by a table (Modality LUT), which is not supported: rescaling by "
            "slope and intercept is needed; convert the series."
        )
    for name in ("RescaleSlope", "RescaleIntercept"):
        given = (element := header.get_item(name)) is not None and element.value not in (None, "", b"")
        found = numbers(header, name)  # ITK reads blanks as 0
        useless = len(found) != 1 or not np.isfinite(found[0]) or (name == "RescaleSlope" and found[0] == 0)
        if given and useless:
            raise ImageError(
                f"{slice_name(header)} has the {name} {_shown(header, name)}, so its voxels have no units: a "
                "number, for the slope other than 0, is needed; export the series again."
            )


def _shown(header: Dataset, name: str) -> str:
    """Return the values of an element for a message, shortened."""
    return "\\".join(values(header, name))[:64] or "without a value"


def _check_place(header: Dataset, name: str, count: int) -> None:
    """Check that an element exists and has the expected number of values."""
    if is_missing(header, name):
        raise GeometryError(
            f"{slice_name(header)} has no {name}, so its voxels have no position in millimeters: a complete header is "
            "needed; export the series again."
        )
    found, where = np.array(numbers(header, name)), slice_name(header)
    size = name in ("PixelSpacing", "SliceThickness")
    if len(found) != count or not np.isfinite(found).all() or (size and found.min() <= 0):
        wanted = "1 number is" if count == 1 else f"{count} numbers are"
        limit = ", greater than 0" if size else ""
        raise GeometryError(
            f"{where} has the {name} {_shown(header, name)}, so its voxels have no position in millimeters: "
            f"{wanted} needed{limit}; export the series again."
        )


def check_sizes(folder: Path, shapes: set[tuple[int, ...]]) -> None:
    """Check that images are single slices of one size.

    Args:
        folder: of the series.
        shapes: of its images, (frames, rows, columns).

    Raises:
        ImageError: if they are not.
    """
    if len(shapes) > 1 or len(shape := min(shapes)) != 3 or shape[0] != 1:
        raise ImageError(
            f"{folder}: the images have the sizes {sorted(shapes)}; gray-value slices of one size, one per file, are "
            "needed: put the slices of one volume into their own folder (multi-frame and color DICOM are not "
            "supported)."
        )
