"""Mean intensities of real scans at native resolution, with the shipped weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.levels import RESULT, levels, main
from miar_monai.data.io import Volume, read_volume, write_nifti
from miar_monai.inference.resolver import SuperResolver

SCANS = {
    "T1": "native/SPM_MoAE_t1.nii.gz",
    "T2": "native/torchio_FPG_t2.nii.gz",
    "BraTS T2": "brain/BraTS2021_01484/BraTS2021_01484_t2.nii.gz",
}


@pytest.fixture(scope="module")
def brain_mri() -> SuperResolver:
    return SuperResolver("brats", "cpu", lookahead_tokens=0)


def squares(noise: float) -> Volume:
    """Return squares of 500 and 800 on a background of 0, with noise in percent of 800, clipped and rounded."""
    array = np.zeros((48, 48, 1), np.float32)
    array[8:40, 8:40] = 500
    array[16:24, 16:24] = 800
    noisy = array + np.random.default_rng(0).normal(0, 8 * noise, array.shape)
    return Volume(np.round(noisy.clip(min=0)).astype(np.float32), np.diag([1, 1, 5, 1.0]), np.dtype("int16"), Path("x"))


@pytest.mark.parametrize("fidelity", [0.0, 1.0])
@pytest.mark.parametrize("noise", [0, 1, 2, 3])
def test_homogeneous_regions_keep_their_mean(noise: float, fidelity: float, brain_mri: SuperResolver) -> None:
    volume = squares(noise)
    result = brain_mri.with_settings(fidelity=fidelity).volume(volume)
    means = result.array[..., 0].reshape(48, 4, 48, 4).mean((1, 3))
    difference = (means - volume.array[..., 0])[28:38, 12:36].mean()
    assert abs(difference) < 0.5  # 0.1 % of 500


@pytest.mark.slow
@pytest.mark.parametrize("scan", SCANS)
def test_scans_keep_their_mean_intensity(scan: str, brain_mri: SuperResolver, real_data: Path) -> None:
    volume = read_volume(real_data / SCANS[scan])
    x, y, z = (size // 2 for size in volume.array.shape)
    result = levels(brain_mri, volume._replace(array=volume.array[x - 64 : x + 64, y - 64 : y + 64, z : z + 1]))
    assert result.block < 0.12
    assert abs(result.flat_tissue) < 0.1


@pytest.mark.parametrize(
    ("size", "fraction"), [((40, 48), 0.01), ((20, 24), 0.05)]
)  # the latter is too small to estimate the blur
def test_noiseless_edges_do_not_ring(size: tuple[int, int], fraction: float, brain_mri: SuperResolver) -> None:
    x, y = (np.linspace(-1, 1, side) for side in size)
    ellipse = 500 * (np.hypot(x[:, None], y) < 0.8).astype(np.float32)
    result = brain_mri(ellipse)
    assert 450 < result.max() < 1000
    assert result.min() == 0
    assert result.mean() == pytest.approx(ellipse.mean(), rel=fraction)


def test_the_benchmark_writes_a_row_for_each_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume = squares(1)
    scans = [write_nifti(tmp_path / name, volume.array, volume.affine, np.int16) for name in ("a.nii", "b.nii")]
    main(*map(str, scans), num_slices=1, device="cpu", output_dir=str(tmp_path / "out"), lookahead_tokens=0)
    text = (tmp_path / "out" / RESULT).read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["volume", "a.nii", "b.nii"]
    assert len({len(row) for row in rows}) == 1
    assert float(rows[1][4]) < 0.2
    assert text in capsys.readouterr().out
