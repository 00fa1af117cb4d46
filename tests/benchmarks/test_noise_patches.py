from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.phantoms import write_nifti_phantom
from helpers.tiny_bundle import write_bundle_with_data, write_sampling_bundle

from benchmarks import noise_patches
from benchmarks.noise_patches import Patches
from miar_monai.errors import OutputError, SettingError


def texture(seed: int, shape: tuple[int, ...] = (2, 8, 64, 60)) -> np.ndarray:
    return 0.05 * np.random.default_rng(seed).standard_normal(shape)


def test_one_loud_sample_is_a_patch_and_a_loud_place_of_all_samples_is_not() -> None:
    assert Patches.of(texture(0))[:2] == (0, 0)
    loud = texture(0)
    loud[1, 3, 20:32, 10:22] *= 8
    found = Patches.of(loud)
    assert found.count == 1 / 16
    assert 0.2 < found.share * loud.size / 144 < 2
    everywhere = texture(0)
    everywhere[1, :, 10:40, 10:40] *= 4
    assert Patches.of(everywhere).count == 0


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Write a tiny bundle that samples, and data and a split for it; return options."""
    write_bundle_with_data(tmp_path)
    bundle = write_sampling_bundle(tmp_path / "bundle")
    files = {"dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json")}
    return {"bundle": str(bundle), "output_dir": str(tmp_path / "out"), "device": "cpu", **files}


def test_rows_are_without_and_with_the_limit(options: dict[str, Any], tmp_path: Path) -> None:
    scan = write_nifti_phantom(tmp_path / "scan.nii.gz", (24, 20, 3))
    asked = {"grids": "2x2", "noise": (0, 0.01), "num_slices": 2, "every": 2, "samples": 3, "scans": str(scan)}
    noise_patches.main(**options, **asked)
    text = (tmp_path / "out" / "noise_patches.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "limited |" in line]
    titles = [("test, 2x2", "0"), ("test, 2x2", "0.01"), ("scan.nii.gz", "its own")]
    assert [tuple(row[:2]) for row in rows] == [
        (f"{title}, {limit}", noise) for title, noise in titles for limit in ("not limited", "limited")
    ]
    assert "2 slices; 3 samples of each." in text
    assert all(row[5].endswith(" dB") for row in rows[:4])
    assert float(rows[0][5].split()[0]) > float(rows[2][5].split()[0])  # noise
    with pytest.raises(OutputError, match="exists already"):
        noise_patches.main(**options, **asked)
    with pytest.raises(SettingError, match="samples is 2"):
        noise_patches.main(**options | {"overwrite": True}, samples=2)
