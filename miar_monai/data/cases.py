"""The cases of an input: a volume file, a DICOM series, a zip file of either, or a folder of these."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from miar_monai.data.dicom_headers import dicom_files
from miar_monai.data.folders import Case, cases_in, folders_in
from miar_monai.data.formats import case_stem, is_zip_name
from miar_monai.data.io import Volume, read_volume
from miar_monai.errors import DatasetError, ImageError, MiarError, SettingError, in_one_sentence

__all__ = [
    "MAX_ZIP_BYTES",
    "MAX_ZIP_ENTRIES",
    "Case",
    "cases_for_guide",
    "find_cases",
    "read_case",
    "temporary_folder",
    "unpacked",
]

MAX_ZIP_BYTES = 4 * 2**30
"""Maximum total size of the entries of a zip file, uncompressed."""

MAX_ZIP_ENTRIES = 20_000
"""Maximum number of entries of a zip file."""


def find_cases(source: str | os.PathLike[str]) -> list[Case]:
    """List the cases of an input, sorted by folder.

    Args:
        source: a volume file, a zip file, or a folder. In a folder, volume files, pairs of .hdr and .img, zip files and
            folders with a DICOM series are found at any depth, unless they are hidden; names of results are relative to
            it. Links are followed, but not in circles; a folder with several paths is listed once.

    Returns:
        The cases. A file, or a folder with only a DICOM series, is one case whose source is ``source``. Cases with a
        ``problem`` cannot be processed: broken links, halves of pairs, files of other formats, folders that cannot be
        listed, and cases whose results would have the same name.

    Raises:
        ImageError: if ``source`` is neither a file nor a folder.
        DatasetError: if a folder contains no case.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "b").mkdir()
        ...     for name in ("b/t2.nii", "a.nii.gz", "c.mnc", "notes.txt"):
        ...         Path(folder, name).touch()
        ...     [(case.name.as_posix(), bool(case.problem)) for case in find_cases(folder)]
        [('a', False), ('c', True), ('b/t2', False)]
    """
    source = Path(source)
    if source.is_file():
        return [Case(source, Path(case_stem(source)))]
    if not source.is_dir():
        raise ImageError(
            f"{source} {'is neither a file nor a folder' if source.exists() else 'does not exist'}: a NIfTI file, a "
            "folder with a DICOM series, a zip file of either, or a folder of such cases is needed."
        )
    found = [case for folder in folders_in(source) for case in cases_in(source, folder)]
    if not found and dicom_files(source):  # reading reports what else they are
        return [Case(source, Path(source.resolve().name))]
    if not found:
        raise DatasetError(
            f"{source} contains no case: NIfTI files (.nii, .nii.gz), folders with the slices of a DICOM series, or "
            "zip files (.zip) are needed; give another folder."
        )
    sources = defaultdict(list)
    for case in found:
        if not case.problem:
            sources[case.name].append(case.source)
    return [case if case.problem else case._replace(problem=_name_conflict(case, sources[case.name])) for case in found]


def _name_conflict(case: Case, sources: list[Path]) -> str:
    """Return a sentence if the results of a case and of others would have the same name, or an empty string."""
    others = " and ".join(str(source) for source in sources if source != case.source)
    return others and (
        f"{case.source} and {others} would have results of the same name; give them one at a time, each with its "
        "own output."
    )


def cases_for_guide(cases: list[Case], guide: str | os.PathLike[str]) -> list[Case]:
    """Return the case that a guide belongs to: the only one besides the guide itself.

    Args:
        cases: from `find_cases`.
        guide: another contrast of the same patient, a file or a folder.

    Raises:
        SettingError: if there are several.
    """
    others = [case for case in cases if os.path.realpath(case.source) != os.path.realpath(guide)]
    if len(others) > 1:
        raise SettingError(
            f"the input has {len(others)} cases, but {guide} can guide one image only; give one case at a time."
        )
    return others or cases  # a guide that is the only image is refused after reading


@contextmanager
def unpacked(source: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the volume file or the DICOM folder of a case, extracted to a temporary folder if it is a zip file.

    Args:
        source: of a case.

    Yields:
        An input of `miar_monai.data.io.read_volume`.

    Raises:
        ImageError: if a zip file is damaged, encrypted or too large, has an entry that is a link or would be extracted
            to another folder, or does not contain exactly one volume.
    """
    source = Path(source)
    if not (is_zip_name(source) and source.is_file()):
        yield source
        return
    with temporary_folder(source.stem, source) as folder:
        _extract(source, folder)
        yield _only_volume(source, folder)


def read_case(source: str | os.PathLike[str]) -> Volume:
    """Read the volume of a case; the path of a volume from a zip file is that of the zip file.

    Args:
        source: of a case.

    Raises:
        ImageError, GeometryError: see `unpacked` and `miar_monai.data.io.read_volume`.
    """
    with unpacked(source) as path:
        return read_volume(path)._replace(path=Path(source))


@contextmanager
def temporary_folder(name: str, source: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder, deleted when the block ends.

    Args:
        name: of the folder.
        source: of its content; replaces the path of the folder in errors of the block.

    Yields:
        The folder.

    Raises:
        MiarError: an error of the block, with ``source`` in place of the folder.

    Example:
        >>> with temporary_folder("series", "study.zip") as folder:
        ...     raise ImageError(f"{folder}/1.dcm cannot be read.")
        Traceback (most recent call last):
            ...
        miar_monai.errors.ImageError: study.zip/1.dcm cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="miar-") as parent:
        folder = Path(parent, name)
        folder.mkdir()
        try:
            yield folder
        except MiarError as error:
            raise type(error)(str(error).replace(str(folder), str(source))) from error


def _extract(source: Path, folder: Path) -> None:
    advice = "a complete zip file of one volume is needed; create it again."
    with in_one_sentence(ImageError, f"{source} cannot be extracted", advice), zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        _check_entries(source, entries)
        for entry in entries:
            if not entry.is_dir():
                path = folder / entry.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, path.open("xb") as file:
                    shutil.copyfileobj(packed, file, 2**20)


def _check_entries(source: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Check that entries are safe to extract; zipfile reads at most the declared size of each."""
    size = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ZIP_ENTRIES or size > MAX_ZIP_BYTES:
        raise ImageError(
            f"{source} contains {len(entries)} entries of {size / 2**30:.1f} GiB in total, but at most "
            f"{MAX_ZIP_ENTRIES} entries of {MAX_ZIP_BYTES / 2**30:g} GiB are extracted: extract it yourself and give "
            "the folder."
        )
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or ":" in entry.filename or "\\" in entry.filename:
            problem = "would be extracted to another folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        elif entry.flag_bits & 1:
            problem = "is encrypted"
        else:
            continue
        raise ImageError(
            f"{source}: the entry {entry.filename!r} {problem}; a zip file of regular files is needed: create it again."
        )


def _only_volume(source: Path, folder: Path) -> Path:
    """Return the only volume in an extracted archive, without nested archives and the shadow files of macOS."""
    folders = [name for name in folders_in(folder) if "__MACOSX" not in name.parts]
    found = [case for name in folders for case in cases_in(folder, name) if not is_zip_name(case.source)]
    for case in found:
        if case.problem:
            raise ImageError(case.problem)
    if len(found) != 1:
        names = ", ".join(case.source.relative_to(folder).as_posix() for case in found[:5])
        listed = f" ({names})" if names else ""
        raise ImageError(
            f"{source} contains {len(found)} volumes{listed}: one NIfTI file or one DICOM series is "
            "needed; extract it and give the folder."
        )
    return found[0].source
