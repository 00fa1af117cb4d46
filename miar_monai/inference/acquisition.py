"""The slices as the scanner acquired them: thickness, spacing and gap, and the slice profile that is assumed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from miar_monai.data.geometry import plane_distance
from miar_monai.data.grid import Grid
from miar_monai.data.volume import Volume
from miar_monai.errors import SettingError
from miar_monai.transforms.metatensor import acquired_slices, grid_of, image_name

__all__ = ["SLICE_PROFILES", "Acquisition"]

_NAMES = {"slr": "SLR", "gaussian": "Gaussian", "box": "box"}
SLICE_PROFILES = tuple(_NAMES)
"""Those of `miar_monai.degradation.axis.PROFILES` that a slice can have.

The first is the default, that of selective pulses in MRI. Where it is wrong, results are nearer to the truth than with
a wrong Gaussian, whose inverse amplifies more.
"""

_MIN_RATIO, _MAX_RATIO = 0.05, 3.0  # of thickness and spacing; slices of CT overlap by up to two thirds
_EQUAL = 0.01  # relative difference of thickness and spacing that is no gap


@dataclass(frozen=True)
class Acquisition:
    """How the slices of a volume were acquired. The thickness of a slice is not its distance from the next one.

    Args:
        axis: the patient axis across the slices: 0 left-right, 1 posterior-anterior, 2 inferior-superior.
        spacing: distance of adjacent slices along their normal in millimeters.
        thickness: full width at half maximum of the slice profile in millimeters.
        profile: the assumed slice profile, one of `SLICE_PROFILES`.
        doubt: why the thickness is assumed to be the spacing, or empty if it is known.

    Example:
        >>> print(Acquisition(2, 6.0, 5.0))
        slices 5 mm thick, 6 mm apart (gap 1 mm), SLR profile assumed
        >>> Acquisition(2, 2.0, 2.5).widths
        (1.0, 1.0, 1.25)
    """

    axis: int
    spacing: float
    thickness: float
    profile: str = SLICE_PROFILES[0]
    doubt: str = ""

    @classmethod
    def of(cls, volume: Volume, thickness: float | None = None, profile: str = SLICE_PROFILES[0]) -> Acquisition:
        """Return the acquisition of a volume.

        A thickness that the file does not state, or that is impossible, is taken as the spacing. The slices lie across
        the third voxel axis of a DICOM series. Other formats do not say: it is the axis across a single slice,
        otherwise that of the largest spacing, and the inferior-superior one if spacings are equal.

        Args:
            volume: just read.
            thickness: in millimeters, in place of that of the file; from 0.05 to 3 times the spacing.
            profile: the slice profile to assume, one of `SLICE_PROFILES`.

        Raises:
            SettingError: if ``thickness`` is impossible.

        Example:
            >>> import numpy as np
            >>> from pathlib import Path
            >>> array = np.zeros((9, 9, 4), np.float32)
            >>> volume = Volume(array, np.diag([1.0, 1, 4, 1]), np.dtype("int16"), Path("scan.nii"))
            >>> print(Acquisition.of(volume, thickness=3.0))
            slices 3 mm thick, 4 mm apart (gap 1 mm), SLR profile assumed
            >>> Acquisition.of(volume).thickness
            4.0
        """
        return cls._of(volume.grid, volume.slice_axis, volume.slice_thickness, thickness, profile, str(volume.path))

    @classmethod
    def of_image(cls, image: Tensor, thickness: float | None = None, profile: str = SLICE_PROFILES[0]) -> Acquisition:
        """Return the acquisition of a volume (1, X, Y, Z) in any orientation; without metadata, its axes are RAS+."""
        slices = acquired_slices(image)
        axis = None if slices.axis is None else grid_of(image).patient_axes.index(slices.axis)
        return cls._of(grid_of(image), axis, slices.thickness, thickness, profile, image_name(image))

    @classmethod
    def _of(
        cls, grid: Grid, axis: int | None, stated: float | None, thickness: float | None, profile: str, name: str
    ) -> Acquisition:
        voxel_axis = _slice_axis(grid) if axis is None else axis
        patient_axis, spacing = grid.patient_axes[voxel_axis], plane_distance(grid.affine, voxel_axis)
        if thickness is not None:
            if not _is_possible(thickness, spacing):
                raise SettingError(
                    f"{name}: a slice thickness of {thickness:g} mm is given, but for slices {spacing:.4g} mm apart it"
                    f" must lie between {_MIN_RATIO * spacing:.3g} and {_MAX_RATIO * spacing:.3g} mm; correct it."
                )
            return cls(patient_axis, spacing, float(thickness), profile)
        if stated is None:
            return cls(patient_axis, spacing, spacing, profile, "the file states none")
        if not _is_possible(stated, spacing):
            return cls(patient_axis, spacing, spacing, profile, f"the {stated:.4g} mm of the file are impossible")
        return cls(patient_axis, spacing, stated, profile)

    @property
    def gap(self) -> float:
        """Distance between the edges of adjacent slices in millimeters; negative if they overlap."""
        return self.spacing - self.thickness

    @property
    def widths(self) -> tuple[float, float, float]:
        """Width of the profile over the spacing along the patient axes: ``thickness`` of a `Degradation`."""
        x, y, z = (self.thickness / self.spacing if axis == self.axis else 1.0 for axis in range(3))
        return x, y, z

    def __str__(self) -> str:
        """Return the description for screen and report."""
        name = _NAMES[self.profile]
        spacing = f"{self.spacing:.3g} mm apart"
        if self.doubt:
            return (
                f"slices {spacing}, taken as {self.thickness:.3g} mm thick since {self.doubt}, {name} profile assumed"
            )
        between = f" ({'gap' if self.gap > 0 else 'overlap'} {abs(self.gap):.2g} mm)"
        between = between if abs(self.gap) > _EQUAL * self.spacing else ""
        return f"slices {self.thickness:.3g} mm thick, {spacing}{between}, {name} profile assumed"


def _is_possible(thickness: float, spacing: float) -> bool:
    return _MIN_RATIO * spacing <= thickness <= (1 + _EQUAL) * _MAX_RATIO * spacing


def _slice_axis(grid: Grid) -> int:
    """Return the voxel axis across a single slice, otherwise that of the largest spacing, the axial one if equal."""
    if 1 in grid.shape:
        return grid.patient_axes.index(grid.normal_axis)
    spacing, axial = grid.spacing, grid.patient_axes.index(2)
    thickest = int(spacing.argmax())
    return thickest if spacing[thickest] > (1 + _EQUAL) * spacing[axial] else axial
