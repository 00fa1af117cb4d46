"""Interpolation by the scanner and interleaved slices: recognized where they are, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.phantoms import head
from helpers.scanner import anatomy, noisy, zero_filled
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, uniform_filter, zoom

from miar_monai.data.io import Volume
from miar_monai.inference.input_checks import TrainingDomain, input_warnings
from miar_monai.inference.scanner_checks import acquired_spacing, scanner_warnings, slice_alternation


def volume(array: np.ndarray, spacing: tuple[float, float, float] = (0.5, 0.5, 4)) -> Volume:
    return Volume(array.astype(np.float32), np.diag([*spacing, 1.0]), np.dtype(np.int16), Path("x"))


@pytest.mark.parametrize("noise", [0, 0.005, 0.02])
@pytest.mark.parametrize("factor", [1.25, 1.5, 2])
@pytest.mark.parametrize("change", ["none", "rounded", "cropped", "masked"])
def test_zero_filling_is_recognized(factor: float, noise: float, change: str) -> None:
    image = anatomy()
    sides = round(150 * factor), round(140 * factor)
    finer = zero_filled(noisy(image, noise), sides)
    if change == "rounded":
        finer = np.rint(1000 * finer)
    elif change == "cropped":
        finer = finer[4:-7, 3:-2]
    elif change == "masked":
        finer = np.where(zoom(image, (sides[0] / 150, sides[1] / 140, 1), order=1) > 0, finer, 0)
    for axis in (0, 1):
        assert acquired_spacing(finer, axis) == pytest.approx(factor, rel=0.06)


def test_only_the_interpolated_axis_is_named() -> None:
    lr = volume(zero_filled(anatomy(), (300, 140)), (0.45, 0.9, 4))
    sentences = scanner_warnings(lr)
    factor = acquired_spacing(lr.array, 0) or 0
    assert sentences == [
        f"the image was interpolated along left-right (voxels of 0.45 mm, acquired at about {0.45 * factor:.2g} mm),"
        " and its result is less sharp than that of the original: give the original, or the acquired spacing"
        f" (--acquired-spacing {0.45 * factor:.3g},0.9,4)."
    ]
    assert sentences[0] in input_warnings(lr, TrainingDomain())
    turned = lr._replace(array=lr.array.transpose(2, 1, 0), affine=lr.affine[:, [2, 1, 0, 3]])
    assert scanner_warnings(turned) == sentences


def test_the_acquisition_matrix_counts_beside_the_spectrum() -> None:
    smooth, clear = (volume(array, (0.5, 0.5, 4)) for array in (anatomy(), zero_filled(anatomy(), (300, 280))))
    assert scanner_warnings(smooth) == []
    (sentence,) = scanner_warnings(smooth._replace(acquired_spacing=1.0))
    assert "left-right (voxels of 0.5 mm, acquired at 1 mm by its AcquisitionMatrix) and posterior" in sentence
    assert sentence.endswith("(--acquired-spacing 1,1,4).")
    (sentence,) = scanner_warnings(clear._replace(acquired_spacing=1.02))
    assert "(voxels of 0.5 mm, acquired at about 0.98 mm, 1.02 mm by its AcquisitionMatrix)" in sentence
    assert sentence.endswith("(--acquired-spacing 1.02,1.02,4).")
    partial = volume(zero_filled(anatomy(), (300, 420)), (0.5, 1 / 3, 4))._replace(acquired_spacing=0.7)
    (sentence,) = scanner_warnings(partial)  # fewer lines in the phase direction: both are coarser in the spectrum
    option = sentence.partition("--acquired-spacing ")[2].split(",")
    assert [float(mm) for mm in option[:2]] == pytest.approx([1, 1], rel=0.06)


@pytest.mark.parametrize("acquired", [None, 0.25, 0.5, 0.59, 4.1])
def test_an_acquisition_matrix_of_about_the_stored_size_or_damaged_is_no_interpolation(acquired: float | None) -> None:
    assert scanner_warnings(volume(anatomy())._replace(acquired_spacing=acquired)) == []


def test_only_axes_that_become_finer_count() -> None:
    """A sagittal series: its slices lie along posterior-anterior and inferior-superior."""
    turned = np.array([[0, 0, 4.0, 0], [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 1]])
    lr = volume(anatomy())._replace(affine=turned, modality="MR", acquired_spacing=1.0)
    for factors, option in (((4, 4, 1), "4,1,0.5"), ((8, 1, 1), ""), ((1, 2, 2), "4,1,1"), (None, "4,1,0.5")):
        options = [sentence.partition("--acquired-spacing ")[2] for sentence in scanner_warnings(lr, factors)]
        assert options == ([f"{option})."] if option else [])


@pytest.mark.parametrize("noise", [0, 0.005, 0.02])
@pytest.mark.parametrize("rounded", [False, True])
def test_other_images_are_not_taken_for_interpolated(noise: float, rounded: bool) -> None:
    image = np.abs(noisy(anatomy(), noise))
    others = {f"gaussian {sigma}": gaussian_filter(image, (sigma, sigma, 0)) for sigma in (0.5, 0.7, 1, 1.5, 2, 3, 5)}
    others |= {f"box {width}": uniform_filter(image, (width, width, 1)) for width in (2, 3, 4, 5, 7)}
    others |= {f"linear {factor}": zoom(image, (factor, factor, 1), order=1) for factor in (1.5, 2, 3)}
    others |= {"plain": image, "odd": image[:77, :65], "masked": np.where(anatomy() > 0, image, 0)}
    for name, other in others.items():
        for axis in (0, 1):
            assert acquired_spacing(np.rint(1000 * other) if rounded else other, axis) is None, (name, axis)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 0.02), st.floats(0, 4), st.integers(60, 130), st.floats(1e-3, 1e5))
def test_blurred_images_cause_no_warning(seed: int, noise: float, sigma: float, side: int, scale: float) -> None:
    image = gaussian_filter(np.abs(noisy(anatomy((side, 101, 18), seed), noise)), (sigma, sigma, 0))
    assert scanner_warnings(volume(scale * image)) == []
    assert scanner_warnings(volume(np.rint(4095 * image) - 1024)) == []


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (63, 64, 2), (64, 1, 20), (80, 80, 20)])
@pytest.mark.parametrize("value", [0, 7, -1000])
def test_tiny_and_constant_volumes_cause_no_warning(shape: tuple[int, int, int], value: float) -> None:
    assert scanner_warnings(volume(np.full(shape, value))) == []


@pytest.mark.parametrize("size", [0.03, 0.06, -0.15])
@pytest.mark.parametrize("noise", [0, 0.02])
def test_alternating_slices_are_recognized(size: float, noise: float) -> None:
    image = np.abs(noisy(head((60, 60, 24)), noise))
    image[..., ::2] *= 1 + size / 2
    image[..., 1::2] *= 1 - size / 2
    assert slice_alternation(image, 2) == pytest.approx(abs(size), rel=0.2)
    assert f"differ by {100 * slice_alternation(image, 2):.0f} % in brightness" in scanner_warnings(volume(image))[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.2), st.sampled_from(["trend", "walk"]))
def test_a_change_of_brightness_over_the_slices_is_no_alternation(seed: int, size: float, kind: str) -> None:
    steps = np.random.default_rng(seed).standard_normal(24)
    gains = np.linspace(1 - size, 1 + size, 24) if kind == "trend" else np.exp(0.1 * size * np.cumsum(steps))
    assert slice_alternation(head((40, 40, 24), seed % 7) * gains, 2) == 0


def test_slices_of_random_brightness_are_rarely_taken_for_alternating() -> None:
    generator, image = np.random.default_rng(0), head((40, 40, 24))
    hits = [slice_alternation(image * (1 + 0.05 * generator.standard_normal(24)), 2) > 0 for _ in range(300)]
    assert np.mean(hits) < 0.01
