"""The passes of super-resolution through a volume: which planes, with which degradation, in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from miar_monai.data.grid import Grid
from miar_monai.data.spectrum import PLANES
from miar_monai.degradation import Degradation, operators

__all__ = ["THICK", "Pass", "Plan", "plan_passes", "slice_axis"]

Plane = tuple[int, int]

THICK = 1.5
"""Slices are thick if their distance is more than this many times the distance of the pixels."""

_PLANES: dict[Plane, str] = {
    (min(within), max(within)): name for name, within in ((name, {0, 1, 2} - {axis}) for name, axis in PLANES.items())
}
_BATCH_SIZE = 16  # slices that are degraded at once


class Pass(NamedTuple):
    """Super-resolution of the slices of one plane."""

    plane: Plane
    """The patient axes of the rows and columns of the slices."""
    degradation: Degradation
    """The assumed degradation of the slices."""

    @property
    def name(self) -> str:
        """Name of the plane."""
        return _PLANES[self.plane]


class Plan(NamedTuple):
    """The passes for a volume, and the grid of its result."""

    factors: tuple[float, float, float]
    """How many times finer each patient axis becomes."""
    stages: tuple[tuple[Pass, ...], ...]
    """Successive stages; the results of the passes of a stage are averaged."""

    def degraded(self, volume: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return a result after all assumed degradations, which is the input if the two are consistent.

        Args:
            volume: the result, (X, Y, Z), in any voxel axes.
            grids: from `grids`, for the grid of the input in the same voxel axes.
        """
        for stage, coarse, fine in reversed(list(zip(self.stages, grids, grids[1:], strict=False))):
            volume = _degraded(volume, stage[0], coarse, fine)
        return volume

    def grids(self, grid: Grid) -> list[Grid]:
        """Return the grids of the input and of the results of all stages."""
        result = [grid]
        for stage in self.stages:
            factors = [1.0, 1.0, 1.0]
            for axis, scale in zip(stage[0].plane, stage[0].degradation.scales, strict=True):
                factors[axis] = scale
            result.append(result[-1].resized([1 / factor for factor in grid.by_voxel_axis(factors)]))
        return result


def slice_axis(spacing: Sequence[float]) -> int:
    """Return the patient axis across the slices: the one with the largest spacing, if equal the last.

    Args:
        spacing: distance of the voxels along the patient axes, (3,).

    Example:
        >>> slice_axis((1, 1, 5)), slice_axis((5, 1, 1)), slice_axis((1, 1, 1))
        (2, 0, 2)
    """
    sizes = np.asarray(spacing, dtype=np.float64)
    return int(np.flatnonzero(sizes >= 0.99 * sizes.max())[-1])  # axes of an oblique volume differ by rounding


def plan_passes(
    factors: Sequence[float],
    spacing: Sequence[float],
    in_plane: Callable[[Plane], Degradation],
    slice_thickness: float | None = None,
    slice_profile: str = "gaussian",
) -> Plan:
    """Return the passes that make the axes of a volume finer.

    - One axis is made finer in both families of planes that contain it, such as sagittal and coronal slices for the
      inferior-superior axis. Their results are averaged: each is consistent with the input, and so is their mean.
    - Two axes are made finer together, in the plane that they span.
    - Three axes need two stages: first the one with the largest spacing as a single axis, then the other two in their
      plane, on the new slices.

    An axis across slices is degraded by the profile of the slices. This is an axis that is made finer by itself, or one
    of two whose spacing is more than `THICK` times the median: a series of thick sagittal or coronal slices. All other
    axes are degraded as in the plane of the slices: bicubic and by a blur. Axes that stay have the identity.

    Args:
        factors: how many times finer the patient axes become, (3,), at least 1, one of them above.
        spacing: distance of the voxels along the patient axes in millimeters, (3,).
        in_plane: returns the degradation within the slices of a plane, whose scale is ignored.
        slice_thickness: full width at half maximum of the slice profile in millimeters; the spacing by default.
        slice_profile: one of `miar_monai.degradation.axis.PROFILES`.

    Example:
        >>> def in_plane(plane):
        ...     return Degradation(sigma=0.5)
        >>> for stage in plan_passes((4, 4, 5), (0.8, 0.8, 5), in_plane).stages:
        ...     print([(one.name, one.degradation.scale) for one in stage])
        [('coronal', (1.0, 5.0)), ('sagittal', (1.0, 5.0))]
        [('axial', (4.0, 4.0))]
    """
    x, y, z = (float(factor) for factor in factors)
    finer, across = [axis for axis, factor in enumerate((x, y, z)) if factor > 1], slice_axis(spacing)
    thick = across in finer and spacing[across] > THICK * float(np.median(spacing))
    steps: list[tuple[list[int], int | None]]  # the axes of a stage, and which of them has the profile of the slices
    if len(finer) == 3:
        steps = [([across], across), ([axis for axis in finer if axis != across], None)]
    elif len(finer) == 2:
        steps = [(finer, across if thick else None)]
    else:
        steps = [(finer, finer[0])]

    def degradation(plane: Plane, axes: Sequence[int], profiled: int | None) -> Degradation:
        measured = in_plane(plane) if {*axes} - {profiled} else Degradation(1, 0)
        described = list(measured.axes((1, 1), (1, 1)))
        for i, axis in enumerate(plane):
            if axis == profiled:
                width = slice_thickness / spacing[axis] if slice_thickness and axis == across else 1.0
                described[i] = replace(described[i], profile=slice_profile, thickness=width, sigma=0.0)
            elif axis not in axes:
                described[i] = replace(described[i], profile="bicubic", thickness=1.0, sigma=0.0)  # the identity
        rows, columns = described
        return Degradation(
            scale=tuple((x, y, z)[axis] if axis in axes else 1.0 for axis in plane),
            sigma=(rows.sigma, columns.sigma),
            blur_on=measured.blur_on,
            profile=(rows.profile, columns.profile),
            thickness=(rows.thickness, columns.thickness),
        )

    stages = tuple(
        tuple(Pass(plane, degradation(plane, axes, profiled)) for plane in _PLANES if {*axes} <= {*plane})
        for axes, profiled in steps
    )
    return Plan((x, y, z), stages)


def _degraded(volume: Tensor, one: Pass, coarse: Grid, fine: Grid) -> Tensor:
    """Degrade the slices of a volume (X, Y, Z) as in a pass."""
    rows, columns = (fine.patient_axes.index(axis) for axis in one.plane)
    hr_shape, lr_shape = ((grid.shape[rows], grid.shape[columns]) for grid in (fine, coarse))
    slices = volume.movedim((rows, columns), (1, 2))  # (N, H, W)
    parts = [operators((one.degradation,), hr_shape, lr_shape, part).A(part) for part in slices.split(_BATCH_SIZE)]
    return torch.cat(parts).movedim((1, 2), (rows, columns))
