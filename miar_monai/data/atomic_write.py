"""Results appear on disk whole or not at all, and replace nothing unless that is asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miar_monai.errors import ExistsError, OutputError

__all__ = ["check_name", "refuse_to_overwrite", "whole_file", "whole_folder"]


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
        ExistsError: if ``path`` exists.
        OutputError: if no file can have this name.
    """
    check_name(path)
    if Path(path).exists():
        raise ExistsError(path)


@contextmanager
def whole_file(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary path of the same name, which becomes ``path`` when the block ends without an error.

    Args:
        path: the file to write. Its folder is made if needed.
        overwrite: replace an existing file.

    Yields:
        The path to write to, in the same file system as ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(folder + "/a.txt") as part:
        ...         _ = part.write_text("all of it")
        ...     print(Path(folder, "a.txt").read_text())
        all of it
    """
    path = Path(path)
    if not overwrite:
        refuse_to_overwrite(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".miar-", dir=path.parent) as folder:
            yield Path(folder, path.name)
            os.replace(Path(folder, path.name), path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error}): a folder with write permission and free space is needed; "
            "give another output folder."
        ) from error


@contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder of the same name, which becomes ``path`` when the block ends without an error.

    Args:
        path: the folder to write. The folder above it is made if needed.
        overwrite: replace what is there, a folder with all that it holds.

    Yields:
        The empty folder to write to, in the same file system as ``path``.

    Raises:
        OutputError: if ``path`` exists and ``overwrite`` is False, or if it cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_folder(folder + "/a") as part:
        ...         _ = (part / "b.txt").write_text("all of it")
        ...     print(Path(folder, "a", "b.txt").read_text())
        all of it
    """
    with whole_file(path, overwrite) as part:
        part.mkdir()
        yield part
        if Path(path).exists():
            # a folder cannot take the place of one that is not empty; what was there goes with the temporary folder
            os.replace(path, Path(tempfile.mkdtemp(dir=part.parent), part.name))
