"""Positions of voxels in millimeters: pure NumPy functions of affines.

An affine maps voxel indices to millimeters in RAS+ (NIfTI's patient axes). Integer indices are voxel *centers*, so
the field of view of a line of n voxels extends from index -0.5 to n - 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import io_orientation
from scipy.linalg import polar

from miar_monai.errors import GeometryError

__all__ = ["axial_axis", "corner_distance", "fov_corners", "is_singular", "nearest_rotation", "plane_distance"]


def is_singular(affine: np.ndarray) -> bool:
    """Return whether an affine is singular or not finite.

    Args:
        affine: voxel indices to millimeters, (4, 4).

    Returns:
        True if an entry is not finite, a voxel axis has length 0, or the three axes lie in a plane.

    Example:
        >>> is_singular(np.diag([1.0, 1, 0, 1]))
        True
    """
    if not np.isfinite(affine).all():
        return True
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    return bool(abs(np.linalg.det(axes)) <= 1e-6 * voxel_sizes(affine).prod())


def fov_corners(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the corners of the field of view: outer corners of voxels, not centers.

    Args:
        affine: voxel indices to millimeters, (4, 4).
        shape: number of voxels along each axis, (3,).

    Returns:
        The corners in millimeters, (8, 3), float64; the last voxel axis varies fastest.

    Example:
        >>> fov_corners(np.diag([2.0, 1, 1, 1]), (10, 1, 1))[[0, -1]]
        array([[-1. , -0.5, -0.5],
               [19. ,  0.5,  0.5]])
    """
    ends = np.stack([np.full(3, -0.5), np.asarray(shape) - 0.5], axis=1)
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(8, 3)
    return np.asarray(apply_affine(affine, corners))


def corner_distance(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Return the largest distance between corresponding corners of the field of view under two affines.

    Args:
        affine: voxel indices to millimeters, (4, 4).
        other: likewise.
        shape: number of voxels along each axis, (3,).

    Returns:
        Millimeters.

    Example:
        >>> corner_distance(np.eye(4), np.diag([1.0, 1, 2, 1]), (10, 10, 10))
        9.5
    """
    return float(np.linalg.norm(fov_corners(affine, shape) - fov_corners(other, shape), axis=1).max())


def plane_distance(affine: np.ndarray, axis: int) -> float:
    """Return the distance of adjacent voxel planes, along their normal.

    It is smaller than the spacing of the voxels along the axis if the affine is sheared, as with a tilted gantry.

    Args:
        affine: voxel indices to millimeters, (4, 4), not singular.
        axis: the voxel axis across the planes.

    Returns:
        Millimeters.

    Example:
        >>> tilted = np.array([[1.0, 0, 0, 0], [0, 1, 3, 0], [0, 0, 4, 0], [0, 0, 0, 1]])
        >>> round(plane_distance(tilted, 2), 6), round(voxel_sizes(tilted)[2].item(), 6)
        (4.0, 5.0)
    """
    # the index along the axis is a linear function of the position, and this row of the inverse is its gradient
    return float(1 / np.linalg.norm(np.linalg.inv(np.asarray(affine, dtype=np.float64)[:3, :3])[axis]))


def nearest_rotation(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the nearest affine without shear: a rotation (or reflection) and zooms.

    Voxel sizes and the center of the volume stay. The rotation is that of the polar decomposition.

    Args:
        affine: voxel indices to millimeters, (4, 4), not singular.
        shape: number of voxels along each axis, (3,).

    Returns:
        The affine without shear, (4, 4), float64.

    Example:
        >>> sheared = np.array([[2.0, 0, 0, 0], [0, 2, 0.3, 0], [0, 0, 0.4, 0], [0, 0, 0, 1]])
        >>> turned = nearest_rotation(sheared, (5, 5, 5))
        >>> voxel_sizes(turned).round(6), abs(turned[:, 1] @ turned[:, 2]) < 1e-9
        (array([2. , 2. , 0.5]), np.True_)
    """
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    zooms = voxel_sizes(affine)
    turned = np.eye(4)
    turned[:3, :3] = polar(axes / zooms)[0] * zooms
    center = (np.asarray(shape) - 1) / 2
    turned[:3, 3] = affine[:3, 3] + (axes - turned[:3, :3]) @ center
    return turned


def axial_axis(affine: np.ndarray) -> int:
    """Return the voxel axis closest to the inferior-superior direction of the patient, as assigned by nibabel.

    Args:
        affine: voxel indices to millimeters, (4, 4).

    Returns:
        0, 1 or 2.

    Raises:
        GeometryError: if ``affine`` is singular.

    Example:
        >>> sagittal = np.array([[0.0, 0, 2, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
        >>> axial_axis(sagittal)
        1
    """
    if is_singular(affine):
        raise GeometryError(
            f"the affine {np.asarray(affine).tolist()} is singular, so no axis is the axial one; "
            "an invertible affine is needed: correct the image header."
        )
    return int(np.flatnonzero(io_orientation(affine)[:, 0] == 2)[0])
