"""Many volumes shared by processes: each does a part, one of them reports for all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from monai.data import partition_dataset
from monai.utils import string_list_all_gather

__all__ = ["Processes", "part_of", "processes"]

Item = TypeVar("Item")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST = timedelta(days=30)  # that the first to finish waits for the last; one that ends is noticed at once


def part_of(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """Return one of ``count`` parts of a list, which hold each item exactly once; sizes differ by at most 1.

    Args:
        items: any number, also fewer than parts.
        index: from 0 to ``count - 1``.
        count: number of parts.

    Reference:
        `monai.data.partition_dataset`, which wants at least one item for each part.

    Example:
        >>> [part_of("abcde", index, 2) for index in (0, 1)], part_of("a", 1, 2)
        ([['a', 'c', 'e'], ['b', 'd']], [])
    """
    if index >= len(items):
        return []
    part: list[Item] = partition_dataset(items, num_partitions=min(count, len(items)), even_divisible=False)[index]
    return part


class Processes(NamedTuple):
    """The processes of one command.

    Attributes:
        rank: of this one, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, numbered: dict[int, Any]) -> list[Any]:
        """Return what all of them hold, ready for JSON, in the order of its numbers."""
        lines = [json.dumps(pair) for pair in numbered.items()]
        if self.size > 1:
            lines = string_list_all_gather(lines, delimiter="\n")
        return [value for _, value in sorted((json.loads(line) for line in lines if line), key=lambda pair: pair[0])]


@contextmanager
def processes() -> Iterator[Processes]:
    """Give the processes that ``torchrun`` started, in touch with each other while the block lasts; else one alone.

    They talk by gloo, on CPUs: it is a few words at the start and the end.

    Example:
        >>> with processes() as alone:
        ...     print(alone, alone.gather({1: "b", 0: "a"}))
        Processes(rank=0, size=1) ['a', 'b']
    """
    if not all(name in os.environ for name in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield Processes(0, 1)
        return
    dist.init_process_group("gloo", timeout=_LONGEST)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
