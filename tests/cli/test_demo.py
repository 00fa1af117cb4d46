from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.tiny_bundle import write_tiny_bundle
from torch import Tensor

from miar_monai.cli import demo
from miar_monai.cli.demo import degrade, run_demo, template
from miar_monai.cli.main import main
from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import write_nifti
from miar_monai.errors import ImageError
from miar_monai.evaluation.metrics import psnr
from miar_monai.inference.resolver import SuperResolver
from miar_monai.transforms.intensity import ScaleIntensityRobust

AFFINE = np.array([[1.5, 0, 0, -30], [0, 1.25, 0, 10], [0, 0, 3, -7], [0, 0, 0, 1]], dtype=np.float64)


@pytest.fixture
def volume(phantom: Tensor, tmp_path: Path) -> Path:
    """Write a volume of the phantom in units of 0 to 800."""
    return write_nifti(tmp_path / "in" / "phantom.nii.gz", 800 * phantom[0].numpy(), AFFINE)


@pytest.fixture
def resolver(tmp_path: Path) -> SuperResolver:
    """Return a tiny network, which is given the blur: the phantom is too small to measure it."""
    return SuperResolver(write_tiny_bundle(tmp_path / "bundle"), "cpu", blur=1.0)


def test_all_results_cover_the_field_of_view_of_the_truth_in_its_units(
    volume: Path, resolver: SuperResolver, tmp_path: Path
) -> None:
    before = volume.read_bytes()
    result = run_demo(volume, resolver, tmp_path / "out", num_slices=5)
    hr, lr, sr = (nib.load(path) for path in result[:3])
    assert (hr.shape, lr.shape, sr.shape) == ((36, 28, 5), (9, 7, 5), (36, 28, 5))
    corners = fov_corners(hr.affine, hr.shape)
    for image in (lr, sr):
        assert fov_corners(image.affine, image.shape) == pytest.approx(corners, abs=1e-4)
        assert np.array_equal(image.get_qform(), image.get_sform())
    # the corner voxel of the crop is voxel (0, 1, 1) of the input
    assert hr.affine == pytest.approx(AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]]))
    assert hr.get_fdata() == pytest.approx(nib.load(volume).get_fdata()[:36, 1:29, 1:6])
    degraded = demo.Degradation()(torch.from_numpy(sr.get_fdata()).movedim(-1, 0)).movedim(0, -1).numpy()
    assert np.abs(degraded - lr.get_fdata()).mean() < 0.03 * lr.get_fdata().max()  # as far as the damping allows
    assert volume.read_bytes() == before


def test_the_table_compares_what_was_written(volume: Path, resolver: SuperResolver, tmp_path: Path) -> None:
    result = run_demo(volume, resolver, tmp_path / "out", num_slices=5)
    with result.rows.open(newline="", encoding="utf-8") as file:
        found = {(row["method"], row["slice"]): float(row["PSNR"]) for row in csv.DictReader(file)}
    assert len(found) == 25
    hr, sr = (torch.from_numpy(nib.load(path).get_fdata()) for path in (result.truth, result.super_resolved))
    low, high = ScaleIntensityRobust().window(hr)
    for i in range(5):
        x, y = (((image[..., i] - low) / (high - low)).clamp(0, 1)[None, None] for image in (sr, hr))
        assert found["MIAR", str(i)] == pytest.approx(psnr(x, y).item(), abs=1e-3)
    assert result.table.read_text(encoding="utf-8").startswith("5 slices of 1 patient;")
    assert result.picture.stat().st_size > 10_000


def test_a_second_demo_replaces_the_first(volume: Path, resolver: SuperResolver, tmp_path: Path) -> None:
    first, second = (run_demo(volume, resolver, tmp_path / "out", num_slices=n) for n in (3, 5))
    assert first == second
    assert nib.load(second.super_resolved).shape[2] == 5


def test_the_template_has_the_expected_shape_and_orientation() -> None:
    pytest.importorskip("nilearn")
    image = nib.load(template())
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.shape == (197, 233, 189)


def test_without_nilearn_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"not installed: install it with pip install miar-monai\[demo\]"):
        template()


def test_the_command_prints_the_table_and_the_files(
    resolver: SuperResolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brain = write_nifti(tmp_path / "brain.nii.gz", np.random.rand(37, 31, 41), AFFINE)
    monkeypatch.setattr(demo, "template", lambda: brain)
    result = CliRunner().invoke(
        main, ["demo", "-o", f"{tmp_path}/out", "--model", str(resolver.bundle), "--device=cpu"]
    )
    assert result.exit_code == 0, result.output
    assert "| MIAR |" in result.stdout
    assert all(str(tmp_path / "out" / name) in result.stdout for name in ("sr.nii.gz", "comparison.png", "metrics.csv"))


def test_the_command_reports_an_error_in_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--model", str(tmp_path), "-o", f"{tmp_path}/out", "--device", "cpu"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_the_written_lr_volume_is_the_degraded_hr_volume(volume: Path, tmp_path: Path) -> None:
    truth, low_resolution = degrade(volume, tmp_path / "out", num_slices=7)
    hr, lr = (torch.from_numpy(nib.load(path).get_fdata()).movedim(-1, 0) for path in (truth, low_resolution))
    torch.testing.assert_close(demo.Degradation()(hr), lr, atol=1e-3, rtol=0)
