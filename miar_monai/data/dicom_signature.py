"""Detection of DICOM files by their first bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from struct import unpack_from

__all__ = ["is_dicom", "is_dicom_head", "is_dicomdir", "read_head"]

_HEAD_SIZE = 1024
"""Bytes at the start of a file that are searched."""

_DIRECTORY = b"1.2.840.10008.1.3.10"
"""SOP class of a DICOMDIR."""

_UID = re.compile(rb"[0-2](\.(0|[1-9][0-9]*))+\0? *")
_SIGNATURE_ELEMENTS = {  # every image starts with at least one of these; patterns of their values
    0x00020002: _UID,
    0x00020010: _UID,
    0x00080016: _UID,
    0x00080018: _UID,
    0x00080060: re.compile(rb"[A-Z]{2,16} *"),
    0x00080010: re.compile(rb"ACR-NEMA [0-9.]+ *"),
}
_LONG_VRS = tuple(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # with a length field of four bytes
_SHORT_VRS = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: ``DICM`` after a preamble of 128 bytes or, in old archives, valid elements.

    Example:
        >>> is_dicom(Path(__file__))
        False
    """
    return is_dicom_head(read_head(path))


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file, as many as `is_dicom_head` needs."""
    with path.open("rb") as file:
        return file.read(_HEAD_SIZE)


def is_dicom_head(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of a DICOM file."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\2\0", b"\x08\0", b"\0\x08") and _begins_with_elements(head))


def is_dicomdir(path: Path, head: bytes) -> bool:
    """Return whether a DICOM file is a DICOMDIR, by its name or its SOP class."""
    return path.name.upper() == "DICOMDIR" or _DIRECTORY in head


def _begins_with_elements(head: bytes) -> bool:
    """Return whether bytes start with at least three standard elements, one of them a signature of DICOM."""
    from pydicom.datadict import dictionary_has_tag

    last, count, has_signature = -1, 0, False
    for tag, value in _elements(head):
        known = dictionary_has_tag(tag) or not tag & 0xFFFF or tag >> 16 & 1
        if tag <= last or not known:
            break
        last, count = tag, count + 1
        has_signature = has_signature or (
            tag in _SIGNATURE_ELEMENTS and bool(_SIGNATURE_ELEMENTS[tag].fullmatch(value))
        )
    return has_signature and count >= 3


def _elements(head: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tags and values of the elements at the start of a data set, up to the first invalid one."""
    order, offset = "<" if head[0] else ">", 0
    while offset + 12 <= len(head):
        group, element = unpack_from(f"{order}HH", head, offset)
        kind = head[offset + 4 : offset + 6]
        if kind in _LONG_VRS:
            start, length = 12, unpack_from(f"{order}I", head, offset + 8)[0]
        elif kind in _SHORT_VRS:
            start, length = 8, unpack_from(f"{order}H", head, offset + 6)[0]
        else:
            start, length = 8, unpack_from(f"{order}I", head, offset + 4)[0]
        if length % 2 and length != 0xFFFFFFFF:
            return
        yield group << 16 | element, head[offset + start : offset + start + length]
        offset += start + length
