"""Names of results, and whether they may be written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from miar_monai.data.formats import case_stem
from miar_monai.errors import OVERWRITE, OutputError

__all__ = ["check_name", "check_output_folder", "check_results", "refuse_to_overwrite", "result_path"]


def check_name(path: str | os.PathLike[str]) -> None:
    """Check that a file system takes the name of a result, which is longer than that of its input.

    Raises:
        OutputError: if it does not, as most do with more than 255 bytes.

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
            f"{path} cannot be written ({error.strerror}): a shorter name is needed; give an output of another name, or"
            " rename the input."
        ) from error


def refuse_to_overwrite(path: str | os.PathLike[str]) -> None:
    """Check that a result would not replace a file; worth asking before hours of work.

    Raises:
        OutputError: if ``path`` exists, or has a name that no file can have.
    """
    check_name(path)
    if Path(path).exists():
        raise OutputError(
            f"{path} exists already and is left as it is: "
            f"give another output, remove it, or allow overwriting {OVERWRITE}."
        )


def check_output_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that results cannot be written to, before the work is done; nothing is made or changed.

    Args:
        folder: the folder; it need not exist yet.

    Raises:
        OutputError: if the folder, or the closest folder above it that exists, is not writable.
    """
    check_name(folder)
    absolute = Path(folder).absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"results cannot be written to {folder}: {existing} is not a folder with write permission; "
            "give another output folder."
        )


def result_path(
    source: str | os.PathLike[str], output_dir: str | os.PathLike[str], postfix: str = "sr", name: str = ""
) -> Path:
    """Return where the result of an input goes.

    Args:
        source: the input.
        output_dir: folder of the results.
        postfix: ending of the name.
        name: of the result, instead of that of the input; perhaps with folders.

    Example:
        >>> result_path("scans/case.nii.gz", "output").as_posix()
        'output/case_sr.nii.gz'
        >>> result_path("scans/a/case.nii.gz", "output", name="a/case").as_posix()
        'output/a/case_sr.nii.gz'
    """
    return Path(output_dir, f"{name or case_stem(Path(source))}_{postfix}.nii.gz")


def check_results(
    items: Sequence[Mapping[str, str]],
    output_dir: str | os.PathLike[str],
    postfix: str | Sequence[str] = "sr",
    overwrite: bool = False,
    key: str = "image",
) -> None:
    """Check, before hours of work, that each input has a result of its own and replaces none.

    Args:
        items: the inputs, ``key`` holding the path and perhaps ``"name"`` the name of the result.
        output_dir: folder of the results.
        postfix: ending of their names, or the endings where an input has several.
        overwrite: whether existing results may be replaced.
        key: of the path.

    Raises:
        OutputError: if two inputs would be written to the same file, a name is too long, or a result exists and
            ``overwrite`` is False.
    """
    taken: dict[Path, str] = {}
    for item, ending in product(items, [postfix] if isinstance(postfix, str) else postfix):
        path = result_path(item[key], output_dir, ending, item.get("name", ""))
        if path in taken:
            raise OutputError(
                f"{taken[path]} and {item[key]} would both be written to {path}; give them one at a time, each with an "
                "output folder of its own."
            )
        taken[path] = item[key]
        check_name(path)
        if not overwrite:
            refuse_to_overwrite(path)
