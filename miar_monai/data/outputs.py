"""Names of results, and checks that they can be written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from miar_monai.data.formats import case_stem, volume_stem
from miar_monai.data.volume import SAMPLE_MAPS
from miar_monai.errors import ExistsError, OutputError

__all__ = [
    "UNCERTAINTY_POSTFIX",
    "ResultPaths",
    "check_name",
    "check_output",
    "check_output_folder",
    "check_results",
    "refuse_to_overwrite",
    "result_path",
    "without_number",
]

UNCERTAINTY_POSTFIX = "_uncertainty"
"""Appended to the name of a result, it names the map of the expected error."""


class ResultPaths(NamedTuple):
    """Paths of the results of one case, all in the same folder.

    Attributes:
        image: the super-resolved volume: a file or, for DICOM, the folder of its series.
        uncertainty: its expected error, in the same format.
        preview: a PNG.
        page: an HTML file.
        labels: its label map; a file, .nii.gz for DICOM.
    """

    image: Path
    uncertainty: Path
    preview: Path
    page: Path
    labels: Path

    @classmethod
    def of(cls, image: Path) -> ResultPaths:
        """Return the paths that go with a super-resolved volume.

        Example:
            >>> for path in ResultPaths.of(Path("out/case_sr.nii.gz")): print(path.as_posix())
            out/case_sr.nii.gz
            out/case_sr_uncertainty.nii.gz
            out/case_sr.png
            out/case_sr.html
            out/case_sr_labels.nii.gz
        """
        stem = volume_stem(image)
        ending = image.name[len(stem) :]
        parts = (f"{UNCERTAINTY_POSTFIX}{ending}", ".png", ".html", f"_labels{ending or '.nii.gz'}")
        return cls(image, *(image.with_name(f"{stem}{part}") for part in parts))

    def sampled(self, name: str) -> Path:
        """Return the path of a map of posterior samples, by the names of `miar_monai.data.volume.sample_maps`.

        Example:
            >>> ResultPaths.of(Path("out/case_sr.nii.gz")).sampled("std").as_posix()
            'out/case_sr_std.nii.gz'
        """
        stem = volume_stem(self.image)
        return self.image.with_name(f"{stem}_{name}{self.image.name[len(stem) :]}")

    @property
    def volumes(self) -> list[Path]:
        """Paths of the image, its expected error, its label map and the maps of its samples, for `without_number`."""
        return [self.image, self.uncertainty, self.labels, *map(self.sampled, SAMPLE_MAPS)]


def without_number(name: str) -> str:
    """Return the name of a file, of a map of the samples for one of the samples.

    Example:
        >>> without_number("case_sr_sample_03.nii.gz")
        'case_sr_mean.nii.gz'
    """
    return re.sub(r"_sample_[0-9]+(?=\.|$)", f"_{SAMPLE_MAPS[0]}", name)


def result_path(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    postfix: str = "sr",
    name: str | os.PathLike[str] = "",
    ending: str = ".nii.gz",
) -> Path:
    """Return the path of the result of an input.

    Args:
        source: the input.
        output_dir: folder of the results.
        postfix: last part of the name.
        name: replaces the name of the input; may include folders.
        ending: of the file; empty for a folder.

    Example:
        >>> result_path("scans/case.nii.gz", "output").as_posix()
        'output/case_sr.nii.gz'
        >>> result_path("scans/a/case.nii.gz", "output", name="a/case").as_posix()
        'output/a/case_sr.nii.gz'
    """
    return Path(output_dir, f"{os.fspath(name) or case_stem(Path(source))}_{postfix}{ending}")


def check_name(path: str | os.PathLike[str]) -> None:
    """Check that the file system accepts the name of a result, which is longer than that of its input.

    Raises:
        OutputError: if it does not; most file systems accept at most 255 bytes.

    Example:
        >>> check_name("a" * 300)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        miar_monai.errors.OutputError: aaa...aaa cannot be written (File name too long): a shorter name is needed; ...
    """
    absolute = Path(os.path.abspath(path))
    existing = next((folder for folder in absolute.parents if os.path.exists(folder)), absolute)
    try:
        os.lstat(existing / absolute.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}): a shorter name is needed; choose another output, or rename"
            " the input."
        ) from error


def refuse_to_overwrite(path: str | os.PathLike[str]) -> None:
    """Check that a result does not replace an existing file.

    Raises:
        ExistsError: if ``path`` exists.
        OutputError: if its name is not valid.
    """
    check_name(path)
    if Path(path).exists():
        raise ExistsError(path)


def check_output_folder(folder: str | os.PathLike[str]) -> None:
    """Check, before the work is done, that results can be written to a folder; nothing is created or changed.

    Args:
        folder: the folder; it need not exist yet.

    Raises:
        OutputError: if the folder, or its closest existing parent, is not writable.
    """
    check_name(folder)
    absolute = Path(folder).absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"results cannot be written to {folder}: {existing} is not a folder with write permission; "
            "give another output folder."
        )


def check_output(path: str | os.PathLike[str], overwrite: bool = False, is_folder: bool = False) -> None:
    """Check, before the work is done, that a result can be written.

    Args:
        path: of the result.
        overwrite: whether an existing result may be replaced.
        is_folder: whether the result is a folder, as DICOM series are.

    Raises:
        OutputError: if the name is not valid, the folder that contains it is not writable, a folder would be replaced
            by a file, or the result exists and ``overwrite`` is False.
    """
    check_name(path)
    check_output_folder(Path(path).parent)
    if Path(path).is_dir() and not is_folder:
        raise OutputError(f"{path} is a folder, but a file is to be written there: give another name.")
    if not overwrite:
        refuse_to_overwrite(path)


def check_results(
    items: Sequence[Mapping[str, str]],
    output_dir: str | os.PathLike[str],
    postfix: str | Sequence[str] = "sr",
    overwrite: bool = False,
    key: str = "image",
) -> None:
    """Check, before the work is done, that the results of all inputs can be written and have different names.

    Args:
        items: the inputs: the path under ``key`` and, optionally, the name of the result under ``"name"``.
        output_dir: folder of the results.
        postfix: last part of their names, or several where an input has several results.
        overwrite: whether existing results may be replaced.
        key: of the path.

    Raises:
        OutputError: if two inputs have results of the same name, or a result cannot be written (see `check_output`).
    """
    taken: dict[Path, str] = {}
    for item, part in product(items, [postfix] if isinstance(postfix, str) else postfix):
        path = result_path(item[key], output_dir, part, item.get("name", ""))
        if path in taken:
            raise OutputError(
                f"{taken[path]} and {item[key]} would both be written to {path}; give them one at a time, each with "
                "its own output folder."
            )
        taken[path] = item[key]
        check_output(path, overwrite)
