"""The cases in a folder: volumes, and files that look like volumes but cannot be used."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from miar_monai.data.dicom_headers import holds_slices
from miar_monai.data.dicom_signature import is_dicom
from miar_monai.data.formats import SUFFIXES, UNSUPPORTED_SUFFIXES, case_stem, is_zip_name

__all__ = ["Case", "cases_in", "folders_in"]

logger = logging.getLogger(__name__)

_HALVES = {".hdr": ".img", ".img": ".hdr", ".hdr.gz": ".img.gz", ".img.gz": ".hdr.gz"}
_DICOM = (".dcm", ".dicom", ".dic", ".ima")
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
_IMAGES = (
    ".nii.zip", ".nia", ".gipl", ".gipl.gz", ".head", ".brik", ".brik.gz", ".par", ".vtk", ".vti", ".vff",
)  # fmt: skip
_NOT_IMAGES = {
    ".bval", ".bvec", ".css", ".csv", ".doc", ".docx", ".eps", ".gif", ".htm", ".html", ".ini", ".ipynb", ".jpeg",
    ".jpg", ".js", ".json", ".log", ".m", ".mat", ".md", ".odt", ".pdf", ".png", ".ps", ".py", ".r", ".rst", ".sh",
    ".svg", ".tex", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
}  # fmt: skip
_SUPPORTED = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
_MAX_NAMES = 20  # in a message


class Case(NamedTuple):
    """A volume to super-resolve, or a file that looks like one.

    Attributes:
        source: a volume file, a folder with a DICOM series, or a zip file of either.
        name: of the results, without suffix, relative to the folder of the results.
        problem: why the source cannot be read, one sentence; empty if no problem is known.
    """

    source: Path
    name: Path
    problem: str = ""


def folders_in(root: Path) -> list[Path]:
    """Return a folder and all folders below it, sorted, without hidden ones; links are followed, but not in circles.

    A folder with several paths is listed once, by the path without links if there is one.
    """
    found: dict[str, Path] = {}  # by real path
    tops = deque([root])
    while tops:
        for name, inside, _ in os.walk(tops.popleft(), onerror=lambda error: _add(found, Path(error.filename))):
            folder = Path(name)
            inside[:] = [part for part in inside if not part.startswith(".")] if _add(found, folder) else []
            links = (folder / part for part in sorted(inside) if os.path.islink(folder / part))
            tops.extend(link for link in links if not folder.resolve().is_relative_to(link.resolve()))
    return sorted(found.values())


def _add(found: dict[str, Path], folder: Path) -> bool:
    first = found.setdefault(os.path.realpath(folder), folder)
    if first != folder:
        logger.warning("%s and %s are the same folder: its cases are processed once.", folder, first)
    return first == folder


def cases_in(root: Path, folder: Path) -> Iterator[Case]:
    """Yield the cases in a folder, not in its subfolders; the folder itself is a case if it contains DICOM files.

    Args:
        root: names of results are relative to it.
        folder: ``root`` or a folder below it.
    """
    own_name = Path(Path(os.path.abspath(folder)).name) if folder == root else folder.relative_to(root)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield Case(folder, own_name, _unreadable(folder, error))
        return
    files = [path for path in entries if os.path.isfile(path)]
    names = {path.name.lower() for path in files}
    candidates = {path: _problem(path, names) for path in entries if _may_be_volume(path) and not os.path.isdir(path)}
    # the slices of some scanners are named .img
    volumes = {path: problem for path, problem in candidates.items() if not (problem and _is_dicom_file(path))}
    unreadable = [path for path in entries if path not in volumes and _is_unreadable(path)]
    slices = (path for path in files if path not in volumes)
    holds_dicom = holds_slices(path for path in slices if _opens_as_dicom(path, unreadable))
    problem = _problem_of_slices(folder, files, unreadable, holds_dicom)
    if holds_dicom or problem:
        yield Case(folder, own_name, problem)
    for path, problem in volumes.items():
        if problem or _suffix(path, tuple(_HALVES)) not in (".img", ".img.gz"):  # a pair counts by its header
            yield Case(path, path.relative_to(root).with_name(case_stem(path)), problem)


def _suffix(path: Path, suffixes: Sequence[str]) -> str:
    """Return the longest matching suffix of a path, in lower case, or an empty string."""
    return max((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), key=len, default="")


def _may_be_volume(path: Path) -> bool:
    """Return whether a path has the name of a volume, also in an unsupported format, and is not hidden."""
    suffixes = (*_SUPPORTED, *UNSUPPORTED_SUFFIXES, *_IMAGES, *_ARCHIVES)
    return not path.name.startswith(".") and bool(is_zip_name(path) or _suffix(path, suffixes))


def _problem(path: Path, names: set[str]) -> str:
    """Return why a volume file cannot be read, or an empty string; ``names``: files of its folder, in lower case."""
    if not os.path.isfile(path):
        return _unreadable(path)
    if half := _suffix(path, tuple(_HALVES)):
        other = path.name[: -len(half)] + _HALVES[half]
        alone = f"{path} is half of a pair: {other} is needed; copy both files into one folder."
        return "" if other.lower() in names else alone
    if is_zip_name(path) or _suffix(path, _SUPPORTED):
        return ""
    if _suffix(path, _ARCHIVES):
        return f"{path} is an archive in an unsupported format: a folder or a zip file is needed; extract it."
    suffix = _suffix(path, (*UNSUPPORTED_SUFFIXES, *_IMAGES))
    return (
        f"{path} has an unsupported format ({suffix}): a NIfTI file (.nii, .nii.gz) or the folder of a DICOM series"
        " is needed; convert it."
    )


def _unreadable(path: Path, error: OSError | None = None) -> str:
    try:
        os.stat(path)
    except FileNotFoundError:
        return (
            f"{path} is a broken link: the file itself is needed; fetch it (datalad get, git annex get) or repair the"
            " link."
        )
    except OSError as found:
        error = found
    reason = "it is not a regular file" if error is None else error.strerror
    return (
        f"{path} cannot be read ({reason}): permission to read it is needed; change the permission or remove the file."
    )


def _is_unreadable(path: Path) -> bool:
    """Return whether an entry may be a slice or the folder of a subject, but is a broken link or inaccessible."""
    if path.name.startswith(".") or path.suffix.lower() in _NOT_IMAGES:
        return False
    return not os.path.exists(path)


def _is_dicom_file(path: Path) -> bool:
    """Return whether an entry is a DICOM file; pipes are not opened, as that may block."""
    return os.path.isfile(path) and _opens_as_dicom(path, [])


def _opens_as_dicom(path: Path, unreadable: list[Path]) -> bool:
    """Return whether a file is DICOM; if it cannot be opened, append it to ``unreadable``."""
    try:
        return is_dicom(path)
    except OSError:
        if not path.name.startswith(".") and path.suffix.lower() not in _NOT_IMAGES:
            unreadable.append(path)
        return False


def _problem_of_slices(folder: Path, files: Sequence[Path], unreadable: Sequence[Path], holds_dicom: bool) -> str:
    """Return why a folder does not contain a complete series, or an empty string."""
    if unreadable:
        return (
            f"{folder}: {_names(unreadable)} cannot be opened (broken links, or no permission to read); the files"
            " themselves are needed: fetch them (datalad get, git annex get), repair the links, or remove them."
        )
    named = [path for path in files if _suffix(path, _DICOM) and not path.name.startswith(".")]
    if named and not holds_dicom:
        return (
            f"{folder} contains files that are named like DICOM slices but are not DICOM ({_names(named)}); a complete"
            " series is needed: copy or export it again."
        )
    return ""


def _names(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _MAX_NAMES} more" if len(paths) > _MAX_NAMES else ""
    return ", ".join(path.name for path in paths[:_MAX_NAMES]) + more
