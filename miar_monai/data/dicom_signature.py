"""Detection of DICOM files by their first bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from struct import unpack_from

__all__ = ["is_dicom", "is_dicom_head", "is_directory", "read_head"]

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


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by ``DICM`` after a preamble of 128 bytes or, in old archives, by its elements.

    Example:
        >>> is_dicom(Path(__file__))
        False
    """
    return is_dicom_head(read_head(path))


def read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def is_dicom_head(head: bytes) -> bool:
    return head[128:132] == b"DICM" or (head[:2] in (b"\2\0", b"\x08\0", b"\0\x08") and _begins_with_elements(head))


def is_directory(path: Path, head: bytes) -> bool:
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
