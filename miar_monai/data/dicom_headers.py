"""Headers of DICOM files; pixels are not read."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from miar_monai.data.dicom_frames import FUNCTIONAL_GROUPS, frame_headers, is_enhanced
from miar_monai.data.dicom_signature import is_dicom, is_dicom_head, is_dicomdir, read_head
from miar_monai.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "DicomFolder",
    "add_b_value",
    "dicom_files",
    "header_text",
    "holds_slices",
    "is_enhanced_file",
    "is_missing",
    "is_mosaic",
    "lenient_pydicom",
    "numbers",
    "read_dicom_folder",
    "read_header",
    "slice_files",
    "text",
    "values",
]

_B_VALUES = {0x0019100C: "SIEMENS", 0x00431039: "GEMS", 0x20011003: "Philips", 0x00651009: "Image Private"}
"""Private elements with the b-value of a diffusion image, and the prefixes of their private creators."""

_MOSAIC_TILES = 0x0019100A
_CREATORS = (0x00190010, 0x00430010, 0x20010010, 0x00650010)
_READ: tuple[str | int, ...] = (
    *("Modality", "DerivationDescription"),
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "FrameOfReferenceUID"),
    *("Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "ModalityLUTSequence", "RescaleSlope"),
    *("RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *(*FUNCTIONAL_GROUPS, "ImageType", "InstanceNumber"),
    *("AcquisitionMatrix", "InPlanePhaseEncodingDirection", "ReconstructionDiameter"),
    *(_MOSAIC_TILES, *_CREATORS, *_B_VALUES),
)


@contextmanager
def lenient_pydicom() -> Iterator[None]:
    """Disable pydicom's validation and warnings: invalid values are checked, and reported, by this package.

    Example:
        >>> from pydicom import Dataset
        >>> header = Dataset()
        >>> with lenient_pydicom():
        ...     header.ImageType = "in lower case"
    """
    from pydicom.config import disable_value_validation

    logger = logging.getLogger("pydicom")
    before = logger.disabled
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = before


def dicom_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the DICOM files in a folder, not in its subfolders, recognized by their content."""
    return [path for path in sorted(Path(folder).iterdir()) if path.is_file() and is_dicom(path)]


def slice_files(files: Iterable[Path]) -> Iterator[Path]:
    """Yield the files that are DICOM images, or too damaged to tell.

    Skips DICOMDIR files and other objects, such as reports, presentation states and segmentations.
    """
    for path in files:
        try:
            head = read_head(path) if path.is_file() else b""
            if not is_dicom_head(head) or is_dicomdir(path, head):
                continue
            with lenient_pydicom():
                other = _non_image_kind(read_header(path, ("SOPClassUID", "Rows")))
        except Exception:  # parsers of damaged headers raise anything; reading reports it
            other = ""
        if not other:
            yield path


def holds_slices(files: Iterable[Path]) -> bool:
    """Return whether any of the files is a DICOM image; stops at the first, as there may be millions."""
    return next(slice_files(files), None) is not None


def read_header(path: str | os.PathLike[str], names: Sequence[str | int] | None = None) -> Dataset:
    """Read the header of a DICOM file, with or without preamble: all elements, or those in ``names``."""
    from pydicom import dcmread
    from pydicom.tag import Tag

    tags = None if names is None else [Tag(name) for name in names]
    header: Dataset = dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)
    header.filename = os.fspath(path)  # pydicom 2 changes it for deflated files
    return header


@lenient_pydicom()
def header_text(path: str | os.PathLike[str], keyword: str) -> str:
    """Return the text of one element of a DICOM file, or an empty text if the element or a DICOM header is missing.

    Args:
        path: a DICOM file.
        keyword: of the element, such as ``"PatientID"``.
    """
    try:
        return text(read_header(path, [keyword]), keyword)
    except Exception:  # parsers of damaged headers raise anything
        return ""


@lenient_pydicom()
def is_enhanced_file(path: Path) -> bool:
    """Return whether a file is an enhanced (multi-frame) DICOM image, which can be a series by itself."""
    try:
        return is_dicom(path) and is_enhanced(read_header(path, FUNCTIONAL_GROUPS))
    except Exception:  # parsers of damaged headers raise anything; reading reports it
        return False


