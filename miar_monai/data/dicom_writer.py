"""Super-resolved volumes out as DICOM: a derived series in the study, and the frame of reference, of its source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from nibabel.affines import voxel_sizes

import miar_monai
from miar_monai.data.atomic_write import whole_folder
from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.dicom_headers import as_they_are, dicom_files, numbers, text, values
from miar_monai.data.dicom_source import repeated
from miar_monai.data.outputs import refuse_to_overwrite
from miar_monai.data.volume import SOFTWARE, Volume
from miar_monai.errors import OutputError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.sr.coding import Code

__all__ = ["check_series_folder", "is_miar_result", "write_series"]


def check_series_folder(folder: str | os.PathLike[str], headers: Sequence[Dataset], overwrite: bool = False) -> None:
    """Refuse a folder that a series must not be written to; worth asking before the work is done.

    Args:
        folder: where the series is to go.
        headers: of `source_headers`.
        overwrite: a folder with nothing but DICOM files may be replaced.

    Raises:
        OutputError: if the folder exists and ``overwrite`` is False, or if it is the source, or holds anything else.
    """
    folder = Path(folder)
    if not overwrite:
        refuse_to_overwrite(folder)
    if folder.resolve() in {Path(header.filename).resolve().parent for header in headers}:
        raise OutputError(f"{folder} is the input, which is never changed: give another output folder.")
    if folder.exists() and not (folder.is_dir() and len(dicom_files(folder)) == len(list(folder.iterdir()))):
        raise OutputError(
            f"{folder} is not a folder with DICOM files and nothing else, so it is not replaced: "
            "move it away, or give another output folder."
        )


@as_they_are()
def write_series(
    folder: str | os.PathLike[str],
    sr: Volume,
    headers: Sequence[Dataset],
    derivation: str,
    overwrite: bool = False,
    quantity: str = "",
) -> Path:
    """Write a super-resolved volume as a DICOM series: whole or not at all, and never over another unless asked to.

    Each slice repeats the header of its source slice (patient, study, equipment, acquisition, frame of reference,
    window) and refers to it. What a derived image must say follows DICOM PS3.3, C.7.6.1 (General Image: image type,
    derivation, source image), C.7.5.2 (Contributing Equipment) and C.7.6.2 (Image Plane). Private elements, overlays,
    curves, icons and signatures are left out.

    Args:
        folder: the folder to write, ``0001.dcm`` and so on in the order of the slices. The folder above it is made if
            needed.
        sr: intensities (HU for CT), (X, Y, Z), on a grid finer along X and Y, with the slices of the source along Z.
        headers: of `source_headers`, Z of them.
        derivation: how ``sr`` was made, for the DerivationDescription.
        overwrite: replace an existing folder that holds nothing but DICOM files.
        quantity: what the voxels are, in a few words, if it is another one than the source's; then the window is that
            of the values, and the series has a number of its own.

    Returns:
        ``folder``.

    Raises:
        OutputError: if the folder must not be replaced (see `check_series_folder`), or cannot be written.
    """
    from pydicom.uid import generate_uid

    folder = Path(folder)
    check_series_folder(folder, headers, overwrite)
    encoding = _encoding(sr, headers[0])
    series, now = generate_uid(), datetime.now()
    with whole_folder(folder, overwrite) as part:
        for k, header in enumerate(headers):
            image = repeated(header)
            _identify(image, series, now, k, sr.array.shape[0] // header.Columns, quantity)
            _explain(image, header, f"{quantity} of {derivation}" if quantity else derivation)
            if quantity:
                _show_all(image, sr.array)
            _place(image, sr, k)
            _fill(image, sr.array[:, :, k], encoding)
            image.save_as(part / f"{k + 1:04d}.dcm")
    return folder


def is_miar_result(header: Dataset) -> bool:
    """Return whether an image with this header was written by `write_series`: its contributing equipment says so."""
    equipment = header.get("ContributingEquipmentSequence") or []
    return any(item.get("ManufacturerModelName") == SOFTWARE for item in equipment)


def _identify(image: Dataset, series: str, now: datetime, k: int, factor: int, quantity: str) -> None:
    """Make an image one of the new series, told apart from its source by number and description."""
    from pydicom.dataset import FileMetaDataset, validate_file_meta
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), series
    image.SeriesNumber = _number_beside(_whole_number(image, "SeriesNumber") or 0, 2000 if quantity else 1000)
    if _whole_number(image, "InstanceNumber") is None:
        image.InstanceNumber = k + 1
    suffix = f" SR {factor}x {quantity}".rstrip()
    image.SeriesDescription = f"{text(image, 'SeriesDescription')[: 64 - len(suffix)]}{suffix}".strip()
    for event in ("InstanceCreation", "Content", "Series"):
        setattr(image, f"{event}Date", now.strftime("%Y%m%d"))
        setattr(image, f"{event}Time", now.strftime("%H%M%S"))
    image.file_meta = FileMetaDataset()
    image.file_meta.FileMetaInformationGroupLength = 0  # counted when it is written
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    validate_file_meta(image.file_meta, enforce_standard=True)  # adds the version and who wrote it


def _whole_number(header: Dataset, name: str) -> int | None:
    """Return the value of an integer string, or None where it is missing or is none that the standard allows."""
    found = numbers(header, name)
    return int(found[0]) if len(found) == 1 and -(2**31) <= found[0] < 2**31 and found[0] % 1 == 0 else None


def _number_beside(number: int, step: int) -> int:
    """Return a number a step above, or below where an integer string holds no more (2^31 - 1).

    Example:
        >>> _number_beside(4, 1000), _number_beside(2**31 - 1, 1000)
        (1004, 2147482647)
    """
    return number + step if number + step < 2**31 else number - step


def _explain(image: Dataset, header: Dataset, derivation: str) -> None:
    """Say that an image is derived, from which, how and by what."""
    from pydicom import Dataset
    from pydicom.sr.codedict import codes

    kind = [*values(header, "ImageType"), "", "", ""]
    plane = "AXIAL" if _is_ct(header) else kind[2] or "OTHER"
    image.ImageType = ["DERIVED", "SECONDARY", plane, *filter(None, kind[3:])]
    # the source's character set may hold no more than ASCII; 1024 characters are what the element holds
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
    equipment.SoftwareVersions = miar_monai.__version__
    image.ContributingEquipmentSequence = [*(header.get("ContributingEquipmentSequence") or []), equipment]


def _show_all(image: Dataset, array: np.ndarray) -> None:
    """Let the window reach from 0 to the greatest value: that of the source is for other values."""
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


def _place(image: Dataset, sr: Volume, k: int) -> None:
    """Place slice ``k`` where the affine says: of a tilted gantry, the shear is in the positions."""
    from pydicom.valuerep import DSfloat

    affine = LPS_TO_RAS @ sr.affine
    columns_apart, rows_apart = voxel_sizes(affine)[:2]
    image.PixelSpacing = [DSfloat(float(mm), auto_format=True) for mm in (rows_apart, columns_apart)]
    position = affine[:3, 3] + k * affine[:3, 2]
    image.ImagePositionPatient = [DSfloat(float(mm), auto_format=True) for mm in position]


class _Encoding(NamedTuple):
    """How intensities become the integers of a file: ``intensity = slope * stored + intercept``."""

    slope: float
    intercept: float
    dtype: np.dtype

    def stored(self, array: np.ndarray) -> np.ndarray:
        limits = np.iinfo(self.dtype)
        steps = np.rint((array.astype(np.float64) - self.intercept) / self.slope)
        return np.clip(steps, limits.min, limits.max).astype(self.dtype)


def _encoding(sr: Volume, header: Dataset) -> _Encoding:
    """Choose 16-bit integers that hold a volume: with slope 1 if it may be rounded, and as the source if possible."""
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
    slope = _as_text_holds_it((high - low) / (2**16 - 1))
    return _Encoding(slope, _as_text_holds_it(low - slope * np.iinfo(own).min), own)


def _as_text_holds_it(number: float) -> float:
    """Return a number as the 16 characters of a decimal string hold it."""
    from pydicom.valuerep import format_number_as_ds

    return float(format_number_as_ds(number))


def _fill(image: Dataset, pixels: np.ndarray, encoding: _Encoding) -> None:
    """Put the pixels (X, Y) of a slice into an image, with all that says how to read them."""
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
