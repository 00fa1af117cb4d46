"""``miar degrade``: sizes, geometry, levels, profiles and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.phantoms import head, write_nifti_phantom

from miar_monai.cli.main import main
from miar_monai.data.geometry import fov_corners
from miar_monai.transforms import SimulateLowResolution

SHAPE = (48, 40, 30)
SAGITTAL = np.array([[0.0, 0, 3, -10], [-1, 0, 0, 20], [0, -1, 0, 30], [0, 0, 0, 1]])
"""Voxel axes: anterior-posterior, superior-inferior, left-right."""


@pytest.fixture
def scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    affine = np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = 20, -30, 7
    image = nib.Nifti1Image((1000 * head(SHAPE) + 20).astype(np.float32), affine)
    nib.save(image, "scan.nii.gz")
    return Path("scan.nii.gz")


def miar(*words: object) -> Result:
    return CliRunner().invoke(main, ["degrade", *map(str, words)])


def load(path: str | Path) -> tuple[np.ndarray, np.ndarray, Any]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine, image


def test_without_options_it_is_the_degradation_of_the_paper(scan: Path) -> None:
    result = miar(scan)
    assert (result.exit_code, result.output) == (0, "scan_lr.nii.gz\n")
    hr, affine, _ = load(scan)
    lr, lr_affine, _ = load("scan_lr.nii.gz")
    assert lr.shape == (12, 10, 30)
    expected = SimulateLowResolution()(torch.from_numpy(hr)[None])[0].numpy()
    np.testing.assert_allclose(lr, expected, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(fov_corners(lr_affine, lr.shape), fov_corners(affine, hr.shape), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "shape", "spacing"),
    [
        (("--factor", "1,1,5"), (48, 40, 6), (1, 1, 5)),
        (("--factor", "2"), (24, 20, 15), (2, 2, 2)),
        (("--spacing", "1,1,2.5"), (48, 40, 12), (1, 1, 2.5)),
        (("--spacing", "1.6,1.6,3.7"), (30, 25, 8), (1.6, 1.6, 3.7)),
    ],
)
@pytest.mark.parametrize("profile", ["bicubic", "gaussian", "box"])
def test_the_voxels_have_the_size_that_is_named(
    options: tuple[str, str], shape: tuple[int, ...], spacing: tuple[float, ...], profile: str, scan: Path
) -> None:
    assert miar(scan, *options, "--profile", profile, "--blur", 0, "-o", "lr.nii").exit_code == 0
    lr, affine, image = load("lr.nii")
    assert lr.shape == shape
    np.testing.assert_allclose(image.header.get_zooms(), spacing, rtol=1e-5)
    hr, hr_affine, _ = load(scan)
    centers = [(a[:3, :3] @ (np.asarray(x.shape) - 1) / 2 + a[:3, 3]) for a, x in ((affine, lr), (hr_affine, hr))]
    np.testing.assert_allclose(*centers, atol=1e-3)
    assert lr.mean() == pytest.approx(hr.mean(), rel=0.02)


def test_axes_are_those_of_the_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_nifti_phantom(tmp_path / "sagittal.nii", (10, 24, 20), SAGITTAL, np.int16)
    assert miar(path, "--factor", "1,1,4").exit_code == 0
    lr, affine, image = load("sagittal_lr.nii.gz")
    superior = int(np.abs(affine[2, :3]).argmax())
    assert [n // m for n, m in zip((10, 24, 20), lr.shape, strict=True)][superior] == 4
    assert sorted(n // m for n, m in zip((10, 24, 20), lr.shape, strict=True)) == [1, 1, 4]
    assert image.get_data_dtype() == np.int16


def test_thin_slices_with_gaps_are_sharper_than_slices_that_touch(scan: Path) -> None:
    for thickness in (0.4, 1.0):
        options = ("--factor", "1,1,5", "--profile", "gaussian", "--blur", 0, "--thickness", thickness)
        assert miar(scan, *options, "-o", f"{thickness}.nii").exit_code == 0
    thin, thick = load("0.4.nii")[0], load("1.0.nii")[0]
    assert np.abs(np.diff(thin, axis=2)).mean() > np.abs(np.diff(thick, axis=2)).mean()


def test_noise_has_its_standard_deviation_and_its_seed(scan: Path) -> None:
    for name, options in {"clean": (), "a": ("--noise", 0.02), "b": ("--noise", 0.02, "--seed", 1)}.items():
        assert miar(scan, *options, "-o", f"{name}.nii").exit_code == 0
    clean, a, b = (load(f"{name}.nii")[0] for name in ("clean", "a", "b"))
    span = np.ptp(load(scan)[0])
    assert (a - clean).std() == pytest.approx(0.02 * span, rel=0.1)
    assert not np.array_equal(a, b)
    assert miar(scan, "--noise", 0.02, "-o", "again.nii").exit_code == 0
    assert np.array_equal(load("again.nii")[0], a)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--factor", "1"), "the voxels would keep their size; give a factor above 1 or a spacing above"),
        (("--spacing", "0.5"), "factor is 0.5, but it must lie between 1 and 64"),
        (("--factor", "2,2"), "'2,2' must be one positive number, or three with commas, such as 1,1,5."),
        (("--factor", "x"), "'x' must be one positive number"),
        (("--factor", "2", "--spacing", "2"), "--factor and --spacing are given, but only one of them is possible"),
        (("-o", "lr.mhd"), "lr.mhd is not the name of a volume that can be written"),
        (("--blur", "-1"), "blur is -1.0, but it must lie between 0 and 64"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_sentence(options: tuple[str, ...], sentence: str, scan: Path) -> None:
    result = miar(scan, *options)
    assert result.exit_code == 2
    assert sentence in result.output
    assert sorted(path.name for path in Path().iterdir()) == ["scan.nii.gz"]


def test_results_are_not_replaced_without_permission(scan: Path) -> None:
    assert miar(scan).exit_code == 0
    refused = miar(scan)
    assert refused.exit_code == 1
    assert "exists already" in refused.output
    assert miar(scan, "--overwrite").exit_code == 0
