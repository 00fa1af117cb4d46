from __future__ import annotations

import numpy as np
import pytest
from helpers.affines import upscaled_affine
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms.utils import scale_affine

from miar_monai.data.geometry import axial_axis, fov_corners, is_singular
from miar_monai.errors import GeometryError


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Rotated, flipped, anisotropic and sheared affines."""
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    rotation = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    shear = np.eye(3) + draw(st.sampled_from([0.0, 0.3])) * np.triu(generator.normal(size=(3, 3)), 1)
    affine = np.eye(4)
    affine[:3, :3] = rotation @ shear @ np.diag(generator.uniform(0.3, 5, 3))
    affine[:3, 3] = generator.uniform(-200, 200, 3)
    return affine


@settings(max_examples=30, deadline=None, derandomize=True)
@given(affines(), st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 3))
def test_scaling_by_monai_preserves_the_field_of_view(
    affine: np.ndarray, shape: tuple[int, ...], factors: tuple[int, ...]
) -> None:
    finer = np.multiply(shape, factors)
    scaling = scale_affine(shape, finer.tolist())
    np.testing.assert_allclose(fov_corners(affine @ scaling, finer), fov_corners(affine, shape), atol=1e-9)
    np.testing.assert_allclose(affine @ scaling, upscaled_affine(affine, factors), atol=1e-9)


def test_corners_of_one_voxel() -> None:
    corners = fov_corners(np.diag([2.0, 4, 6, 1]), (1, 1, 1))
    np.testing.assert_array_equal(np.abs(corners), np.tile([1, 2, 3], (8, 1)))
    assert len(np.unique(corners, axis=0)) == 8


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)])
@pytest.mark.parametrize("flip", [1, -1])
def test_axial_axis_of_permuted_and_tilted_volumes(order: tuple[int, ...], flip: int) -> None:
    angle = np.deg2rad(30)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = (flip * tilt @ np.diag([1, 2, 5]))[:, list(order)]
    assert axial_axis(affine) == order.index(2)


@pytest.mark.parametrize("affine", [np.diag([1.0, 0, 1, 1]), np.full((4, 4), np.nan), np.ones((4, 4))])
def test_singular_affines_are_refused(affine: np.ndarray) -> None:
    assert is_singular(affine)
    with pytest.raises(GeometryError, match=r"^the affine .* is singular, so no axis .*: correct the image header\.$"):
        axial_axis(affine)


def test_small_voxels_are_not_singular() -> None:
    assert not is_singular(np.diag([1e-3, 1e-3, 1e-3, 1]))
