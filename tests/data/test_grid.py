"""Grids of another spacing: exact spacing, the same center, the same field of view."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.affines import upscaled_affine
from hypothesis import given
from hypothesis import strategies as st
from nibabel.eulerangles import euler2mat

from miar_monai.data.geometry import fov_corners
from miar_monai.data.grid import Grid


def affine(order: tuple[int, int, int], flips: tuple[int, int, int], angles: tuple[float, ...]) -> np.ndarray:
    """Return an oblique affine whose voxel axes are permuted and flipped patient axes."""
    result = np.eye(4)
    axes = np.eye(3)[:, list(order)] * np.asarray(flips) * np.array([0.7, 1.1, 3.0])
    result[:3, :3] = euler2mat(*angles) @ axes
    result[:3, 3] = -31.5, 12.25, 400
    return result


def center(grid: Grid) -> np.ndarray:
    return grid.affine[:3, :3] @ (np.asarray(grid.shape) - 1) / 2 + grid.affine[:3, 3]


@given(
    order=st.permutations((0, 1, 2)).map(tuple),
    flips=st.tuples(*[st.sampled_from((-1, 1))] * 3),
    angles=st.tuples(*[st.floats(-0.3, 0.3)] * 3),
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    factors=st.tuples(*[st.floats(0.125, 8)] * 3),
)
def test_the_spacing_is_exact_and_the_center_stays(order, flips, angles, shape, factors) -> None:  # type: ignore[no-untyped-def]
    grid = Grid(shape, affine(order, flips, angles))
    other = grid.resized(factors)
    np.testing.assert_allclose(other.spacing, grid.spacing * factors, rtol=1e-9)
    np.testing.assert_allclose(center(other), center(grid), atol=1e-6)
    assert grid.patient_axes == order
    extent, other_extent = (np.asarray(one.shape) * one.spacing for one in (grid, other))
    several = np.asarray(other.shape) > 1
    assert (np.abs(extent - other_extent)[several] <= 0.5 * other.spacing[several] + 1e-6).all()


@pytest.mark.parametrize("factors", [(4, 4, 1), (1, 1, 5), (2, 0.5, 1)])
def test_whole_factors_keep_the_field_of_view(factors: tuple[float, ...]) -> None:
    grid = Grid((40, 24, 30), affine((2, 0, 1), (1, -1, 1), (0.1, -0.2, 0.05)))
    other = grid.resized(factors)
    np.testing.assert_allclose(fov_corners(other.affine, other.shape), fov_corners(grid.affine, grid.shape), atol=1e-6)
    np.testing.assert_allclose(other.affine, upscaled_affine(grid.affine, [1 / factor for factor in factors]))


def test_values_of_patient_axes_are_put_in_the_order_of_voxel_axes() -> None:
    grid = Grid((4, 5, 6), affine((2, 0, 1), (1, 1, -1), (0.1, 0.1, 0.0)))
    assert grid.by_voxel_axis((1, 2, 3)) == (3, 1, 2)
    assert grid.by_voxel_axis((5,)) == (5, 5, 5)
    assert grid.by_voxel_axis(grid.patient_spacing) == tuple(grid.spacing)
