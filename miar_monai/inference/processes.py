"""Work shared by the processes of ``torchrun``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from monai.utils import string_list_all_gather

__all__ = ["Processes", "part_of", "processes"]

Item = TypeVar("Item")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(days=30)  # for the first process to wait for the last; if one exits, the others notice at once


def part_of(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """Return every ``count``-th item, starting with ``index``: one of ``count`` disjoint parts of nearly equal size.

    Example:
        >>> [part_of("abcde", index, 2) for index in (0, 1)], part_of("a", 1, 2)
        ([['a', 'c', 'e'], ['b', 'd']], [])
    """
    return list(items[index::count])


class Processes(NamedTuple):
    """The processes of one command.

    Attributes:
        rank: index of this process.
        size: number of processes.
    """

    rank: int
    size: int

    def wait(self) -> None:
        """Wait until all processes get here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, numbered: dict[int, Any]) -> list[Any]:
        """Return the values of all processes, which must be serializable as JSON, sorted by their numbers."""
        lines = [json.dumps(pair) for pair in numbered.items()]
        if self.size > 1:
            lines = string_list_all_gather(lines, delimiter="\n")
        return [value for _, value in sorted((json.loads(line) for line in lines if line), key=lambda pair: pair[0])]


@contextmanager
def processes() -> Iterator[Processes]:
    """Connect the processes of ``torchrun`` for the duration of the block; without it, there is only this one.

    They communicate by gloo, on CPUs, since they exchange only a few short messages.

    Example:
        >>> with processes() as alone:
        ...     print(alone, alone.gather({1: "b", 0: "a"}))
        Processes(rank=0, size=1) ['a', 'b']
    """
    if not all(name in os.environ for name in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield Processes(0, 1)
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
