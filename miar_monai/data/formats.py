"""Formats of files: expected by their names, and detected by their content."""

from __future__ import annotations

import bz2
import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path

from miar_monai.errors import SettingError

__all__ = [
    "OUTPUT_SUFFIXES",
    "SUFFIXES",
    "UNSUPPORTED_SUFFIXES",
    "case_stem",
    "check_output_suffix",
    "decompressed_size",
    "detect_format",
    "expected_format",
    "header_file",
    "is_nifti",
    "is_volume_file",
    "is_zip_name",
    "open_decompressed",
    "volume_stem",
]

SUFFIXES = {
    "NIfTI": (".nii.gz", ".nii.bz2", ".nii", ".hdr.gz", ".hdr", ".img.gz", ".img"),
    "MGH": (".mgz", ".mgh.gz", ".mgh"),
    "NRRD": (".nrrd", ".nhdr"),
    "MetaImage": (".mha", ".mhd"),
}
"""Suffixes of the names of volumes by format; the format itself is detected by content."""

OUTPUT_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh", ".nrrd", ".mha")
"""Suffixes of the names of volumes that can be written, each in one file."""

UNSUPPORTED_SUFFIXES = (".nii.zst", ".nii.xz", ".mnc.gz", ".mnc")
"""Suffixes of volumes in formats that are not supported."""

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_MAX_SURPLUS = 2**28  # bytes after the voxels of a compressed file; more indicates a zip bomb
_ALL_SUFFIXES = tuple(suffix for suffixes in (*SUFFIXES.values(), UNSUPPORTED_SUFFIXES) for suffix in suffixes)
_COMPRESSIONS: tuple[tuple[bytes, Callable[..., gzip.GzipFile | bz2.BZ2File]], ...] = (
    (b"\x1f\x8b", gzip.GzipFile),
    (b"BZh", bz2.BZ2File),
)
_SIGNATURES = {
    b"NRRD0": "NRRD",
    b"CDF": "MINC",
    b"\x89HDF": "MINC",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ\x00": "xz",
    b"/annex/objects/": "pointer",
    b"version https://git-lfs": "pointer",
}


def is_nifti(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has the name of a NIfTI file and is not hidden, as the shadow files of macOS are.

    Example:
        >>> is_nifti("case_t2.nii.gz"), is_nifti("case.dcm"), is_nifti("._case_t2.nii.gz")
        (True, False, False)
    """
    name = Path(path).name.lower()
    return name.endswith((".nii", ".nii.gz")) and not name.startswith(".")


def is_volume_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has the name of a volume, in a supported or unsupported format, and is not hidden.

    A pair of .hdr and .img counts once, by its header if that exists.

    Example:
        >>> [is_volume_file(name) for name in ("a.nii.gz", "a.MGZ", "a.nrrd", "a.mnc", "a.txt", "._a.nii")]
        [True, True, True, True, False, False]
    """
    path = Path(path)
    name = path.name.lower()
    if name.startswith(".") or not name.endswith(_ALL_SUFFIXES):
        return False
    return not name.endswith((".img", ".img.gz")) or header_file(path) == path


def header_file(path: Path) -> Path:
    """Return the file with the header of a volume: .hdr for a pair of .hdr and .img, otherwise the file itself."""
    if path.name.lower().endswith((".img", ".img.gz")):
        stem = volume_stem(path)
        for suffix in (".hdr", ".HDR", ".Hdr", ".hdr.gz", ".HDR.GZ"):
            if path.with_name(stem + suffix).exists():
                return path.with_name(stem + suffix)
    return path


def volume_stem(path: str | os.PathLike[str]) -> str:
    """Return the name of a volume without folder and suffix; for a DICOM series, the name of its folder.

    Example:
        >>> volume_stem("in/case.1_t2.nii.gz"), volume_stem("in/T1.MGZ"), volume_stem("in/series.4/")
        ('case.1_t2', 'T1', 'series.4')
    """
    name = Path(path).name
    suffixes = [suffix for suffix in _ALL_SUFFIXES if name.lower().endswith(suffix)]
    return name[: -max(map(len, suffixes))] if suffixes else name


def is_zip_name(path: Path) -> bool:
    """Return whether a path has the name of a zip file."""
    return path.suffix.lower() == ".zip"


def case_stem(path: Path) -> str:
    """Return the name of a case without folder and suffix.

    Example:
        >>> case_stem(Path("in/study.1.zip")), case_stem(Path("in/.nii")), case_stem(Path("in/enhanced.dcm"))
        ('study.1', 'nii', 'enhanced')
    """
    is_other = is_zip_name(path) or path.suffix.lower() in _DICOM_SUFFIXES
    return (path.stem if is_other else volume_stem(path)) or path.name.strip(".")


def expected_format(path: str | os.PathLike[str]) -> str:
    """Return the format that the name of a file implies.

    Example:
        >>> expected_format("a.nii.gz"), expected_format("a.txt")
        ('NIfTI', 'an image')
    """
    name = Path(path).name.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), "an image")


