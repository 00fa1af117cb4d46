"""Many slices, processed in batches that are halved where GPU memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from miar_monai.errors import ImageError

__all__ = ["concatenate", "in_batches"]

logger = logging.getLogger(__name__)


def in_batches(
    function: Callable[[Tensor, int], Tensor],
    slices: Tensor,
    batch_size: int,
    set_progress: Callable[[int], None],
    free_memory: Callable[[], None],
) -> Iterator[Tensor]:
    """Yield the results of batches of slices, one after the other, so that memory does not grow with their number.

    Args:
        function: maps a batch of slices and the batch size to their results.
        slices: (N, 1, h, w).
        batch_size: slices of a batch.
        set_progress: called with the number of finished slices.
        free_memory: called before a batch is repeated at half its size.

    Raises:
        ImageError: if GPU memory does not hold a single slice.
    """
    start = 0
    while start < len(slices):
        batch = slices[start : start + batch_size]
        try:
            results = function(batch, batch_size)
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise ImageError(
                    "the GPU is out of memory for a single slice of this size; use a GPU with more memory or the CPU,"
                    " or close other programs that use the GPU."
                ) from error
            free_memory()
            batch_size //= 2
            set_progress(start)
            logger.warning(
                "out of GPU memory: continuing with batches of %d instead of %d.", batch_size, 2 * batch_size
            )
            continue
        yield results
        start += len(batch)
        set_progress(start)


def concatenate(parts: Iterator[Tensor], length: int, device: torch.device) -> Tensor:
    """Return the concatenation of tensors, ``length`` rows on a device, without holding their data twice."""
    first = next(parts)
    result = torch.empty(length, *first.shape[1:], dtype=first.dtype, device=device)
    end = 0
    for part in chain([first], parts):
        start, end = end, end + len(part)
        result[start:end] = part
    return result
