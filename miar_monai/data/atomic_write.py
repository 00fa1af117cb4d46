"""Results appear on disk whole or not at all, and replace nothing unless that is asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miar_monai.data.outputs import refuse_to_overwrite
from miar_monai.errors import OutputError

__all__ = ["whole_file", "whole_folder"]


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
