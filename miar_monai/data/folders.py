"""What lies in a folder: the volumes that can be super-resolved, and what looks like one and is none."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from miar_monai.data.dicom_headers import holds_slices
from miar_monai.data.dicom_signature import is_dicom
from miar_monai.data.formats import SUFFIXES, UNREAD_SUFFIXES, case_stem, is_zip_name

__all__ = ["Case", "cases_in", "folders_in"]

logger = logging.getLogger(__name__)

_HALVES = {".hdr": ".img", ".img": ".hdr", ".hdr.gz": ".img.gz", ".img.gz": ".hdr.gz"}
_DICOM = (".dcm", ".dicom", ".dic", ".ima")
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
_IMAGES = (
    ".nii.zip", ".nia", ".gipl", ".gipl.gz", ".head", ".brik", ".brik.gz", ".par", ".vtk", ".vti", ".vff",
)  # fmt: skip
_NO_IMAGES = {
    ".bval", ".bvec", ".css", ".csv", ".doc", ".docx", ".eps", ".gif", ".htm", ".html", ".ini", ".ipynb", ".jpeg",
    ".jpg", ".js", ".json", ".log", ".m", ".mat", ".md", ".odt", ".pdf", ".png", ".ps", ".py", ".r", ".rst", ".sh",
    ".svg", ".tex", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
}  # fmt: skip
_READ = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
_MOST_NAMES = 20  # in a sentence


class Case(NamedTuple):
    """One volume to super-resolve, or what looks like one.

    Attributes:
        source: a NIfTI file, a folder with a DICOM series, or a zip file of either.
        name: of the results, without suffix, relative to the folder of the results.
        problem: why there is no volume to read in it, one sentence; empty if there may be one.
    """

    source: Path
    name: Path
    problem: str = ""


def folders_in(root: Path) -> list[Path]:
    """Return a folder and all in it that are not hidden, sorted; links are followed, but not in circles.

    A folder that two paths lead to is listed once, by the path without links if there is one.
    """
    found: dict[str, Path] = {}  # by their real paths
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
        logger.warning("%s and %s are the same folder: its cases are done once.", folder, first)
    return first == folder


def cases_in(root: Path, folder: Path) -> Iterator[Case]:
    """Yield the cases that lie directly in a folder, the folder itself among them if it holds DICOM files.

    Args:
        root: the results are named after the places of the cases in it.
        folder: ``root`` or a folder in it.
    """
    own_name = Path(Path(os.path.abspath(folder)).name) if folder == root else folder.relative_to(root)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield Case(folder, own_name, _not_readable(folder, error))
        return
    files = [path for path in entries if os.path.isfile(path)]
    names = {path.name.lower() for path in files}
    looks = {path: _problem(path, names) for path in entries if _may_be_volume(path) and not os.path.isdir(path)}
    # some scanners call slices .img
    volumes = {path: problem for path, problem in looks.items() if not (problem and _is_dicom_file(path))}
    lost = [path for path in entries if path not in volumes and _is_lost(path)]
    slices = (path for path in files if path not in volumes)
    holds_dicom = holds_slices(path for path in slices if _opens_as_dicom(path, lost))
    problem = _problem_of_slices(folder, files, lost, holds_dicom)
    if holds_dicom or problem:
        yield Case(folder, own_name, problem)
    for path, problem in volumes.items():
        if problem or _suffix(path, tuple(_HALVES)) not in (".img", ".img.gz"):  # a pair goes by its header
            yield Case(path, path.relative_to(root).with_name(case_stem(path)), problem)


def _suffix(path: Path, suffixes: Sequence[str]) -> str:
    """Return the longest of some suffixes that a path has, in lower case, or an empty text."""
    return max((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), key=len, default="")


def _may_be_volume(path: Path) -> bool:
    """Return whether a path has the name of a volume, be it one that is not read; hidden files have not."""
    suffixes = (*_READ, *UNREAD_SUFFIXES, *_IMAGES, *_ARCHIVES)
    return not path.name.startswith(".") and bool(is_zip_name(path) or _suffix(path, suffixes))


def _problem(path: Path, names: set[str]) -> str:
    """Return why a file with the name of a volume is none, or an empty text; ``names`` lie beside it, in lower case."""
    if not os.path.isfile(path):
        return _not_readable(path)
    if half := _suffix(path, tuple(_HALVES)):
        other = path.name[: -len(half)] + _HALVES[half]
        alone = f"{path} is half of a pair: {other} is needed beside it; copy both files."
        return "" if other.lower() in names else alone
    if is_zip_name(path) or _suffix(path, _READ):
        return ""
    if _suffix(path, _ARCHIVES):
        return f"{path} is an archive that is not opened: a folder or a zip file is needed; extract it."
    suffix = _suffix(path, (*UNREAD_SUFFIXES, *_IMAGES))
    return (
        f"{path} has a format that is not read ({suffix}): a NIfTI file (.nii, .nii.gz) or the folder of a DICOM series"
        " is needed; convert it."
    )


def _not_readable(path: Path, error: OSError | None = None) -> str:
    try:
        os.stat(path)
    except FileNotFoundError:
        return (
            f"{path} is a link that leads to no file: the file itself is needed; fetch it (datalad get, git annex get)"
            " or mend the link."
        )
    except OSError as found:
        error = found
    reason = "it is no plain file" if error is None else error.strerror
    return f"{path} cannot be read ({reason}): permission to read it is needed; change the permission or take it out."


def _is_lost(path: Path) -> bool:
    """Return whether an entry may be a slice or the folder of a subject, but is a link to nowhere or closed."""
    if path.name.startswith(".") or path.suffix.lower() in _NO_IMAGES:
        return False
    return not os.path.exists(path)


def _is_dicom_file(path: Path) -> bool:
    """Return whether an entry is a DICOM file; a pipe, which opens only when somebody writes to it, is none."""
    return os.path.isfile(path) and _opens_as_dicom(path, [])


def _opens_as_dicom(path: Path, lost: list[Path]) -> bool:
    """Return whether a file is DICOM; one that cannot be opened is added to those that are lost."""
    try:
        return is_dicom(path)
    except OSError:
        if not path.name.startswith(".") and path.suffix.lower() not in _NO_IMAGES:
            lost.append(path)
        return False


def _problem_of_slices(folder: Path, files: Sequence[Path], lost: Sequence[Path], holds_dicom: bool) -> str:
    """Return why a folder holds no series that is whole, or an empty text."""
    if lost:
        return (
            f"{folder}: {_names(lost)} cannot be opened (links that lead to no file, or no permission to read); the"
            " files themselves are needed: fetch them (datalad get, git annex get), mend the links, or take them out."
        )
    named = [path for path in files if _suffix(path, _DICOM) and not path.name.startswith(".")]
    if named and not holds_dicom:
        return (
            f"{folder} holds files with the names of DICOM slices that are none ({_names(named)}); a whole series is"
            " needed: copy or export it again."
        )
    return ""


def _names(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _MOST_NAMES} more" if len(paths) > _MOST_NAMES else ""
    return ", ".join(path.name for path in paths[:_MOST_NAMES]) + more
