"""Grids of volumes: numbers of voxels and affine, and grids of another spacing over the same field of view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation

__all__ = ["Grid", "resized_size"]


def resized_size(size: int, factor: float) -> int:
    """Return the number of voxels of a line whose voxels become ``factor`` times as large, rounded, at least 1.

    Example:
        >>> resized_size(30, 5), resized_size(61, 1 / 2.5)
        (6, 152)
    """
    return max(round(size / factor), 1)


class Grid(NamedTuple):
    """The voxel grid of a volume.

    Patient axes are left-right, posterior-anterior and inferior-superior. Each voxel axis belongs to the patient axis
    that it is closest to.

    Example:
        >>> coarse = Grid((60, 60, 30), np.diag([1.0, 1, 1, 1])).resized((1, 1, 2.5))
        >>> coarse.shape, coarse.spacing.tolist(), coarse.affine[2, 3].item()
        ((60, 60, 12), [1.0, 1.0, 2.5], 0.75)
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    """Voxel indices to millimeters in RAS+, (4, 4), float64."""

    @property
    def spacing(self) -> np.ndarray:
        """Distance of the voxels along each voxel axis in millimeters, (3,)."""
        return np.asarray(voxel_sizes(self.affine))

    @property
    def patient_axes(self) -> tuple[int, int, int]:
        """The patient axis of each voxel axis."""
        x, y, z = io_orientation(self.affine)[:, 0].astype(int)
        return int(x), int(y), int(z)

    @property
    def patient_spacing(self) -> tuple[float, float, float]:
        """Distance of the voxels along each patient axis in millimeters."""
        x, y, z = (float(self.spacing[self.patient_axes.index(axis)]) for axis in range(3))
        return x, y, z

    @property
    def normal_axis(self) -> int:
        """The patient axis across the plane that becomes finer by default: the axial plane, or that of a single slice.

        Example:
            >>> Grid((1, 60, 50), np.eye(4)).normal_axis, Grid((2, 60, 50), np.eye(4)).normal_axis
            (0, 2)
        """
        flat = [axis for axis, size in zip(self.patient_axes, self.shape, strict=True) if size == 1]
        return flat[0] if len(flat) == 1 else 2

    def by_voxel_axis(self, values: Sequence[float]) -> tuple[float, float, float]:
        """Return values of the patient axes, one or three, in the order of the voxel axes."""
        three = tuple(values) * (3 if len(values) == 1 else 1)
        x, y, z = (three[axis] for axis in self.patient_axes)
        return x, y, z

    def resized(self, factors: Sequence[float]) -> Grid:
        """Return the grid whose voxels are ``factors`` times as large, with the same center.

        The spacing is exact. Where the number of voxels is not a multiple of the factor, it is rounded, and the field
        of view differs by at most a quarter of a new voxel on each side.

        Args:
            factors: for each voxel axis, above 0; below 1 the grid becomes finer.
        """
        steps = np.asarray(factors, dtype=np.float64)
        shape = np.array([resized_size(size, step) for size, step in zip(self.shape, steps.tolist(), strict=True)])
        transform = np.diag([*steps, 1.0])
        transform[:3, 3] = (np.asarray(self.shape) - 1) / 2 - steps * (shape - 1) / 2
        width, height, depth = shape.tolist()
        return Grid((width, height, depth), np.asarray(self.affine, dtype=np.float64) @ transform)
