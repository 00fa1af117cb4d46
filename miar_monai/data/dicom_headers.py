"""Which files are DICOM, which of them are slices, and what their headers say; no pixels are read here."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from miar_monai.data.dicom_signature import is_dicom, is_dicom_head, is_directory, read_head

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "Folder",
    "as_they_are",
    "dicom_files",
    "header_text",
    "holds_slices",
    "is_missing",
    "is_mosaic",
    "numbers",
    "read_folder",
    "read_header",
    "slice_files",
    "text",
    "values",
]

_B_VALUES = {0x0019100C: "SIEMENS", 0x00431039: "GEMS", 0x20011003: "Philips", 0x00651009: "Image Private"}
"""Private elements that hold the b-value of a diffusion image, and how their creators' names begin."""

_MOSAIC_TILES = 0x0019100A
_CREATORS = (0x00190010, 0x00430010, 0x20010010, 0x00650010)
_READ: tuple[str | int, ...] = (
    *("Modality", "DerivationDescription"),
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "FrameOfReferenceUID"),
    *("Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "ModalityLUTSequence", "RescaleSlope"),
    *("RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ImageType", "InstanceNumber"),
    *(_MOSAIC_TILES, *_CREATORS, *_B_VALUES),
)


@contextmanager
def as_they_are() -> Iterator[None]:
    """Let pydicom take values that the standard does not allow without a word: whether they can be used is said here.

    Example:
        >>> from pydicom import Dataset
        >>> header = Dataset()
        >>> with as_they_are():
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
    """Return the DICOM files that lie directly in a folder, known by their content, whatever their names."""
    return [path for path in sorted(Path(folder).iterdir()) if path.is_file() and is_dicom(path)]


def slice_files(files: Iterable[Path]) -> Iterator[Path]:
    """Yield those of some files that are DICOM images, or are too damaged to tell.

    Directories (DICOMDIR by any name), reports, presentation states, structures, segmentations and the like are none.
    """
    for path in files:
        try:
            head = read_head(path) if path.is_file() else b""
            if not is_dicom_head(head) or is_directory(path, head):
                continue
            with as_they_are():
                other = _other_object(read_header(path, ("SOPClassUID", "Rows")))
        except Exception:  # no permission, or whatever a damaged header does to its parser; reading says what is wrong
            other = ""
        if not other:
            yield path


def holds_slices(files: Iterable[Path]) -> bool:
    """Return whether there is a DICOM image among files; the first is enough, and there may be millions."""
    return next(slice_files(files), None) is not None


def read_header(path: str | os.PathLike[str], names: Sequence[str | int] | None = None) -> Dataset:
    """Read the header of a DICOM file, with or without preamble; of its elements, all or those that are named."""
    from pydicom import dcmread
    from pydicom.tag import Tag

    tags = None if names is None else [Tag(name) for name in names]
    header: Dataset = dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)
    header.filename = os.fspath(path)  # pydicom 2 has another one for files that are deflated
    return header


@as_they_are()
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


def _other_object(header: Dataset) -> str:
    """Return what a DICOM object is that is no image, such as ``"RT Structure Set Storage"``; empty for an image."""
    from pydicom.uid import UID, UID_dictionary

    uid = UID(text(header, "SOPClassUID") or str(header.file_meta.get("MediaStorageSOPClassUID") or ""))
    if not uid or (uid in UID_dictionary and "Image Storage" in uid.name):
        return ""
    return "" if uid not in UID_dictionary and header.get_item("Rows") else uid.name


class Folder(NamedTuple):
    """The DICOM files of a folder.

    Attributes:
        series: headers of the slices by SeriesInstanceUID, empty where they have none.
        others: what else there is, by kind and count.
        unread: names of files that are neither.
    """

    series: dict[str, list[Dataset]]
    others: Counter[str]
    unread: list[str]


def read_folder(folder: Path, keywords: Sequence[str] = ()) -> Folder:
    """Read the headers of the DICOM files that lie directly in a folder, each once.

    Args:
        folder: where they lie.
        keywords: elements that are read beside those that a volume is made of.
    """
    found = Folder(defaultdict(list), Counter(), [])
    for path in sorted(folder.iterdir()):
        try:
            head = read_head(path) if path.is_file() else b""
            if not is_dicom_head(head):
                continue
            if is_directory(path, head):
                found.others["DICOMDIR"] += 1
                continue
            header = read_header(path, [*_READ, *keywords])
            if other := _other_object(header):
                found.others[other] += 1
            elif not all(isinstance(size, int) and size > 0 for size in (header.get("Rows"), header.get("Columns"))):
                found.unread.append(path.name)
            else:
                _add_b_value(header)
                found.series[text(header, "SeriesInstanceUID")].append(header)
        except Exception:  # no permission, or whatever a damaged header does to its parser
            found.unread.append(path.name)
    return found


def values(header: Dataset, keyword: str | int) -> list[str]:
    """Return the values of an element as texts of one line: none, one or several, however many it should have.

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
        value = value.value if isinstance(value, DataElement) else value  # of a tag, pydicom gives the element
    except Exception:  # whatever a damaged element does to its parser
        return []
    if value is None or value == "":
        return []
    items = map(str, value if isinstance(value, (MultiValue, list, tuple)) else [value])
    return ["".join(letter if letter.isprintable() else "?" for letter in item) for item in items]


def is_missing(header: Dataset, keyword: str) -> bool:
    """Return whether a header lacks an element, or has it without a value."""
    value = None if (element := header.get_item(keyword)) is None else element.value
    if isinstance(value, bytes):  # not parsed yet
        value = value.strip(b" \0")
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def text(header: Dataset, keyword: str | int) -> str:
    """Return the text of an element, its values parted by spaces; empty where it is missing."""
    return " ".join(values(header, keyword)).strip()


def numbers(header: Dataset, keyword: str | int) -> list[float]:
    """Return the numbers of an element; none where it is missing, or has values that are no numbers."""
    try:
        return [float(value) for value in values(header, keyword)]
    except ValueError:
        return []


def _add_b_value(header: Dataset) -> None:
    """Let an image whose b-value is in a manufacturer's element have it in the standard's."""
    if "DiffusionBValue" in header:
        return
    for tag, maker in _B_VALUES.items():
        creator = text(header, tag & 0xFFFF0000 | 0x10)
        if creator.lower().startswith(maker.lower()) and (found := numbers(header, tag)):
            header.DiffusionBValue = found[0] % 1e9  # to which GE adds a code


def is_mosaic(header: Dataset) -> bool:
    """Return whether an image holds the slices of a volume as tiles, as those of Siemens may."""
    tiles = numbers(header, _MOSAIC_TILES) if text(header, 0x00190010).upper().startswith("SIEMENS") else []
    return "MOSAIC" in text(header, "ImageType").upper() or max(tiles, default=0) > 1
