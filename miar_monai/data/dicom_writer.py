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
from miar_monai.data.dicom_frames import FRAME_NUMBER
from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.dicom_headers import dicom_files, lenient_pydicom, numbers, text, values
from miar_monai.data.dicom_slices import DerivedSlice, derived_slices, whole_number
from miar_monai.data.dicom_source import Guide, repeated
from miar_monai.data.geometry import plane_distance
from miar_monai.data.grid import Grid
from miar_monai.data.outputs import refuse_to_overwrite
from miar_monai.data.volume import SOFTWARE, Volume
from miar_monai.errors import OutputError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.sr.coding import Code
    from pydicom.valuerep import DSfloat

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
    guide: Guide | None = None,
) -> Path:
    """Write a super-resolved volume as a DICOM series, atomically.

    The slices lie in the planes of the source, whichever axes became finer, and may be more or fewer. Each one repeats
    the header of the nearest source slice (patient, study, equipment, acquisition, frame of reference, window) and
    refers to the source slice at its position, or to the two that it lies between. Derived elements follow DICOM PS3.3,
    C.7.6.1 (General Image: image type, derivation, source image), C.7.5.2 (Contributing Equipment) and C.7.6.2 (Image
    Plane); the thickness of new slices is their distance. Private elements, overlays, curves, icons and signatures are
    omitted. A frame of an enhanced source counts as a slice, and its image is a classic one (see
    `miar_monai.data.dicom_classic.classic_header`).

    Args:
        folder: the folder to write: ``0001.dcm`` and so on, in the order of the slices. Parent folders are created.
        sr: intensities (HU for CT), (X, Y, Z), on the voxel axes of the source: X along its rows, Y along its
            columns, Z across its slices. Any numbers of voxels and spacings are possible.
        headers: of the source, from `miar_monai.data.dicom_source.source_headers`.
        derivation: for the DerivationDescription.
        overwrite: replace an existing folder that contains only DICOM files.
        quantity: short name of the voxel values, if they are not intensities; the window and the number of the series
            are then different from those of an image.
        guide: the guide that the result was made with; each slice refers to those of its slices that overlap it.

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
        for k, derived in enumerate(derived_slices(sr.grid, headers)):
            image = repeated(headers[derived.nearest])
            suffix = _suffix(_change(sr, headers[derived.nearest], derived), quantity, sr.select)
            _assign_identity(image, series, now, derived.number, suffix, quantity)
            _describe_derivation(image, f"{quantity} of {derivation}" if quantity else derivation)
            _refer(image, [headers[i] for i in derived.sources], guide.slices_at(_slice(sr.grid, k)) if guide else [])
            if quantity:
                _fit_window(image, sr.array)
            _set_geometry(image, sr, k, derived)
            _set_pixels(image, sr.array[:, :, k], encoding)
            image.save_as(part / f"{k + 1:04d}.dcm")
    return folder


def is_miar_result(header: Dataset) -> bool:
    """Return whether an image was written by `write_series`, according to its contributing equipment."""
    equipment = header.get("ContributingEquipmentSequence") or []
    return any(item.get("ManufacturerModelName") == SOFTWARE for item in equipment)


def _change(sr: Volume, header: Dataset, derived: DerivedSlice) -> str:
    """Return what became finer for the description of the series, such as ``SR 4x`` or ``SR 0.5x0.5x1 mm``."""
    factors = {sr.array.shape[0] / header.Columns, sr.array.shape[1] / header.Rows}
    if not derived.is_new and len(factors) == 1 and (factor := factors.pop()) % 1 == 0:
        return f"SR {factor:.0f}x"
    return f"SR {'x'.join(f'{mm:.3g}' for mm in sr.grid.spacing)} mm"


def _suffix(change: str, quantity: str, select: Sequence[str]) -> str:
    r"""Return the end of the description of a series, which tells volumes of one series apart.

    Example:
        >>> _suffix("SR 4x", "", [r"DiffusionGradientOrientation=0\0.6\0.8"])
        'SR 4x DiffusionGradientOrientation=0,0.6,0.8'
    """
    # a backslash separates values, and the source may have any character set
    words = " ".join(filter(None, (change, quantity, *select))).replace("\\", ",")
    return words.encode("ascii", "replace").decode()[:63]


def _assign_identity(image: Dataset, series: str, now: datetime, number: int, suffix: str, quantity: str) -> None:
    """Set the UIDs, numbers, dates and description of an image of the new series."""
    from pydicom.dataset import FileMetaDataset, validate_file_meta
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), series
    image.SeriesNumber = _derived_number(whole_number(image, "SeriesNumber") or 0, 2000 if quantity else 1000)
    image.InstanceNumber = number
    image.SeriesDescription = f"{text(image, 'SeriesDescription')[: 63 - len(suffix)]} {suffix}".strip()
    for event in ("InstanceCreation", "Content", "Series"):
        setattr(image, f"{event}Date", now.strftime("%Y%m%d"))
        setattr(image, f"{event}Time", now.strftime("%H%M%S"))
    image.file_meta = FileMetaDataset()
    image.file_meta.FileMetaInformationGroupLength = 0  # computed when written
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    validate_file_meta(image.file_meta, enforce_standard=True)  # adds the version and the implementation


def _derived_number(number: int, step: int) -> int:
    """Return ``number + step``, or ``number - step`` if that exceeds an integer string (2^31 - 1).

    Example:
        >>> _derived_number(4, 1000), _derived_number(2**31 - 1, 1000)
        (1004, 2147482647)
    """
    return number + step if number + step < 2**31 else number - step


def _describe_derivation(image: Dataset, derivation: str) -> None:
    """Set image type, derivation and contributing equipment."""
    from pydicom import Dataset
    from pydicom.sr.codedict import codes

    kind = [*values(image, "ImageType"), "", "", ""]
    plane = "AXIAL" if _is_ct(image) else kind[2] or "OTHER"
    image.ImageType = ["DERIVED", "SECONDARY", plane, *filter(None, kind[3:])]
    # ASCII for any character set of the source; the element is limited to 1024 characters
    before = f"{image.get('DerivationDescription') or ''}; ".removeprefix("; ")
    image.DerivationDescription = f"{before}{derivation.encode('ascii', 'replace').decode()}"[-1024:]
    image.DerivationCodeSequence = [_code(codes.DCM.SpatialResampling)]
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code(codes.DCM.ProcessingEquipment)]
    equipment.Manufacturer, equipment.ManufacturerModelName = "MIAR contributors", SOFTWARE
    equipment.SoftwareVersions = __version__
    image.ContributingEquipmentSequence = [*(image.get("ContributingEquipmentSequence") or []), equipment]


def _slice(grid: Grid, k: int) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] += k * affine[:3, 2]
    return Grid((*grid.shape[:2], 1), affine)


def _refer(image: Dataset, sources: Sequence[Dataset], guides: Sequence[Dataset]) -> None:
    """Refer to the source images, and to those of the guide, which the standard does not distinguish from them."""
    from pydicom import Dataset
    from pydicom.sr.codedict import codes

    items = []
    for header in (*sources, *guides):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        if FRAME_NUMBER in header:
            item.ReferencedFrameNumber = header[FRAME_NUMBER].value
        item.PurposeOfReferenceCodeSequence = [_code(codes.DCM.SourceImageForImageProcessingOperation)]
        items.append(item)
    image.SourceImageSequence = items


def _fit_window(image: Dataset, array: np.ndarray) -> None:
    """Set the window from 0 to the maximum, in place of that of the source."""
    for name in ("VOILUTSequence", "VOILUTFunction", "WindowCenterWidthExplanation"):
        image.pop(name, None)
    high = max(float(array.max()), 1e-6)
    image.WindowCenter, image.WindowWidth = _decimals(high / 2, high)


def _is_ct(header: Dataset) -> bool:
    from pydicom.uid import CTImageStorage

    return bool(header.SOPClassUID == CTImageStorage)


def _code(code: Code) -> Dataset:
    """Return the item of a code sequence."""
    from pydicom import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _set_geometry(image: Dataset, sr: Volume, k: int, derived: DerivedSlice) -> None:
    """Set spacing, position and orientation of slice ``k``; the shear of a tilted gantry is in the positions."""
    affine = LPS_TO_RAS @ sr.affine
    columns_apart, rows_apart, _ = voxel_sizes(affine)
    axes = (affine[:3, :2] / voxel_sizes(affine)[:2]).T + 0.0  # no negative zeros
    image.PixelSpacing = _decimals(rows_apart, columns_apart)
    image.ImageOrientationPatient = _decimals(*axes.ravel())
    image.ImagePositionPatient = _decimals(*(affine[:3, 3] + k * affine[:3, 2]))
    if not derived.is_new:
        return
    before, apart = numbers(image, "SliceThickness"), plane_distance(affine, 2)
    stated = f"{before[0]:.4g} mm" if len(before) == 1 else "unknown"
    sentence = f"SliceThickness: {apart:.4g} mm after super-resolution, {stated} in the source."
    image.DerivationDescription = f"{image.DerivationDescription} {sentence}"[-1024:]
    image.SliceThickness, image.SpacingBetweenSlices = _decimals(apart, apart)
    for name in ("SliceLocation", "ImagesInAcquisition"):
        image.pop(name, None)
    if derived.location is not None:
        (image.SliceLocation,) = _decimals(derived.location)


def _decimals(*values: float) -> list[DSfloat]:
    """Return numbers as decimal strings, rounded to their 16 characters."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(float(value), auto_format=True) for value in values]


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
    stored = np.ascontiguousarray(encoding.stored(pixels).T)
    image.Rows, image.Columns = stored.shape
    image.SamplesPerPixel, image.BitsAllocated, image.BitsStored, image.HighBit = 1, 16, 16, 15
    image.PixelRepresentation = int(encoding.dtype.kind == "i")
    image.PixelData = stored.astype(encoding.dtype.newbyteorder("<")).tobytes()
    rescaled = "RescaleSlope" in image or (encoding.slope, encoding.intercept) != (1, 0)
    if _is_ct(image) or rescaled:
        image.RescaleSlope, image.RescaleIntercept = _decimals(encoding.slope, encoding.intercept)
        image.RescaleType = image.get("RescaleType") or ("HU" if _is_ct(image) else "US")
