"""Which files are DICOM, which of them are slices, and what their headers say; no pixels are read here."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from struct import unpack_from
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "Folder",
    "as_they_are",
    "dicom_files",
    "holds_slices",
    "is_dicom",
    "is_missing",
    "is_mosaic",
    "numbers",
    "read_folder",
    "read_header",
    "slice_files",
    "text",
    "values",
]

_HEAD = 1024
"""Bytes of a file that tell whether it is DICOM."""

_DIRECTORY = b"1.2.840.10008.1.3.10"
"""SOP class of a DICOMDIR, whatever its name."""

_UID = re.compile(rb"[0-2](\.(0|[1-9][0-9]*))+\0? *")
_TELLING = {  # elements of which one is among the first of every image, and what their values look like
    0x00020002: _UID,
    0x00020010: _UID,
    0x00080016: _UID,
    0x00080018: _UID,
    0x00080060: re.compile(rb"[A-Z]{2,16} *"),
    0x00080010: re.compile(rb"ACR-NEMA [0-9.]+ *"),
}
_LONG = tuple(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # VRs with a length of four bytes
_SHORT = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())

_B_VALUES = {0x0019100C: "SIEMENS", 0x00431039: "GEMS", 0x20011003: "Philips", 0x00651009: "Image Private"}
"""Private elements that hold the b-value of a diffusion image, and how their creators' names begin."""

_MOSAIC_TILES = 0x0019100A
_CREATORS = (0x00190010, 0x00430010, 0x20010010, 0x00650010)
_READ: tuple[str | int, ...] = (
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


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by ``DICM`` after a preamble of 128 bytes or, in old archives, by its elements.

    Example:
        >>> is_dicom(Path(__file__))
        False
    """
    return _is_dicom(_head(path))


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _is_dicom(head: bytes) -> bool:
    return head[128:132] == b"DICM" or (head[:2] in (b"\2\0", b"\x08\0", b"\0\x08") and _begins_with_elements(head))


def _is_directory(path: Path, head: bytes) -> bool:
    """Return whether a DICOM file is a DICOMDIR, by its name or by what it says."""
    return path.name.upper() == "DICOMDIR" or _DIRECTORY in head


def _begins_with_elements(head: bytes) -> bool:
    """Return whether bytes are at least three standard elements, of which one tells that this is DICOM."""
    from pydicom.datadict import dictionary_has_tag

    last, count, telling = -1, 0, False
    for tag, value in _elements(head):
        known = dictionary_has_tag(tag) or not tag & 0xFFFF or tag >> 16 & 1
        if tag <= last or not known:
            break
        last, count = tag, count + 1
        telling = telling or (tag in _TELLING and bool(_TELLING[tag].fullmatch(value)))
    return telling and count >= 3


def _elements(head: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tags and values of the elements at the beginning of a data set, as far as they look like such."""
    order, offset = "<" if head[0] else ">", 0
    while offset + 12 <= len(head):
        group, element = unpack_from(f"{order}HH", head, offset)
        kind = head[offset + 4 : offset + 6]
        if kind in _LONG:
            start, length = 12, unpack_from(f"{order}I", head, offset + 8)[0]
        elif kind in _SHORT:
            start, length = 8, unpack_from(f"{order}H", head, offset + 6)[0]
        else:
            start, length = 8, unpack_from(f"{order}I", head, offset + 4)[0]
        if length % 2 and length != 0xFFFFFFFF:
            return
        yield group << 16 | element, head[offset + start : offset + start + length]
        offset += start + length


def dicom_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the DICOM files that lie directly in a folder, known by their content, whatever their names."""
    return [path for path in sorted(Path(folder).iterdir()) if path.is_file() and is_dicom(path)]


def slice_files(files: Iterable[Path]) -> Iterator[Path]:
    """Yield those of some files that are DICOM images, or are too damaged to tell.

    Directories (DICOMDIR by any name), reports, presentation states, structures, segmentations and the like are none.
    """
    for path in files:
        try:
            head = _head(path) if path.is_file() else b""
            if not _is_dicom(head) or _is_directory(path, head):
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
            head = _head(path) if path.is_file() else b""
            if not _is_dicom(head):
                continue
            if _is_directory(path, head):
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
