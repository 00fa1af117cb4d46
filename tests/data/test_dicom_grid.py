"""Positions of slices: rounded ones are accepted; uneven, missing or doubly spaced ones are reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.phantoms import write_dicom_series
from pydicom import dcmread

from miar_monai.data.dicom_grid import check_gaps, fit_grid, in_plane_axes
from miar_monai.data.io import read_volume
from miar_monai.errors import GeometryError

HERE = Path("here")
OBLIQUE = (0.36, 0.48, 0.8)


def along(heights: np.ndarray | list[float], direction: tuple[float, ...] = (0, 0, 1)) -> np.ndarray:
    return np.array([-40.0, -36.33, 10.07]) + np.outer(heights, direction)


def refusal(positions: np.ndarray) -> str:
    with pytest.raises(GeometryError) as caught:
        check_gaps(HERE, positions)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("direction", [(0, 0, 1), (0, 1, 0), OBLIQUE])
@pytest.mark.parametrize("count", [2, 3, 4, 9, 300])
@pytest.mark.parametrize("spacing", [0.45, 0.5, 0.625, 0.75, 1.25, 3.3])
@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_rounded_positions_are_accepted(
    decimals: int, spacing: float, count: int, direction: tuple[float, ...], rng: np.random.Generator
) -> None:
    for start in rng.uniform(0, 1, 5):
        exact = along(start + spacing * np.arange(count), direction)
        rounded = exact.round(decimals)
        check_gaps(HERE, rounded)
        origin, step = fit_grid(rounded)
        fitted = origin + np.outer(np.arange(count), step)
        assert np.abs(fitted - exact).max() <= 10.0**-decimals
    check_gaps(HERE, np.floor(10 * exact) / 10)  # truncated instead of rounded


def test_positions_rounded_along_the_normal_only_are_accepted() -> None:
    positions = along((0.625 * np.arange(9)).round(1))
    positions[:, :2] = [-249.51171875, -374.0234]
    check_gaps(HERE, positions)
    refusal(np.delete(positions, 4, axis=0))


@pytest.mark.parametrize("count", [4, 5, 9, 100])
@pytest.mark.parametrize("spacing", [0.3, 0.5, 0.625, 1, 5])
@pytest.mark.parametrize("decimals", [1, 6])
def test_a_missing_slice_is_found_at_any_position(decimals: int, spacing: float, count: int) -> None:
    whole = along(spacing * np.arange(count)).round(decimals)
    for k in {1, 2, count // 2, count - 2}:
        found = refusal(np.delete(whole, k, axis=0))
        if count > 4:
            assert "here: 1 slice is missing, the widest gap is" in found


def test_some_missing_slices_are_counted() -> None:
    whole = along(0.625 * np.arange(100)).round(1)
    found = refusal(np.delete(whole, [20, 21, 70], axis=0))
    assert "3 slices are missing" in found
    assert "(97 slices, usually 0.600 mm apart)" in found


@pytest.mark.parametrize(
    ("gaps", "reported"),
    [
        ([5] * 10 + [10] * 13, "10 gaps of 5.000 mm and 13 gaps of 10.000 mm"),
        ([10] * 4 + [5] * 3, "3 gaps of 5.000 mm and 4 gaps of 10.000 mm"),
        ([3] * 8 + [5] + [7] * 9, "8 gaps of 3.000 mm and 9 gaps of 7.000 mm"),
        ([3] * 8 + [7] * 9, "8 gaps of 3.000 mm and 9 gaps of 7.000 mm"),
        ([2.5] * 3 + [5] * 4 + [2.5] * 2, "5 gaps of 2.500 mm and 4 gaps of 5.000 mm"),
    ],
)
@pytest.mark.parametrize("direction", [(0, 0, 1), OBLIQUE])
def test_two_spacings_are_not_reported_as_missing_slices(
    gaps: list[float], reported: str, direction: tuple[float, ...]
) -> None:
    found = refusal(along(np.cumsum([0, *gaps]), direction))
    assert found.startswith(
        f"here: the slices have 2 spacings, {reported} ({len(gaps) + 1} slices); one spacing is needed"
    )
    assert "missing" not in found


def test_one_wide_gap_is_reported_as_a_missing_slice() -> None:
    assert "1 slice is missing" in refusal(along(np.cumsum([0, *[5] * 10, 10])))
    assert "1 slice is missing" in refusal(along(np.cumsum([0, *[5] * 10, 10, *[5] * 10])))


def test_uneven_slices_are_refused() -> None:
    assert "the slices are 4.500 to 6.000 mm apart" in refusal(along([0, 5, 9.5, 15.5, 20.5]))
    shifted = along(5.0 * np.arange(9))
    shifted[4, 0] += 1.5
    assert "slices are up to 1.33" in refusal(shifted)
    check_gaps(HERE, along([0, 60]))  # two slices are always even


def test_the_affine_is_that_of_the_fitted_grid(tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path / "series", (9, 11, 9), spacing=(0.8, 0.9, 0.625), origin=(-15, -14, 10))
    for path in folder.iterdir():
        image = dcmread(path)
        image.ImagePositionPatient = [round(float(x), 1) for x in image.ImagePositionPatient]
        image.save_as(path)
    affine = read_volume(folder).affine
    np.testing.assert_allclose(affine[:3, 2], [0, 0, 0.625], atol=0.005)
    np.testing.assert_allclose(affine[:3, 3], [15, 14, 10], atol=0.05)


@pytest.mark.parametrize("decimals", [2, 3])
def test_rounded_directions_become_perpendicular(decimals: int, tmp_path: Path) -> None:
    a, b = np.deg2rad(17.3), np.deg2rad(8.1)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    exact = (turn @ tilt)[:, :2].T
    rounded = exact.round(decimals)
    assert np.abs(rounded @ rounded.T - np.eye(2)).max() > 1e-5
    axes = in_plane_axes(rounded)
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(axes, exact, atol=10.0**-decimals)
    folder = write_dicom_series(
        tmp_path / "series", (9, 11, 4), orientation=rounded.ravel(), step=2.5 * np.cross(*exact)
    )
    in_plane = read_volume(folder).affine[:3, :2] / [0.8, 0.9]
    np.testing.assert_allclose(in_plane.T @ in_plane, np.eye(2), atol=1e-12)


def test_exact_directions_do_not_change() -> None:
    exact = np.array([[1.0, 0, 0], [0, np.cos(0.3), -np.sin(0.3)]])
    np.testing.assert_allclose(in_plane_axes(exact), exact, atol=1e-15)


def test_oblique_axes_are_refused(tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path / "series", (9, 11, 4), orientation=(1, 0, 0, 0.2, 0.98, 0), step=(0, 0, 2.5))
    with pytest.raises(
        GeometryError, match=r"ImageOrientationPatient is \[1\.0, .*perpendicular unit vectors are needed"
    ):
        read_volume(folder)
