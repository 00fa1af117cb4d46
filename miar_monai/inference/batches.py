"""Many slices, processed in batches that are halved where GPU memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from miar_monai.errors import ImageError

__all__ = ["average", "concatenate", "in_batches", "plain_tensor", "slices_of"]

logger = logging.getLogger(__name__)


def in_batches(
    function: Callable[[slice, int], Tensor],
    length: int,
    batch_size: int,
    set_progress: Callable[[int], None],
    free_memory: Callable[[], None],
) -> Iterator[Tensor]:
    """Yield the results of batches of slices, one after the other, so that memory does not grow with their number.

    Args:
        function: maps a range of slices and the batch size to the results of these slices.
        length: number of slices.
        batch_size: slices of a batch.
        set_progress: called with the number of finished slices.
        free_memory: called before a batch is repeated at half its size.

    Raises:
        ImageError: if GPU memory does not hold a single slice.
    """
    start = 0
    while start < length:
        end = min(start + batch_size, length)
        try:
            results = function(slice(start, end), batch_size)
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
        start = end
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


def average(rows: Tensor, parts: Iterator[Tensor], *_: Any) -> Tensor:
    """Return the mean of rows and the concatenation of tensors, like `concatenate`, in the memory of the rows.

    Args:
        rows: as many as the tensors have together.
        parts: the tensors, one after the other.

    Example:
        >>> average(torch.zeros(3, 2), iter([torch.ones(1, 2), torch.zeros(2, 2)])).tolist()
        [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]
    """
    end = 0
    for part in parts:
        start, end = end, end + len(part)
        rows[start:end].lerp_(part.to(rows.device), 0.5)
    return rows


def plain_tensor(images: Tensor) -> Tensor:
    """Return images without metadata."""
    return images.as_tensor() if isinstance(images, MetaTensor) else images


def slices_of(images: Tensor) -> Tensor:
    """Return slices (B, 1, h, w), or those of volumes (B, 1, h, w, D) along their last axis: (B · D, 1, h, w)."""
    plain = plain_tensor(images)
    return plain if plain.ndim == 4 else plain.movedim(-1, 1).flatten(0, 1)
