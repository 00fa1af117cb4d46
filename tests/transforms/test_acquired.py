"""Back to the acquired grid: exact where nothing was lost, close where something was, at the right place always."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.scanner import anatomy, noisy, zero_filled
from hypothesis import given
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from nibabel.eulerangles import euler2mat
from scipy.ndimage import affine_transform, binary_erosion

from miar_monai.data.volume import Volume
from miar_monai.errors import SettingError
from miar_monai.inference.scanner_checks import scanner_warnings
from miar_monai.transforms.acquired import decimation_matrix, to_acquired_spacing
from miar_monai.transforms.degrade import degrade_volume


def volume(array: np.ndarray, spacing: tuple[float, ...] = (1, 1, 4), slice_thickness: float | None = None) -> Volume:
    affine = np.diag([*spacing, 1.0])
    return Volume(array.astype(np.float32), affine, np.dtype(np.int16), Path("x.nii"), slice_thickness=slice_thickness)


def centered(image: np.ndarray, size: int) -> np.ndarray:
    """Return a complex image zero-filled along its first axis, on the grid with the same center."""
    count = len(image)
    frequencies = np.rint(np.fft.fftfreq(count) * count)
    shift = (count - 1) / 2 - (size - 1) / 2 * count / size  # of the first voxel, in voxels of the image
    phases = np.exp(2j * np.pi * frequencies * shift / count).reshape(-1, *[1] * (image.ndim - 1))
    finer = np.zeros((size, *image.shape[1:]), dtype=complex)
    finer[frequencies.astype(int) % size] = np.fft.fft(image, axis=0) * phases
    return np.fft.ifft(finer, axis=0) * size / count


@given(
    count=st.integers(80, 130),
    factor=st.floats(1.25, 4),
    seed=st.integers(0, 1000),
)
def test_zero_filling_is_undone_to_float_precision_inside(count: int, factor: float, seed: int) -> None:
    image = np.random.default_rng(seed).standard_normal((count, 3))  # white, up to the Nyquist frequency
    size = round(count * factor)
    # without the frequency at the limit, which a shifted real signal of even length does not define
    image -= (
        (count % 2 == 0)
        * np.cos(np.pi * np.arange(count))[:, None]
        * (np.cos(np.pi * np.arange(count)) @ image / count)
    )
    finer = centered(image, size)
    assert np.abs(finer.imag).max() < 1e-12
    back = decimation_matrix(size, count, size / count) @ finer.real
    assert np.abs(back - image)[17:-17].max() < 1e-5 * np.abs(image).max()


@given(size=st.integers(2, 80), factor=st.floats(1.02, 8), level=st.floats(-2000, 2000))
def test_levels_are_kept_up_to_the_edges(size: int, factor: float, level: float) -> None:
    new_size = max(round(size / factor), 1)
    matrix = decimation_matrix(size, new_size, factor)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-9)  # no direction is preferred
    np.testing.assert_allclose(matrix @ np.full(size, level), level, rtol=1e-9)


NOISES, FACTORS = (0.0, 0.01, 0.03), (1.25, 1.5, 2.0)


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def at_one_millimeter(finer: np.ndarray, count: int = 150) -> np.ndarray:
    """Return an image that was interpolated along its first axis with the ``count`` voxels that it had before."""
    result = to_acquired_spacing(volume(finer, (count / len(finer), 1, 4)), (1, 1, 4)).array
    assert result.shape == (count, *finer.shape[1:])
    return result


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("factor", FACTORS)
def test_the_magnitude_of_a_zero_filled_image_comes_back_closely(factor: float, noise: float) -> None:
    image = noisy(anatomy(), noise)
    finer = np.abs(centered(image, round(150 * factor)))
    errors = at_one_millimeter(finer) - np.abs(image)
    assert rms(errors) < 0.01
    assert rms(errors[binary_erosion(anatomy() > 0.1, np.ones((7, 7, 1)))]) < 0.001
    reduced = degrade_volume(volume(finer, (150 / len(finer), 1, 4)), (len(finer) / 150, 1, 1), blur=0).array
    assert rms(errors) < 0.9 * rms(reduced - np.abs(image))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("order", "limit"), [(1, 0.008), (3, 0.0015)])
def test_interpolated_images_come_back_approximately(order: int, limit: float, factor: float, noise: float) -> None:
    image = np.abs(noisy(anatomy(), noise))
    size = round(150 * factor)
    step = 150 / size
    offset = 149 / 2 - step * (size - 1) / 2
    shape = (size, *image.shape[1:])
    finer = affine_transform(image, [step, 1, 1], [offset, 0, 0], output_shape=shape, order=order, mode="nearest")
    assert rms(at_one_millimeter(finer) - image) < limit


def test_the_spacing_of_the_warning_removes_the_interpolation() -> None:
    finer = zero_filled(noisy(anatomy(), 0.01), (300, 210))
    lr = volume(finer, (0.45, 0.6, 4))
    option = scanner_warnings(lr)[0].partition("--acquired-spacing ")[2].removesuffix(").")
    acquired = [float(part) for part in option.split(",")]
    assert acquired == pytest.approx([0.9, 0.9, 4], rel=0.06)
    reduced = to_acquired_spacing(lr, acquired)
    assert scanner_warnings(reduced) == []
    assert reduced.grid.patient_spacing == pytest.approx(acquired)


@given(
    order=st.permutations((0, 1, 2)).map(tuple),
    angles=st.tuples(*[st.floats(-0.3, 0.3)] * 3),
    factors=st.tuples(*[st.floats(1.1, 3)] * 3),
)
def test_voxels_stay_where_they_are_in_any_orientation(
    order: tuple[int, int, int], angles: tuple[float, ...], factors: tuple[float, float, float]
) -> None:
    affine, shape = np.eye(4), (41, 36, 39)
    affine[:3, :3] = euler2mat(*angles) @ (np.eye(3)[:, list(order)] * [0.5, -0.6, 2.0])
    affine[:3, 3] = -12, 7.5, 100
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    direction = np.array([0.01, -0.02, 0.005])
    smooth = np.cos(apply_affine(affine, voxels) @ direction)  # of the position in the patient
    lr = Volume(smooth.astype(np.float32), affine, np.dtype(np.int16), Path("x.nii"))
    acquired = [spacing * factor for spacing, factor in zip(lr.grid.patient_spacing, factors, strict=True)]
    result = to_acquired_spacing(lr, acquired)
    assert result.grid.patient_spacing == pytest.approx(acquired)
    positions = np.stack(np.meshgrid(*map(np.arange, result.array.shape), indexing="ij"), -1)
    expected = np.cos(apply_affine(result.affine, positions) @ direction)
    # the reflection at the edges bends a slope, which a wave of this length hardly has
    assert np.abs(result.array - expected).max() < 0.02
    assert np.array_equal(lr.array, smooth.astype(np.float32))


def test_metadata_stay_and_nothing_becomes_negative() -> None:
    array = np.zeros((64, 48, 5))
    array[20:40, 20:30] = 1000
    lr = volume(array, (0.5, 0.5, 5), slice_thickness=4)
    result = to_acquired_spacing(lr, [0.9])
    assert (result.slice_thickness, result.dtype, result.path) == (4, lr.dtype, lr.path)
    assert result.array.dtype == np.float32
    assert result.array.shape == (36, 27, 5)
    assert result.array.min() == 0
    hounsfield = to_acquired_spacing(lr._replace(array=lr.array - 1000), [0.9])
    assert hounsfield.array.min() < -1000


@pytest.mark.parametrize(
    ("spacing", "found"),
    [
        ([0.9, 0.9, 3], "3 mm is given for the inferior-superior axis, which has 5 voxels of 4 mm; 4 to 32 mm"),
        ([5], "5 mm is given for the left-right axis, which has 64 voxels of 0.5 mm; 0.5 to 4 mm"),
        ([0.5, 0.5, 20], "20 mm is given for the inferior-superior axis, which has 5 voxels of 4 mm"),
        ([0.5], "the voxels have the acquired spacing or a larger one already, 0.5 x 0.5 x 4 mm"),
        ([0.504, 0.5, 4], "the voxels have the acquired spacing or a larger one already, 0.5 x 0.5 x 4 mm"),
        ([0], "acquired spacing is 0, but it must lie between"),
        ([float("nan")], "acquired spacing is nan, but it must lie between"),
    ],
)
def test_impossible_spacings_are_refused(spacing: list[float], found: str) -> None:
    with pytest.raises(SettingError) as caught:
        to_acquired_spacing(volume(np.ones((64, 48, 5)), (0.5, 0.5, 4)), spacing)
    assert found in str(caught.value)
