"""Writes super-resolved volumes as DICOM: a derived series in the study and the frame of reference of its source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from nibabel.affines import voxel_sizes

from miar_monai._version import __version__
from miar_monai.data.atomic_write import atomic_folder
from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.dicom_headers import dicom_files, lenient_pydicom, numbers, text, values
from miar_monai.data.dicom_source import repeated
from miar_monai.data.outputs import refuse_to_overwrite
from miar_monai.data.volume import SOFTWARE, Volume
from miar_monai.errors import OutputError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.sr.coding import Code

__all__ = ["check_series_folder", "is_miar_result", "write_series"]


def check_series_folder(folder: str | os.PathLike[str], headers: Sequence[Dataset], overwrite: bool = False) -> None:
    """Check, before the work is done, that a series can be written to a folder.

    Args:
        folder: of the new series.
        headers: from `miar_monai.data.dicom_source.source_headers`.
        overwrite: whether a folder that contains only DICOM files may be replaced.

    Raises:
        OutputError: if the folder exists and ``overwrite`` is False, is the source, or contains other files.
    """
    folder = Path(folder)
    if not overwrite:
        refuse_to_overwrite(folder)
    if folder.resolve() in {Path(header.filename).resolve().parent for header in headers}:
        raise OutputError(f"{folder} is the input, which is never changed: give another output folder.")
    if folder.exists() and not (folder.is_dir() and len(dicom_files(folder)) == len(list(folder.iterdir()))):
        raise OutputError(
            f"{folder} is not a folder of DICOM files only, so it is not replaced: "
            "move it away, or give another output folder."
        )


@lenient_pydicom()
def write_series(
    folder: str | os.PathLike[str],
    sr: Volume,
    headers: Sequence[Dataset],
    derivation: str,
    overwrite: bool = False,
    quantity: str = "",
) -> Path:
    """Write a super-resolved volume as a DICOM series, atomically.

    Each slice repeats the header of its source slice (patient, study, equipment, acquisition, frame of reference,
    window) and refers to it. Derived elements follow DICOM PS3.3, C.7.6.1 (General Image: image type, derivation,
    source image), C.7.5.2 (Contributing Equipment) and C.7.6.2 (Image Plane). Private elements, overlays, curves,
    icons and signatures are omitted.

    Args:
        folder: the folder to write: ``0001.dcm`` and so on, in the order of the slices. Parent folders are created.
        sr: intensities (HU for CT), (X, Y, Z), finer than the source along X and Y, with the same slices along Z.
        headers: Z headers from `miar_monai.data.dicom_source.source_headers`.
        derivation: for the DerivationDescription.
        overwrite: replace an existing folder that contains only DICOM files.
        quantity: short name of the voxel values, if they are not intensities; the window and the number of the series
            are then different from those of an image.

    Returns:
        ``folder``.

    Raises:
        OutputError: if the folder must not be replaced (see `check_series_folder`) or cannot be written.
    """
    from pydicom.uid import generate_uid

    folder = Path(folder)
    check_series_folder(folder, headers, overwrite)
    encoding = _encoding(sr, headers[0])
    series, now = generate_uid(), datetime.now()
    with atomic_folder(folder, overwrite) as part:
        for k, header in enumerate(headers):
            image = repeated(header)
            _assign_identity(image, series, now, k, sr.array.shape[0] // header.Columns, quantity)
            _describe_derivation(image, header, f"{quantity} of {derivation}" if quantity else derivation)
            if quantity:
                _fit_window(image, sr.array)
            _set_geometry(image, sr, k)
            _set_pixels(image, sr.array[:, :, k], encoding)
            image.save_as(part / f"{k + 1:04d}.dcm")
    return folder


def is_miar_result(header: Dataset) -> bool:
    """Return whether an image was written by `write_series`, according to its contributing equipment."""
    equipment = header.get("ContributingEquipmentSequence") or []
    return any(item.get("ManufacturerModelName") == SOFTWARE for item in equipment)


def _assign_identity(image: Dataset, series: str, now: datetime, k: int, factor: int, quantity: str) -> None:
    """Set the UIDs, numbers, dates and description of an image of the new series."""
    from pydicom.dataset import FileMetaDataset, validate_file_meta
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), series
    image.SeriesNumber = _derived_number(_whole_number(image, "SeriesNumber") or 0, 2000 if quantity else 1000)
    if _whole_number(image, "InstanceNumber") is None:
        image.InstanceNumber = k + 1
    suffix = f" SR {factor}x {quantity}".rstrip()
    image.SeriesDescription = f"{text(image, 'SeriesDescription')[: 64 - len(suffix)]}{suffix}".strip()
    for event in ("InstanceCreation", "Content", "Series"):
        setattr(image, f"{event}Date", now.strftime("%Y%m%d"))
        setattr(image, f"{event}Time", now.strftime("%H%M%S"))
    image.file_meta = FileMetaDataset()
    image.file_meta.FileMetaInformationGroupLength = 0  # computed when written
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    validate_file_meta(image.file_meta, enforce_standard=True)  # adds the version and the implementation


def _whole_number(header: Dataset, name: str) -> int | None:
    """Return the value of an integer string, or None if it is missing or invalid."""
    found = numbers(header, name)
    return int(found[0]) if len(found) == 1 and -(2**31) <= found[0] < 2**31 and found[0] % 1 == 0 else None


def _derived_number(number: int, step: int) -> int:
    """Return ``number + step``, or ``number - step`` if that exceeds an integer string (2^31 - 1).

    Example:
        >>> _derived_number(4, 1000), _derived_number(2**31 - 1, 1000)
        (1004, 2147482647)
    """
    return number + step if number + step < 2**31 else number - step


def _describe_derivation(image: Dataset, header: Dataset, derivation: str) -> None:
    """Set image type, derivation, source image and contributing equipment."""
    from pydicom import Dataset
    from pydicom.sr.codedict import codes

    kind = [*values(header, "ImageType"), "", "", ""]
    plane = "AXIAL" if _is_ct(header) else kind[2] or "OTHER"
    image.ImageType = ["DERIVED", "SECONDARY", plane, *filter(None, kind[3:])]
    # ASCII for any character set of the source; the element is limited to 1024 characters
    before = f"{header.get('DerivationDescription') or ''}; ".removeprefix("; ")
    image.DerivationDescription = f"{before}{derivation.encode('ascii', 'replace').decode()}"[-1024:]
    image.DerivationCodeSequence = [_code(codes.DCM.SpatialResampling)]
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    source.PurposeOfReferenceCodeSequence = [_code(codes.DCM.SourceImageForImageProcessingOperation)]
    image.SourceImageSequence = [source]
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code(codes.DCM.ProcessingEquipment)]
    equipment.Manufacturer, equipment.ManufacturerModelName = "MIAR contributors", SOFTWARE
    equipment.SoftwareVersions = __version__
    image.ContributingEquipmentSequence = [*(header.get("ContributingEquipmentSequence") or []), equipment]


def _fit_window(image: Dataset, array: np.ndarray) -> None:
    """Set the window from 0 to the maximum, in place of that of the source."""
    from pydicom.valuerep import DSfloat

    for name in ("VOILUTSequence", "VOILUTFunction", "WindowCenterWidthExplanation"):
        image.pop(name, None)
    high = max(float(array.max()), 1e-6)
    image.WindowCenter, image.WindowWidth = (DSfloat(value, auto_format=True) for value in (high / 2, high))


def _is_ct(header: Dataset) -> bool:
    from pydicom.uid import CTImageStorage

    return bool(header.SOPClassUID == CTImageStorage)


def _code(code: Code) -> Dataset:
    """Return the item of a code sequence."""
    from pydicom import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _set_geometry(image: Dataset, sr: Volume, k: int) -> None:
    """Set spacing and position of slice ``k``; the shear of a tilted gantry is in the positions."""
    from pydicom.valuerep import DSfloat

    affine = LPS_TO_RAS @ sr.affine
    columns_apart, rows_apart = voxel_sizes(affine)[:2]
    image.PixelSpacing = [DSfloat(float(mm), auto_format=True) for mm in (rows_apart, columns_apart)]
    position = affine[:3, 3] + k * affine[:3, 2]
    image.ImagePositionPatient = [DSfloat(float(mm), auto_format=True) for mm in position]


class _Encoding(NamedTuple):
    """Map from stored integers to intensities: ``intensity = slope * stored + intercept``."""

    slope: float
    intercept: float
    dtype: np.dtype

    def stored(self, array: np.ndarray) -> np.ndarray:
        limits = np.iinfo(self.dtype)
        steps = np.rint((array.astype(np.float64) - self.intercept) / self.slope)
        return np.clip(steps, limits.min, limits.max).astype(self.dtype)


def _encoding(sr: Volume, header: Dataset) -> _Encoding:
    """Return an encoding in 16-bit integers: slope 1 if the volume may be rounded, and as in the source if possible."""
    own = np.dtype(np.uint16 if header.PixelRepresentation == 0 else np.int16)
    signed = np.dtype(np.int16)
    low, high = float(sr.array.min()), float(sr.array.max())
    if sr.dtype.kind in "iu":
        low, high = round(low), round(high)
        intercept = float(header.get("RescaleIntercept") or 0)
        for encoding in (
            _Encoding(1.0, float(round(intercept)), own),
            _Encoding(1.0, 0.0, signed),
            _Encoding(1.0, low + 2.0**15, signed),
        ):
            limits = np.iinfo(encoding.dtype)
            if limits.min <= low - encoding.intercept and high - encoding.intercept <= limits.max:
                return encoding
    slope = _round_to_ds((high - low) / (2**16 - 1))
    return _Encoding(slope, _round_to_ds(low - slope * np.iinfo(own).min), own)


def _round_to_ds(number: float) -> float:
    """Return a number rounded to the 16 characters of a decimal string."""
    from pydicom.valuerep import format_number_as_ds

    return float(format_number_as_ds(number))


def _set_pixels(image: Dataset, pixels: np.ndarray, encoding: _Encoding) -> None:
    """Set the pixels (X, Y) of a slice, and the elements that describe them."""
    from pydicom.valuerep import DSfloat

    stored = np.ascontiguousarray(encoding.stored(pixels).T)
    image.Rows, image.Columns = stored.shape
    image.SamplesPerPixel, image.BitsAllocated, image.BitsStored, image.HighBit = 1, 16, 16, 15
    image.PixelRepresentation = int(encoding.dtype.kind == "i")
    image.PixelData = stored.astype(encoding.dtype.newbyteorder("<")).tobytes()
    rescaled = "RescaleSlope" in image or (encoding.slope, encoding.intercept) != (1, 0)
    if _is_ct(image) or rescaled:
        image.RescaleSlope = DSfloat(encoding.slope, auto_format=True)
        image.RescaleIntercept = DSfloat(encoding.intercept, auto_format=True)
        image.RescaleType = image.get("RescaleType") or ("HU" if _is_ct(image) else "US")