def check_output_suffix(path: str | os.PathLike[str], or_else: str = "") -> None:
    """Check that the name of a file implies a format that can be written.

    Args:
        path: of the file.
        or_else: what else is possible, for the message.

    Raises:
        SettingError: if it does not.

    Example:
        >>> check_output_suffix("a.mgz")
        >>> check_output_suffix("a.mhd")
        Traceback (most recent call last):
            ...
        miar_monai.errors.SettingError: a.mhd is not the name of a volume that can be written: a .nii.gz, .nii, .mgz, \
.mgh, .nrrd or .mha file is needed; give another output.
    """
    if not Path(path).name.lower().endswith(OUTPUT_SUFFIXES):
        suffixes = f"{', '.join(OUTPUT_SUFFIXES[:-1])} or {OUTPUT_SUFFIXES[-1]}"
        raise SettingError(
            f"{path} is not the name of a volume that can be written: a {suffixes} file{or_else} is needed; give "
            "another output."
        )


def open_decompressed(path: str | os.PathLike[str]) -> io.BufferedReader | gzip.GzipFile | bz2.BZ2File:
    """Open a file for reading, decompressed if its content is that of gzip or bzip2."""
    with Path(path).open("rb") as file:
        start = file.read(4)
    for magic, open_compressed in _COMPRESSIONS:
        if start.startswith(magic):
            return open_compressed(path, "rb")
    return Path(path).open("rb")


def decompressed_size(path: str | os.PathLike[str], needed: int) -> int:
    """Return the size of a file after decompression, in bytes, and verify its checksum.

    Data after the last compressed block are ignored, as by gunzip.

    Args:
        path: the file.
        needed: size that its header declares.

    Raises:
        ValueError: if the file is much larger.
        OSError, EOFError, zlib.error: if the file is damaged.
    """
    length = 0
    with open_decompressed(path) as file:
        if isinstance(file, io.BufferedReader):
            return Path(path).stat().st_size
        try:
            while block := file.read1(2**20):  # returns what precedes an error
                length += len(block)
                if length > needed + _MAX_SURPLUS:
                    raise ValueError(f"it continues after the {needed} bytes that its header declares")
        except gzip.BadGzipFile as error:
            if length < needed or "Not a gzipped file" not in str(error):
                raise
    return length


def detect_format(path: str | os.PathLike[str]) -> str:
    """Return the format of a file, detected by its first bytes after decompression.

    Returns:
        ``"NIfTI-1"``, ``"NIfTI-2"``, the same with `` pair`` for .hdr and .img, ``"Analyze"``, ``"MGH"``, ``"NRRD"``,
        ``"MetaImage"``, ``"MINC"``, ``"Zstandard"``, ``"xz"`` or ``"pointer"`` (of git-annex or Git LFS); an empty
        string for any other content.

    Raises:
        OSError, EOFError, zlib.error: if the file cannot be read, or is compressed and damaged.
    """
    with open_decompressed(path) as file:
        start = file.read(352)
    for magic, name in _SIGNATURES.items():
        if start.startswith(magic):
            return name
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    if 540 in sizes and start[4:7] in (b"n+2", b"ni2"):
        return "NIfTI-2" if start[5:6] == b"+" else "NIfTI-2 pair"
    if start[344:347] in (b"n+1", b"ni1"):
        return "NIfTI-1" if start[345:346] == b"+" else "NIfTI-1 pair"
    if 348 in sizes:
        return "Analyze"
    if start[:4] == b"\0\0\0\1" and len(start) >= 284:
        return "MGH"
    if b"ObjectType" in start or b"NDims" in start:
        return "MetaImage"
    return ""
