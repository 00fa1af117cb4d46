from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.phantoms import write_nifti_phantom

from benchmarks import large_volume
from miar_monai import SuperResolver
from miar_monai.data.io import read_volume
from miar_monai.inference.memory import MemoryForecast

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "miar_lidc"

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_nifti_phantom(tmp_path / "scan.nii.gz", (24, 20, 5), low=-1000, high=400)


def test_slices_are_repeated_there_and_back(scan: Path, tmp_path: Path) -> None:
    large_volume.write_ct(str(scan), tmp_path / "ct.nii", 13)
    made, source = read_volume(tmp_path / "ct.nii"), read_volume(scan)
    order = [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3, 4]
    np.testing.assert_array_equal(made.array, source.array[..., order].round())
    assert made.dtype == "int16"
    np.testing.assert_allclose(made.affine, source.affine)


def test_the_peak_of_a_process_is_that_of_its_memory(tmp_path: Path) -> None:
    code = "import sys, time, numpy as np; x = np.ones({}, np.uint8); time.sleep(0.5); sys.exit('enough')"
    small, large = (
        large_volume.run([sys.executable, "-c", code.format(size)], tmp_path) for size in ("1", "200 * 2**20")
    )
    assert (large.status, large.errors) == (1, "enough")
    assert large.seconds >= 0.5
    assert large.peak - small.peak == pytest.approx(200 * 2**20, rel=0.05)


def test_a_small_network_takes_a_guide_and_samples_like_that_of_the_bundle(tmp_path: Path) -> None:
    small = large_volume.write_bundle(str(ROOT / "bundles" / "miar_brats"), tmp_path / "small", (4, 8))
    resolver = SuperResolver(small, "cpu", samples=2)
    assert (resolver.network.guide_channels, resolver.network.noise_channels) == (1, 2)
    assert sum(x.numel() for x in resolver.network.parameters()) < 10_000


@pytest.mark.slow
def test_runs_are_measured_and_refusals_quoted(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "out"
    runs = ["--factor 2,2,1 -o thin.nrrd", "--factor 9"]
    large_volume.main(str(scan), 12, str(BUNDLE), (4, 8), runs, str(folder))
    made, refused = csv.DictReader((folder / "large_volume.csv").read_text().splitlines())
    assert (made["options"], made["result"]) == (runs[0], "48 x 40 x 12")
    needed = MemoryForecast([(48, 40, 12)]).needed / 2**30
    assert float(made["result, float32 (GiB)"]) == pytest.approx(needed)
    assert float(made["input, float32 (GiB)"]) == pytest.approx(needed / 4)
    assert float(made["forecast (GiB)"]) == pytest.approx(needed * 5 / 4)  # and the input, held once
    assert 0.1 < float(made["peak for 8 slices (GiB)"]) < 8
    assert float(made["peak / result"]) == pytest.approx(float(made["peak (GiB)"]) / needed)
    assert refused["options"] == runs[1]
    assert refused["stderr"].startswith("error: factor")
    assert (folder / "large_volume.md").read_text() == capsys.readouterr().out.removesuffix("\n")
    assert sorted(path.name for path in folder.iterdir()) == ["large_volume.csv", "large_volume.md"]
