"""The slices of a derived DICOM series, and the source slices that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from miar_monai.data.dicom_grid import LPS_TO_RAS, fit_grid, in_plane_axes
from miar_monai.data.dicom_headers import numbers
from miar_monai.data.geometry import plane_distance
from miar_monai.data.grid import Grid

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["DerivedSlice", "derived_slices", "whole_number"]

_TOLERANCE = 0.01  # of the distance between slices


class DerivedSlice(NamedTuple):
    """A slice of a derived series.

    Attributes:
        nearest: index of the nearest source slice.
        sources: indices of the two source slices that it lies between, or of the only one at its position.
        number: InstanceNumber.
        location: SliceLocation in millimeters, or None if it is unknown.
        is_new: whether the slices of the series are others than those of the source.
    """

    nearest: int
    sources: tuple[int, ...]
    number: int
    location: float | None
    is_new: bool


def derived_slices(grid: Grid, headers: Sequence[Dataset]) -> list[DerivedSlice]:
    """Return the slices of a derived series along the third axis of a grid.

    Slices at the positions of source slices, and as far apart, keep their numbers. New ones are numbered from 1, in the
    direction of the source; their locations are on the line through those of the source.

    Args:
        grid: of the derived series.
        headers: of the source slices, in order along their normal.

    Returns:
        The slices in the order of the grid.

    Example:
        >>> from pydicom import Dataset
        >>> headers = [Dataset() for _ in range(3)]
        >>> for k, header in enumerate(headers):
        ...     header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ...     header.ImagePositionPatient = [0, 0, 5 * k]
        >>> source = Grid((8, 8, 3), LPS_TO_RAS @ np.diag([1.0, 1, 5, 1]))
        >>> [one.sources for one in derived_slices(source.resized((1, 1, 0.5)), headers)]
        [(0,), (0, 1), (0, 1), (1, 2), (1, 2), (2,)]
    """
    positions, distance = _in_source_slices(grid, headers)
    last = len(headers) - 1
    nearest = np.ceil(positions - 0.5).clip(0, last).astype(int)
    offsets, ratio = np.abs(positions - nearest), plane_distance(grid.affine, 2) / distance
    is_new = bool(offsets.max() > _TOLERANCE or abs(ratio - 1) > _TOLERANCE)
    numbers_ = _new_numbers(len(positions), headers) if is_new else _own_numbers(headers, nearest)
    locations = _locations(positions, headers)
    slices = []
    for k, (position, index) in enumerate(zip(positions.tolist(), nearest.tolist(), strict=True)):
        below = int(np.floor(position))
        between = {index} if offsets[k] <= _TOLERANCE else {min(max(i, 0), last) for i in (below, below + 1)}
        slices.append(DerivedSlice(index, tuple(sorted(between)), numbers_[k], locations[k], is_new))
    return slices


def whole_number(header: Dataset, name: str) -> int | None:
    """Return the value of an integer string, or None if it is missing or invalid."""
    found = numbers(header, name)
    return int(found[0]) if len(found) == 1 and -(2**31) <= found[0] < 2**31 and found[0] % 1 == 0 else None


def _in_source_slices(grid: Grid, headers: Sequence[Dataset]) -> tuple[np.ndarray, float]:
    """Return the positions of the slices of a grid in slices of the source, (Z,), and the distance of the latter."""
    normal = np.cross(*in_plane_axes(np.reshape(numbers(headers[0], "ImageOrientationPatient"), (2, 3))))
    places = np.array([numbers(header, "ImagePositionPatient") for header in headers])
    if len(headers) > 1:
        origin, step = fit_grid(places)
    else:
        origin, step = places[0], normal * numbers(headers[0], "SliceThickness")[0]
    voxels = np.zeros((grid.shape[2], 3))
    voxels[:, 2] = np.arange(grid.shape[2])
    distance = float(step @ normal)
    return (apply_affine(LPS_TO_RAS @ grid.affine, voxels) - origin) @ normal / distance, distance


def _own_numbers(headers: Sequence[Dataset], nearest: np.ndarray) -> list[int]:
    """Return the numbers of the nearest source slices; one without a number has that of its position, from 1."""
    found = [whole_number(header, "InstanceNumber") for header in headers]
    numbered = [i + 1 if number is None else number for i, number in enumerate(found)]
    return [numbered[i] for i in nearest]


def _new_numbers(count: int, headers: Sequence[Dataset]) -> list[int]:
    """Return the numbers from 1 to ``count``, descending if those of the source are."""
    ends = [whole_number(headers[i], "InstanceNumber") for i in (0, -1)]
    is_descending = None not in ends and ends[0] > ends[1]  # type: ignore[operator]
    return list(range(count, 0, -1) if is_descending else range(1, count + 1))


def _locations(positions: np.ndarray, headers: Sequence[Dataset]) -> list[float | None]:
    """Return the SliceLocations at positions, on the line through the first and the last one of the source."""
    ends = [numbers(headers[i], "SliceLocation") for i in (0, -1)]
    if len(headers) == 1 or any(len(found) != 1 for found in ends):
        return [None] * len(positions)
    (first,), (last,) = ends
    return [float(mm) for mm in first + positions * (last - first) / (len(headers) - 1)]
