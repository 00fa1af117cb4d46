"""The memory that a result needs, estimated before the network runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from miar_monai.data.volume import SAMPLE_MAPS, VOXEL_BYTES, sample_maps
from miar_monai.errors import ImageError

__all__ = ["MemoryForecast", "available_memory"]

_GIB = 2**30


class MemoryForecast(NamedTuple):
    """The memory of a super-resolved volume: how often its voxels are held at once, from the network to the file.

    It is in addition to the libraries and the network. The slices that are processed or written at once are not
    included, since they do not depend on the number of slices. A test measures it.

    Example:
        >>> MemoryForecast([(512, 512, 600)]).needed / 2**30
        0.5859375
        >>> MemoryForecast([(512, 512, 600)], uncertainty=True, samples=10).needed / 2**30
        3.515625
    """

    shapes: Sequence[Sequence[int]]
    """Voxels along each axis of the result of each stage of the passes; the last one is the volume."""
    passes: int = 1
    """Number of passes of all stages."""
    uncertainty: bool = False
    """Whether the expected error is computed too."""
    samples: int = 0
    """Number of posterior samples."""
    keep_samples: bool = False
    """Whether they are kept."""
    guide: bool = False
    """Whether a guide is brought to the grids."""
    inputs: int = 0
    """Bytes of what is in memory already: the image, the guide and the label map, as read and as the network takes
    them."""
    label_bytes: int = 0
    """Bytes of a voxel of the label map that is carried to the grid of the result, 0 without one."""
    is_rounded_at_once: bool = False
    """Whether the result is rounded as a whole when it is written, see `miar_monai.data.io.is_rounded_at_once`."""

    @property
    def needed(self) -> int:
        """The bytes at the peak."""
        voxels = max(self._made, self._written)
        return self.inputs + VOXEL_BYTES * voxels + self.label_bytes * prod(self.shapes[-1])

    @property
    def _made(self) -> int:
        """The voxels of results while the network runs."""
        sizes = [prod(shape) for shape in self.shapes]
        *earlier, last = [0, *sizes]
        before, channels = earlier[-1], 1 + self.uncertainty
        peak = channels * (last + before) + (last if self.uncertainty and before else 0)  # whose error is interpolated
        if self.samples:
            maps = len(SAMPLE_MAPS) * last
            if self.passes == 1:  # which are summarized slice by slice
                sampled = maps + self.keep_samples * self.samples * last
            else:
                sampled = self.samples * last + max(maps, self.samples * before)
            peak = max(peak, channels * last + sampled)
        return peak + self.guide * sum(sizes)

    @property
    def _written(self) -> int:
        """The voxels of results while they are written."""
        maps = len(sample_maps(self.samples, self.keep_samples))
        return (1 + self.uncertainty + maps + self.is_rounded_at_once) * prod(self.shapes[-1])

    @property
    def sentence(self) -> str:
        """How much is needed, without a full stop."""
        return (
            f"the result of {' x '.join(map(str, self.shapes[-1]))} voxels needs {self.needed / _GIB:.1f} GiB of memory"
        )

    def check(self) -> None:
        """Check before the work that the memory of the machine suffices.

        Raises:
            ImageError: if it does not.
        """
        free = available_memory()
        if free is None or self.needed - self.inputs <= free:
            return
        options = {
            "the uncertainty": self.uncertainty,
            "the samples": self.samples,
            "the guide": self.guide,
            "the label map": self.label_bytes,
        }
        given = " or ".join(name for name, is_on in options.items() if is_on)
        raise ImageError(
            f"{self.sentence}, but {(free + self.inputs) / _GIB:.1f} GiB are available: ask for a coarser grid"
            f"{given and f', leave {given} out'}, crop the image, or use a machine with more memory."
        )


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