def _non_image_kind(header: Dataset) -> str:
    """Return the kind of a DICOM object, such as ``"RT Structure Set Storage"``; empty for an image."""
    from pydicom.uid import UID, UID_dictionary

    uid = UID(text(header, "SOPClassUID") or str(header.file_meta.get("MediaStorageSOPClassUID") or ""))
    if not uid or (uid in UID_dictionary and "Image Storage" in uid.name):
        return ""
    return "" if uid not in UID_dictionary and header.get_item("Rows") else uid.name


class DicomFolder(NamedTuple):
    """The DICOM files of a folder.

    Attributes:
        series: headers of the slices by SeriesInstanceUID, which is empty where it is missing; of enhanced images, one
            for each frame.
        others: number of other DICOM objects by kind.
        unreadable: names of damaged files.
    """

    series: dict[str, list[Dataset]]
    others: Counter[str]
    unreadable: list[str]


def read_dicom_folder(folder: Path, keywords: Sequence[str] = ()) -> DicomFolder:
    """Read the headers of the DICOM files in a folder, not in its subfolders.

    Args:
        folder: of the files, or one file.
        keywords: elements to read in addition to those needed for a volume.

    Raises:
        ImageError: if the number of frames of an enhanced image is not that of their functional groups.
    """
    found = DicomFolder(defaultdict(list), Counter(), [])
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        try:
            head = read_head(path) if path.is_file() else b""
            if not is_dicom_head(head):
                continue
            if is_dicomdir(path, head):
                found.others["DICOMDIR"] += 1
                continue
            header = read_header(path, [*_READ, *keywords])
            if other := _non_image_kind(header):
                found.others[other] += 1
            elif not all(isinstance(size, int) and size > 0 for size in (header.get("Rows"), header.get("Columns"))):
                found.unreadable.append(path.name)
            else:
                slices = frame_headers(header) if is_enhanced(header) else [header]
                for one in slices:
                    add_b_value(one)
                found.series[text(header, "SeriesInstanceUID")] += slices
        except ImageError:
            raise
        except Exception:  # no permission, or a damaged header
            found.unreadable.append(path.name)
    return found


def values(header: Dataset, keyword: str | int) -> list[str]:
    """Return the values of an element as strings without control characters, for any multiplicity.

    Example:
        >>> from pydicom import Dataset
        >>> header = Dataset()
        >>> header.ImageType = "DERIVED"
        >>> values(header, "ImageType"), values(header, "Modality")
        (['DERIVED'], [])
    """
    from pydicom.dataelem import DataElement
    from pydicom.multival import MultiValue

    try:
        value = header.get(keyword)
        value = value.value if isinstance(value, DataElement) else value  # pydicom returns the element for a tag
    except Exception:  # parsers of damaged elements raise anything
        return []
    if value is None or value == "":
        return []
    items = map(str, value if isinstance(value, (MultiValue, list, tuple)) else [value])
    return ["".join(letter if letter.isprintable() else "?" for letter in item) for item in items]


def is_missing(header: Dataset, keyword: str) -> bool:
    """Return whether an element is missing or empty."""
    value = None if (element := header.get_item(keyword)) is None else element.value
    if isinstance(value, bytes):  # not parsed yet
        value = value.strip(b" \0")
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def text(header: Dataset, keyword: str | int) -> str:
    """Return the values of an element, separated by spaces; empty if it is missing."""
    return " ".join(values(header, keyword)).strip()


def numbers(header: Dataset, keyword: str | int) -> list[float]:
    """Return the values of an element as numbers; empty if it is missing or a value is not a number."""
    try:
        return [float(value) for value in values(header, keyword)]
    except ValueError:
        return []


def add_b_value(header: Dataset) -> None:
    """Copy the b-value of a diffusion image from a private element to the standard one, if that is missing."""
    if "DiffusionBValue" in header:
        return
    for tag, maker in _B_VALUES.items():
        creator = text(header, tag & 0xFFFF0000 | 0x10)
        if creator.lower().startswith(maker.lower()) and (found := numbers(header, tag)):
            header.DiffusionBValue = found[0] % 1e9  # GE adds a code above 1e9


def is_mosaic(header: Dataset) -> bool:
    """Return whether an image is a Siemens mosaic, with the slices of a volume as tiles."""
    tiles = numbers(header, _MOSAIC_TILES) if text(header, 0x00190010).upper().startswith("SIEMENS") else []
    return "MOSAIC" in text(header, "ImageType").upper() or max(tiles, default=0) > 1
