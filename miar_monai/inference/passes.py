"""The passes of super-resolution through a volume: which planes, with which degradation, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miar_monai.data.grid import Grid
from miar_monai.data.grid_request import PATIENT_AXES, GridRequest
from miar_monai.data.spectrum import PLANES
from miar_monai.degradation import AxisDegradation, Degradation, operators
from miar_monai.inference.acquisition import Acquisition

__all__ = ["THICK", "Pass", "Plan", "plan_passes"]

Plane = tuple[int, int]
Block = tuple[slice, slice, slice]

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
    spacing: tuple[float, float, float]
    """Distance of the voxels of the input along each patient axis in millimeters."""
    stages: tuple[tuple[Pass, ...], ...]
    """Successive stages; the results of the passes of a stage are averaged."""
    acquisition: Acquisition
    """The slices of the input."""
    request: GridRequest = GridRequest()
    """What the user asked for."""

    @property
    def assumed(self) -> Degradation:
        """The assumed degradation in the last pass; of the only one, if the axial plane becomes finer."""
        return self.stages[-1][-1].degradation

    @property
    def lines(self) -> list[AxisDegradation]:
        """The assumed degradations of rows and columns in all passes, without their sizes."""
        return [line for stage in self.stages for one in stage for line in one.degradation.axes((1, 1), (1, 1))]

    @property
    def blur(self) -> float | None:
        """Standard deviation of the assumed blur in voxels of the input; None if the axes have a slice profile."""
        return max(
            (line.lr_sigma for line in self.lines if line.factor > 1 and line.profile == "bicubic"), default=None
        )

    @property
    def assumes_slice_profile(self) -> bool:
        """Whether the profile and the thickness of the slices affect the result."""
        return any(profile != "bicubic" for stage in self.stages for profile in stage[0].degradation.profiles)

    def sentences(self, hint: str = "isotropic, spacing or factor") -> list[str]:
        """Return what happens to the axes, and what is assumed of the slices if it matters.

        Args:
            hint: the settings by which a user asks for another grid.

        Example:
            >>> axial = plan_passes((4, 4, 1), (0.8, 0.8, 5), lambda plane: Degradation(), Acquisition(2, 5.0, 5.0))
            >>> for part in axial.sentences()[0].replace(";", ",").split(", "): print(part)
            left-right 4 x finer (0.2 mm)
            posterior-anterior 4 x finer (0.2 mm)
            inferior-superior as it is (5 mm)
            thinner slices with isotropic
            spacing or factor
        """
        parts = [
            f"{name} {factor:.4g} x finer ({mm / factor:.4g} mm)" if factor > 1 else f"{name} as it is ({mm:.4g} mm)"
            for name, factor, mm in zip(PATIENT_AXES, self.factors, self.spacing, strict=True)
        ]
        across = self.acquisition.axis
        thick = self.factors[across] == 1 and self.spacing[across] > THICK * float(np.median(self.spacing))
        grid = ", ".join(parts) + (f"; thinner slices with {hint}" if thick else "")
        return [grid, str(self.acquisition)] if self.assumes_slice_profile else [grid]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON: per patient axis, and the settings of the two axes of each pass."""
        passes = [
            {
                "stage": number,
                "plane": one.name,
                "axes": [PATIENT_AXES[axis] for axis in one.plane],
                "factor": list(one.degradation.scales),
                "profile": list(one.degradation.profiles),
                "thickness": [line.thickness for line in one.degradation.axes((1, 1), (1, 1))],
                "blur_voxels": [round(line.lr_sigma, 2) for line in one.degradation.axes((1, 1), (1, 1))],
            }
            for number, stage in enumerate(self.stages, start=1)
            for one in stage
        ]
        return {
            "requested": self.request._asdict(),
            "axes": list(PATIENT_AXES),
            "factor": list(self.factors),
            "spacing_mm": [round(mm / factor, 6) for mm, factor in zip(self.spacing, self.factors, strict=True)],
            "passes": passes,
            "slices": str(self.acquisition) if self.assumes_slice_profile else None,
        }

    def degraded(
        self,
        volume: Tensor,
        grids: Sequence[Grid],
        device: str | torch.device | None = None,
        limits: tuple[float, float] | None = None,
    ) -> Tensor:
        """Return a result after all assumed degradations, which is the input if the two are consistent.

        Args:
            volume: the result, (X, Y, Z), in any voxel axes.
            grids: from `grids`, for the grid of the input in the same voxel axes.
            device: where slices are degraded, in batches; that of the volume by default.
            limits: intensities to which the result is clipped first, or None.
        """
        if not self.stages:
            return volume
        degraded = volume.new_empty(grids[0].shape)
        for block, voxels in self.degraded_blocks(volume, grids, device, limits):
            degraded[block] = voxels.to(degraded)
        return degraded

    def degraded_blocks(
        self,
        volume: Tensor,
        grids: Sequence[Grid],
        device: str | torch.device | None = None,
        limits: tuple[float, float] | None = None,
    ) -> Iterator[tuple[Block, Tensor]]:
        """Yield the blocks of slices of `degraded`, each with its indices, so that they need not be held at once.

        The arguments are those of `degraded`.
        """
        later = self._replace(stages=self.stages[1:])
        degraded = later.degraded(volume, grids[1:], device, limits)
        yield from _degraded_blocks(
            degraded, self.stages[0][0], grids[0], grids[1], device or volume.device, None if later.stages else limits
        )

    def grids(self, grid: Grid) -> list[Grid]:
        """Return the grids of the input and of the results of all stages."""
        result = [grid]
        for stage in self.stages:
            factors = [1.0, 1.0, 1.0]
            for axis, scale in zip(stage[0].plane, stage[0].degradation.scales, strict=True):
                factors[axis] = scale
            result.append(result[-1].resized([1 / factor for factor in grid.by_voxel_axis(factors)]))
        return result


