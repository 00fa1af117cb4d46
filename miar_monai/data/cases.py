"""What a user gives to be super-resolved: a NIfTI file, a DICOM series, a zip file of either, a folder of all these."""

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
from miar_monai.errors import DatasetError, ImageError, MiarError, in_one_sentence

__all__ = ["MAX_ZIP_BYTES", "MAX_ZIP_ENTRIES", "Case", "find_cases", "opened", "read_case", "temporary_folder"]

MAX_ZIP_BYTES = 4 * 2**30
"""The most that the entries of a zip file may hold together, uncompressed."""

MAX_ZIP_ENTRIES = 20_000
"""The most entries of a zip file."""


def find_cases(source: str | os.PathLike[str]) -> list[Case]:
    """List the volumes that ``source`` stands for, and what looks like one and is none, sorted by folder.

    Args:
        source: a NIfTI file, a zip file, or a folder. In a folder, NIfTI files, pairs of .hdr and .img, zip files and
            folders with a DICOM series count at any depth, unless they are hidden; results are named after the places
            of the cases in it. Links are followed, but not in circles; a folder that two paths lead to is done once.

    Returns:
        The cases. A file, or a folder with a DICOM series and nothing else, is one case whose source is ``source``.
        Those with a ``problem`` are none: links that lead to no file, halves of pairs, files of other formats, folders
        that cannot be listed, and cases whose results would have the same name.

    Raises:
        ImageError: if ``source`` is no file and no folder.
        DatasetError: if a folder holds no case, and nothing that looks like one.

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
            f"{source} {'is no file and no folder' if source.exists() else 'does not exist'}: a NIfTI file, a folder "
            "with a DICOM series, a zip file of either, or a folder of such cases is needed."
        )
    found = [case for folder in folders_in(source) for case in cases_in(source, folder)]
    if not found and dicom_files(source):  # whose reading says what they are instead
        return [Case(source, Path(source.resolve().name))]
    if not found:
        raise DatasetError(
            f"{source} holds no case: NIfTI files (.nii, .nii.gz), folders with the slices of a DICOM series, or zip "
            "files (.zip) are needed; give another folder."
        )
    of_name = defaultdict(list)
    for case in found:
        if not case.problem:
            of_name[case.name].append(case.source)
    return [case if case.problem else case._replace(problem=_namesakes(case, of_name[case.name])) for case in found]


def _namesakes(case: Case, sources: list[Path]) -> str:
    """Return that the results of a case and of others would have the same name, or an empty text."""
    others = " and ".join(str(source) for source in sources if source != case.source)
    return others and (
        f"{case.source} and {others} would have results of the same name; give them one at a time, each with an output "
        "of its own."
    )


@contextmanager
def opened(source: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the NIfTI file or the DICOM folder that a case stands for; what a zip file holds lies there while it lasts.

    Args:
        source: of a case. A zip file is extracted to a temporary folder; nothing that it holds can lie elsewhere.

    Yields:
        What `miar_monai.data.io.read_volume` reads.

    Raises:
        ImageError: if a zip file is damaged, encrypted or too large, has an entry that would lie outside of its
            folder or is a link, or holds no volume or several.
    """
    source = Path(source)
    if not (is_zip_name(source) and source.is_file()):
        yield source
        return
    with temporary_folder(source.stem, source) as folder:
        _extract(source, folder)
        yield _only_volume(source, folder)


def read_case(source: str | os.PathLike[str]) -> Volume:
    """Read the volume of a case, which knows the zip file as its path if it comes from one.

    Args:
        source: of a case.

    Raises:
        ImageError, GeometryError: as `opened` and `miar_monai.data.io.read_volume` do.
    """
    with opened(source) as path:
        return read_volume(path)._replace(path=Path(source))


@contextmanager
def temporary_folder(name: str, source: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder that is gone when the block ends.

    Args:
        name: of the folder.
        source: where its content comes from; the user knows that one, so that errors of the block speak of it.

    Yields:
        The folder.

    Raises:
        MiarError: what the block raises, with ``source`` in place of the folder.

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
    advice = "a complete zip file of one volume is needed; make it again."
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
    """Refuse what should not be extracted; zipfile reads no more of an entry than the size that it declares."""
    size = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ZIP_ENTRIES or size > MAX_ZIP_BYTES:
        raise ImageError(
            f"{source} holds {len(entries)} entries of {size / 2**30:.1f} GiB together, but at most {MAX_ZIP_ENTRIES} "
            f"entries of {MAX_ZIP_BYTES / 2**30:g} GiB are extracted: extract it yourself and give the folder."
        )
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or ":" in entry.filename or "\\" in entry.filename:
            problem = "would lie outside of its folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        elif entry.flag_bits & 1:
            problem = "is encrypted"
        else:
            continue
        raise ImageError(
            f"{source}: the entry {entry.filename!r} {problem}; a zip file of plain files is needed: make it again."
        )


def _only_volume(source: Path, folder: Path) -> Path:
    """Return the volume in an extracted archive; archives within are none, nor are the shadows that macOS packs."""
    folders = [name for name in folders_in(folder) if "__MACOSX" not in name.parts]
    found = [case for name in folders for case in cases_in(folder, name) if not is_zip_name(case.source)]
    for case in found:
        if case.problem:
            raise ImageError(case.problem)
    if len(found) != 1:
        names = ", ".join(case.source.relative_to(folder).as_posix() for case in found[:5])
        raise ImageError(
            f"{source} holds {len(found)} volumes{names and f' ({names})'}: one NIfTI file or one DICOM series is "
            "needed; extract it and give the folder."
        )
    return found[0].source
