"""Atomic writing: files and folders are written completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from miar_monai.data.outputs import refuse_to_overwrite
from miar_monai.errors import OutputError

__all__ = ["atomic_file", "atomic_folder"]


@contextmanager
def atomic_file(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path of the same name, moved to ``path`` when the block ends without an error.

    Args:
        path: the file to write. Its folder is created if needed.
        overwrite: replace an existing file.

    Yields:
        The temporary path, in the same file system as ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(folder + "/a.txt") as part:
        ...         _ = part.write_text("complete")
        ...     print(Path(folder, "a.txt").read_text())
        complete
    """
    path = Path(path)
    if not overwrite:
        refuse_to_overwrite(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folder = path.parent / f".miar-{uuid.uuid4().hex}"
            for _ in range(2):  # the second removes what the first leaves when Ctrl-C interrupts it
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            yield folder / path.name
            os.replace(folder / path.name, path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error}): a folder with write permission and free space is needed; "
            "give another output folder."
        ) from error


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder of the same name, moved to ``path`` when the block ends without an error.

    Args:
        path: the folder to write. Its parent is created if needed.
        overwrite: replace an existing file, or a folder with its content.

    Yields:
        The empty temporary folder, in the same file system as ``path``.

    Raises:
        OutputError: if ``path`` exists and ``overwrite`` is False, or cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_folder(folder + "/a") as part:
        ...         _ = (part / "b.txt").write_text("complete")
        ...     print(Path(folder, "a", "b.txt").read_text())
        complete
    """
    with atomic_file(path, overwrite) as part:
        part.mkdir()
        yield part
        if Path(path).exists():
            # a folder that is not empty cannot be replaced; the old content is deleted with the temporary folder
            os.replace(path, Path(tempfile.mkdtemp(dir=part.parent), part.name))
