"""The voxels that a user asks for: how many times finer, of which spacing, or isotropic."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, prod
from numbers import Real
from typing import Any, NamedTuple

from miar_monai.data.checks import MAX_VOXELS
from miar_monai.data.grid import Grid
from miar_monai.data.volume import VOXEL_BYTES
from miar_monai.errors import SettingError

__all__ = ["MAX_FACTOR", "PATIENT_AXES", "GridRequest", "axis_values"]

PATIENT_AXES = ("left-right", "posterior-anterior", "inferior-superior")
"""Names of the axes of RAS+."""

MAX_FACTOR = 8.0
"""The largest factor along an axis."""

_ROUNDING = 1e-5  # relative error of spacings in headers, which store single precision or a few decimals
_MAX_RESULT = 16 * MAX_VOXELS

AxisValues = tuple[float, float, float]


def axis_values(name: str, value: Any) -> tuple[float, ...] | None:
    """Return one positive number for all patient axes, or three: left-right, posterior-anterior, inferior-superior.

    Args:
        name: of the setting.
        value: a number, a sequence of numbers, text such as ``"1,1,5"``, or None.

    Raises:
        SettingError: if it is none of these.

    Example:
        >>> axis_values("factor", 2), axis_values("factor", "1,1,5")
        ((2.0,), (1.0, 1.0, 5.0))
    """
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, Sequence) else [parts]
    try:
        numbers = tuple(float(part) for part in parts if isinstance(part, str | Real) and not isinstance(part, bool))
    except ValueError:
        numbers = ()
    fits = len(numbers) == len(parts) in (1, 3) and all(number > 0 and isfinite(number) for number in numbers)
    if not fits:
        raise SettingError(f"{name} {value!r} must be one positive number, or three with commas, such as 1,1,5.")
    return numbers


class GridRequest(NamedTuple):
    """The voxels of a result, as a user asks for them: by one of three settings, or by none.

    Example:
        >>> import numpy as np
        >>> thick = Grid((200, 240, 30), np.diag([1.0, 1, 5, 1]))
        >>> GridRequest.of(isotropic=True).factors(thick)
        (1.0, 1.0, 5.0)
        >>> GridRequest.of(spacing="0.5,0.5,2").factors(thick)
        (2.0, 2.0, 2.5)
    """

    factor: tuple[float, ...] | None = None
    """How many times finer the patient axes become, one number or three."""
    spacing: tuple[float, ...] | None = None
    """Distance of the new voxels along the patient axes in millimeters, one number or three."""
    isotropic: bool = False
    """Whether all axes get the smallest spacing of the input."""

    @classmethod
    def of(cls, factor: Any = None, spacing: Any = None, isotropic: bool = False) -> GridRequest:
        """Return the request of three settings; for their types see `axis_values`.

        Raises:
            SettingError: if more than one of them is given, or a value cannot be used.
        """
        given = {"factor": factor is not None, "spacing": spacing is not None, "isotropic": bool(isotropic)}
        names = [name for name, is_given in given.items() if is_given]
        if len(names) > 1:
            raise SettingError(
                f"{', '.join(names[:-1])} and {names[-1]} are given, but only one of factor, spacing and isotropic is"
                f" possible; leave {'one' if len(names) == 2 else 'two'} out."
            )
        request = cls(axis_values("factor", factor), axis_values("spacing", spacing), bool(isotropic))
        if request.factor:
            _check_factors(request.factor)
        return request

    @property
    def is_default(self) -> bool:
        """Whether nothing is asked for."""
        return self == GridRequest()

    def factors(self, grid: Grid, default: Sequence[float] = (4, 4, 1)) -> AxisValues:
        """Return how many times finer each patient axis becomes, at least 1.

        Args:
            grid: that of the input.
            default: factors of the patient axes if nothing is asked for.

        Raises:
            SettingError: if an axis would become coarser, or more than `MAX_FACTOR` times finer; if no axis changes; or
                if the result would be too large.
        """
        spacing, wanted = grid.patient_spacing, self.spacing and _three(self.spacing)
        if self.isotropic:
            wanted = (min(spacing),) * 3
        if wanted is None:
            a, b, c = (old / factor for old, factor in zip(spacing, _three(self.factor or default), strict=True))
            wanted = a, b, c
        x, y, z = (_factor(*axis) for axis in zip(PATIENT_AXES, spacing, wanted, strict=True))
        if x == y == z == 1:
            raise SettingError(
                f"the voxels would keep their size, {' x '.join(f'{size:.4g}' for size in grid.patient_spacing)} mm;"
                " ask for a factor above 1, or for a spacing below that of the input."
            )
        if (size := prod(grid.shape) * x * y * z) > _MAX_RESULT:
            raise SettingError(
                f"the result would have {size:.2g} voxels, in at least {VOXEL_BYTES * size / 2**30:.1f} GiB of memory,"
                f" but at most {_MAX_RESULT:.2g} voxels are possible; ask for larger ones, or cut the volume into"
                " parts."
            )
        return x, y, z


def _three(values: Sequence[float]) -> AxisValues:
    x, y, z = tuple(values) * (3 if len(values) == 1 else 1)
    return x, y, z


def _factor(name: str, spacing: float, wanted: float) -> float:
    """Return the factor of an axis, without the rounding of headers where it is a whole number."""
    factor = spacing / wanted
    if abs(factor - round(factor)) <= _ROUNDING * factor:
        factor = float(round(factor))
    if factor < 1:
        raise SettingError(
            f"the {name} axis has voxels {spacing:.6g} mm apart, but {wanted:.6g} mm is asked for: only finer voxels"
            " are possible; give a spacing of at most that of the input."
        )
    if factor > MAX_FACTOR:
        raise SettingError(
            f"the {name} axis would become {factor:.4g} times finer, from {spacing:.6g} to {wanted:.6g} mm, but at most"
            f" {MAX_FACTOR:g} times is possible; give a spacing of at least {spacing / MAX_FACTOR:.6g} mm there."
        )
    return factor


def _check_factors(factors: Sequence[float]) -> None:
    for factor in factors:
        if not 1 <= factor <= MAX_FACTOR:
            raise SettingError(
                f"factor is {factor:g}, but it must lie between 1 and {MAX_FACTOR:g}; correct the setting."
            )
