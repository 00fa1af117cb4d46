"""The memory that a result needs, estimated before the network runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

from miar_monai.errors import ImageError

__all__ = ["available_memory", "check_memory", "needed_memory"]

_RESULTS, _WITH_UNCERTAINTY = 5.0, 6.0  # sizes of the result in float32 that are held at once; a test measures them
_GIB = 2**30


def needed_memory(shape: Sequence[int], uncertainty: bool = False) -> int:
    """Return the bytes that a super-resolved volume needs at the peak, from the network to the written file.

    It is in addition to what the process holds already: libraries, network and input. The slices that the network
    processes at once are not included, since they do not depend on the number of slices.

    Args:
        shape: voxels of the result along each axis.
        uncertainty: whether the expected error is computed too.

    Example:
        >>> needed_memory((512, 512, 600)) / 2**30
        2.9296875
    """
    return int(prod(shape) * 4 * (_WITH_UNCERTAINTY if uncertainty else _RESULTS))


def available_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Return the bytes that the process can still allocate without swapping, or None where that is not known.

    It is the smaller one of what Linux estimates to be available and of what the limit of a container or a Slurm job
    (control groups, version 2) leaves; file caches count as available.

    Args:
        root: folder in which ``proc`` and ``sys`` are mounted.
    """
    try:
        lines = Path(root, "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    entries = (line.partition("::") for line in _lines(Path(root, "proc/self/cgroup")))
    own = next((path for hierarchy, _, path in entries if hierarchy == "0"), "/")
    folder = Path(root, "sys/fs/cgroup")
    for group in (folder, *(folder.joinpath(*parts) for parts in _prefixes(Path(own).parts[1:]))):
        limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
        if limit and used and limit[0] != "max":
            statistics = dict(line.split() for line in _lines(group / "memory.stat"))
            free = min(free, int(limit[0]) - int(used[0]) + int(statistics.get("inactive_file", 0)))
    return max(free, 0)


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of the kernel, none if it does not exist."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _prefixes(parts: Sequence[str]) -> list[Sequence[str]]:
    """Return the beginnings of a path, from the first folder to the whole path."""
    return [parts[:end] for end in range(1, len(parts) + 1)]


def check_memory(shape: Sequence[int], uncertainty: bool = False) -> None:
    """Check before the work that the memory of the machine suffices for a result.

    Args:
        shape: voxels of the result along each axis.
        uncertainty: whether the expected error is computed too.

    Raises:
        ImageError: if it does not.
    """
    needed, free = needed_memory(shape, uncertainty), available_memory()
    if free is not None and needed > free:
        size = " x ".join(str(n) for n in shape)
        without = ", leave the uncertainty out" if uncertainty else ""
        raise ImageError(
            f"the result of {size} voxels needs {needed / _GIB:.1f} GiB of memory, but {free / _GIB:.1f} GiB are "
            f"available: ask for a coarser grid{without}, crop the image, or use a machine with more memory."
        )
