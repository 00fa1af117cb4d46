"""Label maps among volumes: a result between two labels is no segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from miar_monai.errors import ImageError

__all__ = ["NEAREST", "LabelLook", "label_look", "refusal_of_labels"]

NEAREST = "values between two labels are no labels: use nearest-neighbor resampling to the grid of the finer image"
"""What is said of labels in all messages."""

_MOST_LABELS = 512
_HIGHEST = 65535


class LabelLook(NamedTuple):
    """How far the voxels of a volume look like labels.

    Attributes:
        is_certain: whether no image of gray values looks so.
        values: the distinct values, sorted.
    """

    is_certain: bool
    values: list[int]


def refusal_of_labels(path: Path, why: str, if_image: str) -> ImageError:
    """Return what is raised where a label map is given.

    Args:
        path: of it.
        why: how it is known as such.
        if_image: what to do if it is an image nonetheless.
    """
    return ImageError(f"{path} is a label map ({why}), and {NEAREST}; if it is an image after all, {if_image}.")


def label_look(array: np.ndarray) -> LabelLook | None:
    """Return whether the voxels may be labels: few whole numbers in flat areas, as noise leaves them nowhere.

    Certain are masks of 0 and 1 (or 255); flat areas of whole numbers up to 4, or up to 10 where most neighbors are
    equal; and areas with many numbers, 30 or more, or half of those up to the highest, that differ from neighbor to
    neighbor as if at random, whereas gray values change little by little. Flat areas of other numbers may be a phantom
    without noise. Measured: a brain in 16 gray values has up to 64 % of equal neighbors, a parcellation at 4 mm 58 %;
    the mean difference between unequal ones is a fifth of the ranks or less there, a third or more here.

    Args:
        array: the voxels, (X, Y, Z).

    Returns:
        None for gray values.

    Example:
        >>> labels = np.kron([[0, 1], [4, 2]], np.ones((8, 8)))[..., None]
        >>> label_look(labels), label_look(250 * labels), label_look(np.arange(64.0).reshape(8, 8, 1))
        (LabelLook(is_certain=True, values=[0, 1, 2, 4]), LabelLook(is_certain=False, values=[0, 250, 500, 1000]), None)
    """
    counts = _counts(array)
    if counts is None:
        return None
    values = np.flatnonzero(counts)
    if set(values.tolist()) in ({0, 1}, {0, 255}):
        return LabelLook(True, values.tolist())
    equal, jump = _neighbors(array, values, int(counts.argmax()))
    count, highest = len(values), values[-1]
    if equal < 0.4 or (count > 5 and 0 < jump < 0.2):
        return None
    is_small = (highest <= 4 and equal >= 0.5) or (highest <= 10 and equal >= 0.8)
    is_numbered = count >= 30 or (count > 10 and 2 * count > highest)
    return LabelLook(bool(is_small or (is_numbered and jump > 0)), values.tolist())


def _counts(array: np.ndarray) -> np.ndarray | None:
    """Return how often the whole numbers from 0 occur, or None if others do, or too many for labels."""
    counts = np.zeros(_HIGHEST + 1, dtype=np.int64)
    for k in range(array.shape[2]):
        plane = array[:, :, k]
        if plane.min() < 0 or plane.max() > _HIGHEST or not np.array_equal(plane, np.rint(plane)):
            return None
        counts += np.bincount(plane.ravel().astype(np.int64), minlength=_HIGHEST + 1)
        if np.count_nonzero(counts) > _MOST_LABELS:
            return None
    return counts


def _neighbors(array: np.ndarray, values: np.ndarray, background: int) -> tuple[float, float]:
    """Return two numbers about voxels side by side in the planes of the first two axes.

    Returns:
        The share of equal ones among those that are not both background, and the mean difference of the unequal ones,
        neither of which is background, in ranks of the values, relative to their number.
    """
    ranks = np.searchsorted(values, np.arange(_HIGHEST + 1)).astype(np.int32)
    pairs = equal = apart = 0
    steps = 0.0
    for k in range(array.shape[2]):
        plane = array[:, :, k].astype(np.int32)
        for one, other in ((plane[1:], plane[:-1]), (plane[:, 1:], plane[:, :-1])):
            same, inside = one == other, (one != background) & (other != background)
            pairs += int(np.count_nonzero(~same | inside))
            equal += int(np.count_nonzero(same & inside))
            unlike = ~same & inside
            apart += int(np.count_nonzero(unlike))
            steps += float(np.abs(ranks[one[unlike]] - ranks[other[unlike]]).sum())
    return equal / max(pairs, 1), steps / max(apart, 1) / len(values)
