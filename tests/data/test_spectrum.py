"""Spectra along the axes of volumes, and planes with detail."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d

from miar_monai.data.spectrum import detailed_planes, high_frequency_energy, line_spectrum


def noise(shape: tuple[int, int, int] = (40, 41, 43), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 2, shape)


@given(st.integers(0, 2), st.sampled_from([4, 8, 12]))
def test_a_wave_has_its_power_at_its_frequency(axis: int, cycles: int) -> None:
    """Waves of 32 voxels with some cycles have all their power in that bin and the two beside it, by the window."""
    positions = np.arange(64).reshape([-1 if i == axis else 1 for i in range(3)])
    wave = 10 + np.cos(2 * np.pi * cycles * positions / 32) + np.zeros((64, 64, 64))
    wave[0, 0, 0] = 0  # air
    power = line_spectrum(wave, axis, 32)
    assert power is not None
    assert power.argmax() == cycles
    assert power[cycles - 2 : cycles + 3].sum() > (1 - 1e-6) * power.sum()


@given(st.floats(0.01, 1e4), st.floats(-1e3, 1e3))
def test_energy_does_not_depend_on_units(scale: float, offset: float) -> None:
    expected = high_frequency_energy(noise())
    np.testing.assert_allclose(high_frequency_energy(scale * noise() + scale * offset), expected, rtol=1e-4)


def test_half_of_the_energy_of_white_noise_is_high() -> None:
    np.testing.assert_allclose(high_frequency_energy(noise((60, 61, 63))), 0.5, atol=0.05)


@pytest.mark.parametrize("axis", range(3))
def test_air_and_the_edges_of_a_mask_do_not_count(axis: int) -> None:
    image = gaussian_filter1d(noise((64, 64, 64)), 1.5, axis)
    expected = high_frequency_energy(image)[axis]
    image[:3], image[:, -5:], image[:, :, :7] = 0, 0, 0
    found = high_frequency_energy(image)[axis]
    assert found == pytest.approx(expected, rel=0.1)
    assert found < 0.1


@pytest.mark.parametrize(
    ("blurred", "planes"),
    [
        ((), {"axial", "sagittal", "coronal"}),
        ((2,), {"axial"}),
        ((0,), {"axial", "sagittal"}),
        ((1,), {"axial", "coronal"}),
        ((0, 1, 2), {"axial", "sagittal", "coronal"}),
    ],
)
def test_planes_with_detail_along_both_axes(blurred: tuple[int, ...], planes: set[str]) -> None:
    image = noise()
    for axis in blurred:
        image = gaussian_filter1d(image, 1.0, axis)
    assert set(detailed_planes(image)) == planes
    assert detailed_planes(image)[0] == "axial"


def test_pixels_that_are_much_longer_than_wide() -> None:
    assert set(detailed_planes(noise(), (0.65, 0.65, 1.25))) == {"axial", "sagittal", "coronal"}
    assert detailed_planes(noise(), (0.7, 0.7, 2.5)) == ("axial",)


def test_too_few_slices_to_measure() -> None:
    assert detailed_planes(noise((40, 40, 31))) == ("axial",)
    assert detailed_planes(np.zeros((40, 40, 40))) == ("axial",)
    assert np.isnan(high_frequency_energy(noise((40, 40, 31)))[2])


def test_real_brains_are_isotropic_where_their_index_says_so(real_data: Path) -> None:
    errors = []
    rows = csv.DictReader((real_data / "brain" / "INDEX.csv").read_text().splitlines())
    measured = [(row, re.search(r"energy x/y/z ([\d.]+)/([\d.]+)/([\d.]+) permille", row["terms"])) for row in rows]
    for row, match in [(row, match) for row, match in measured if match][::4]:
        known = np.array([float(group) for group in match.groups()]) / 1000
        array = nib.load(real_data.parent / row["path"]).get_fdata(dtype=np.float32)
        assert (len(detailed_planes(array)) == 3) == (known[2] >= 0.5 * known[:2].mean()), row["path"]
        errors += list(np.abs(np.log2(high_frequency_energy(array) / known)))
    assert len(errors) == 9 * 3
    assert np.median(errors) < 0.4
