"""Guides on the grid of an image: positions in millimeters, intensities, and what lies outside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.phantoms import head
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from miar_monai.data.grid import Grid
from miar_monai.data.io import Volume
from miar_monai.errors import ImageError
from miar_monai.transforms import ResampleGuided, prepare_guide
from miar_monai.transforms.guide import in_field_of_view, resample_guide


def positions(grid: Grid) -> np.ndarray:
    """Return the centers of the voxels in millimeters, (X, Y, Z, 3)."""
    return apply_affine(grid.affine, np.moveaxis(np.indices(grid.shape), 0, -1))


def image(array: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(array.astype(np.float32))[None], affine=torch.from_numpy(affine))


def centered(shape: tuple[int, int, int], axes: np.ndarray) -> Grid:
    """Return a grid with its center at 0 mm."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -axes @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10_000),
    st.permutations((0.7, 0.9, 1.3)),
    st.sampled_from([(0.4, 0.8, 0.9), (1.5, 1.0, 0.6), (1.0, 1.0, 3.0)]),
)
def test_the_position_of_everything_stays(
    seed: int, voxels: tuple[float, float, float], spacing: tuple[float, float, float]
) -> None:
    """A gradient in space has the value of its position, in any orientation, finer and coarser."""
    first, second = Rotation.random(2, random_state=seed).as_matrix()
    source, target = centered((45, 43, 41), first * voxels), centered((9, 8, 7), second * spacing)
    gradient = np.array([1.0, -2.0, 0.5])
    resampled = resample_guide(image(positions(source) @ gradient, source.affine), target)
    expected = positions(target) @ gradient
    assert resampled.shape == (1, *target.shape)
    np.testing.assert_allclose(resampled.affine, target.affine)
    inner = in_field_of_view(target, centered((25, 23, 21), source.affine[:3, :3]))
    np.testing.assert_allclose(resampled.numpy()[0][inner], expected[inner], atol=1e-3)


def test_the_same_grid_is_a_copy() -> None:
    array, affine = head((17, 15, 13)), centered((17, 15, 13), Rotation.random(random_state=0).as_matrix()).affine
    guide = image(array, affine)
    resampled = resample_guide(guide, Grid((17, 15, 13), affine + 1e-6))
    assert torch.equal(resampled.as_tensor(), guide.as_tensor())
    resampled.zero_()
    assert guide.max() > 0


def test_voxel_axes_do_not_matter() -> None:
    guide = image(head((31, 29, 27)), np.diag([1.1, 1.2, 1.3, 1]))
    grid = centered((20, 20, 20), np.diag([1.5, 1.4, 1.0]))
    grid = Grid(grid.shape, grid.affine + np.array([[0, 0, 0, 16], [0, 0, 0, 17], [0, 0, 0, 18], [0, 0, 0, 0]]))
    expected = resample_guide(guide, grid)
    for other in (Orientation("SLA", labels=None)(guide), Orientation("PRI", labels=None)(guide)):
        assert other.shape != guide.shape
        torch.testing.assert_close(resample_guide(other, grid).as_tensor(), expected.as_tensor(), atol=1e-5, rtol=0)


def test_it_is_zero_outside_of_the_field_of_view() -> None:
    guide = image(np.ones((10, 10, 10)), np.diag([2.0, 2, 2, 1]))  # from -1 to 19 mm
    grid = Grid((30, 10, 10), np.array([[1.0, 0, 0, -5], [0, 1, 0, 5], [0, 0, 1, 5], [0, 0, 0, 1]]))
    found = resample_guide(guide, grid).numpy()[0]
    expected = np.zeros(grid.shape)
    expected[4:25] = 1  # centers from -1 to 19 mm
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(in_field_of_view(grid, Grid((10, 10, 10), np.diag([2.0, 2, 2, 1]))), expected)


def test_a_finer_guide_is_not_aliased() -> None:
    """Stripes that the grid cannot show become gray; without a blur, every voxel would meet the same stripe."""
    stripes = np.zeros((40, 12, 12))
    stripes[::4] = stripes[1::4] = 1
    guide = image(stripes, np.diag([1.0, 4, 4, 1]))
    found = resample_guide(guide, Grid((10, 12, 12), np.diag([4.0, 4, 4, 1])))
    assert found[:, 1:-1].min() > 0.35
    assert found[:, 1:-1].max() < 0.65


@pytest.mark.parametrize("cycles", [0.1, 0.2, 0.3])
def test_detail_survives_a_shift_by_half_a_voxel(cycles: float) -> None:
    """Waves of up to 0.6 times the Nyquist frequency keep their amplitude; linear interpolation would take 41 %."""
    phases = np.arange(9)[:, None]

    def wave(x: np.ndarray) -> np.ndarray:
        return np.cos(2 * np.pi * cycles * x[:, None, None] + phases) * np.ones(9)

    shifted = np.eye(4)
    shifted[0, 3] = 0.5
    found = resample_guide(image(wave(np.arange(64)), np.eye(4)), Grid((60, 9, 9), shifted)).numpy()[0]
    np.testing.assert_allclose(found[8:52], wave(np.arange(60) + 0.5)[8:52], atol=0.08)


def test_splines_do_not_overshoot() -> None:
    step = np.zeros((30, 9, 9))
    step[12:] = 1
    found = resample_guide(image(step, np.eye(4)), Grid((50, 9, 9), np.diag([0.55, 1, 1, 1])))
    assert found.min() == 0
    assert found.max() == 1


def test_units_do_not_matter() -> None:
    array, grid = head((31, 29, 27)), Grid((40, 30, 20), np.diag([0.7, 0.9, 1.3, 1]))

    def volume(scale: float) -> Volume:
        return Volume((scale * array).astype(np.float32), np.eye(4), np.dtype("float32"), Path("t1.nii"))

    first, second = (prepare_guide(volume(scale), grid) for scale in (1.0, 730.0))
    torch.testing.assert_close(first.as_tensor(), second.as_tensor(), atol=1e-5, rtol=0)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert 0.9 < first.max() < 1.3
    with pytest.raises(ImageError, match=r"t1\.nii: none of the 24273 voxels is above 0; a volume with contrast"):
        prepare_guide(volume(0), grid)


def test_guides_of_a_dictionary() -> None:
    reference, guide = image(head((9, 8, 7)), np.diag([2.0, 2, 2, 1])), image(head((18, 16, 14)), np.eye(4))
    resample = ResampleGuided("guide")
    result = resample({"image": reference, "guide": guide, "subject": "a"})
    assert result["guide"].shape == reference.shape
    torch.testing.assert_close(result["guide"].affine, reference.affine)
    assert result["image"] is reference
    assert resample({"image": reference}).keys() == {"image"}


def test_a_guide_within_one_voxel_has_its_mean_there() -> None:
    array = np.random.default_rng(0).uniform(1, 3, (9, 8, 7))
    tiny = image(array, centered((9, 8, 7), np.eye(3) * 1e-5).affine)
    found = resample_guide(tiny, centered((5, 5, 5), np.eye(3)))[0].numpy()
    assert found[2, 2, 2] == pytest.approx(array.mean(), rel=0.05)
    assert np.count_nonzero(found) == 1