def plan_passes(
    factors: Sequence[float],
    spacing: Sequence[float],
    in_plane: Callable[[Plane], Degradation],
    acquisition: Acquisition,
) -> Plan:
    """Return the passes that make the axes of a volume finer.

    - One axis is made finer in both families of planes that contain it, such as sagittal and coronal slices for the
      inferior-superior axis. Their results are averaged: each is consistent with the input, and so is their mean.
    - Two axes are made finer together, in the plane that they span.
    - Three axes need two stages: first the one across the slices as a single axis, then the other two in their plane,
      on the new slices.

    An axis that is made finer by itself is degraded by the profile of the slices, and so is the axis across the slices
    if their distance is more than `THICK` times the median spacing, as in axial planes through thick sagittal slices.
    All other axes are degraded as in the plane of the slices: bicubic and by a blur. Axes that stay have the identity.

    Args:
        factors: how many times finer the patient axes become, (3,), at least 1, one of them above.
        spacing: distance of the voxels along the patient axes in millimeters, (3,).
        in_plane: returns the degradation within the slices of a plane, whose scale is ignored.
        acquisition: axis, thickness and profile of the slices.

    Example:
        >>> def in_plane(plane):
        ...     return Degradation(sigma=0.5)
        >>> for stage in plan_passes((4, 4, 5), (0.8, 0.8, 5), in_plane, Acquisition(2, 5.0, 4.0)).stages:
        ...     print([(one.name, one.degradation.scale) for one in stage])
        [('sagittal', (1.0, 5.0)), ('coronal', (1.0, 5.0))]
        [('axial', (4.0, 4.0))]
    """
    x, y, z = (float(factor) for factor in factors)
    finer, across = [axis for axis, factor in enumerate((x, y, z)) if factor > 1], acquisition.axis
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
                profile, width = acquisition.profile, acquisition.widths[axis]
                described[i] = replace(described[i], profile=profile, thickness=width, sigma=0.0)
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
    a, b, c = (float(mm) for mm in spacing)
    return Plan((x, y, z), (a, b, c), stages, acquisition)


def _degraded_blocks(
    volume: Tensor,
    one: Pass,
    coarse: Grid,
    fine: Grid,
    device: str | torch.device,
    limits: tuple[float, float] | None,
) -> Iterator[tuple[Block, Tensor]]:
    """Yield the slices of a volume (X, Y, Z), degraded as in a pass, a batch at a time, with their indices."""
    axes = [fine.patient_axes.index(axis) for axis in one.plane]
    (across,) = {0, 1, 2} - {*axes}
    hr_shape, lr_shape = ((grid.shape[axes[0]], grid.shape[axes[1]]) for grid in (fine, coarse))
    for start in range(0, coarse.shape[across], _BATCH_SIZE):
        x, y, z = (slice(start, start + _BATCH_SIZE) if axis == across else slice(None) for axis in range(3))
        slices = volume[x, y, z].to(device).movedim(axes, (1, 2))  # (N, H, W)
        hr = slices if limits is None else slices.clamp(*limits)
        lr = operators((one.degradation,), hr_shape, lr_shape, hr).A(hr)  # (N, h, w)
        yield (x, y, z), lr.movedim((1, 2), axes)
