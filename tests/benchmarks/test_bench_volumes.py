from __future__ import annotations

import csv
from pathlib import Path

import pytest
from helpers.bundle_runs import TOKENS
from helpers.tiny_bundle import write_tiny_bundle
from nibabel.affines import voxel_sizes

from benchmarks import bench_volumes
from miar_monai.data.io import read_volume
from miar_monai.errors import OutputError

pytest.importorskip("nilearn", reason="the extra `demo` is not installed")

STAGES = ["read", "blur", "preprocess", "network", "postprocess", "write", "report"]


@pytest.fixture
def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("BRAIN", "miar_brats"), ("THICK", "miar_brats"), ("CT", TOKENS)):
        bundle = str(write_tiny_bundle(tmp_path / name, kind))
        monkeypatch.setattr(bench_volumes, name, getattr(bench_volumes, name)._replace(bundle=bundle))


def test_synthetic_volumes_have_the_properties_of_their_kind(tmp_path: Path) -> None:
    brain = read_volume(bench_volumes.write_lr(tmp_path / "brain.nii.gz", bench_volumes.BRAIN, 155))
    thick = read_volume(bench_volumes.write_lr(tmp_path / "thick.nii.gz", bench_volumes.THICK, 31))
    chest = read_volume(bench_volumes.write_lr(tmp_path / "chest.nii.gz", bench_volumes.CT, 3))
    assert [volume.array.shape for volume in (brain, thick, chest)] == [(60, 60, 155), (240, 240, 31), (128, 128, 3)]
    assert brain.dtype == thick.dtype == chest.dtype == "int16"
    assert voxel_sizes(brain.affine).tolist() == [4, 4, 1]
    assert voxel_sizes(thick.affine).tolist() == [1, 1, 5]
    assert -50 < thick.array.min() < 50 < 900 < thick.array.max() < 1400
    assert -50 < brain.array.min() < 50 < 900 < brain.array.max() < 1400
    assert -1100 < chest.array.min() < -950 < 500 < chest.array.max() < 1100


@pytest.mark.usefixtures("_tiny")
def test_stages_add_up_and_both_files_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"brain_slices": 2, "thick_slices": 1, "ct_slices": 1, "growth": (1, 3), "repeats": 1, "listed": 7}
    options["lookahead_tokens"] = 0
    bench_volumes.main("cpu", output_dir=str(tmp_path / "out"), **options)
    text = (tmp_path / "out" / "volumes.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert ", lookahead_tokens 0." in text
    rows = list(csv.DictReader((tmp_path / "out" / "volumes.csv").read_text().splitlines()))
    assert [row["volume"] for row in rows[:-1]] == [
        "brain MRI 60 x 60 x 2, factor 4 x 4 x 1", "brain MRI 240 x 240 x 1, factor 1 x 1 x 5",
        "chest CT 128 x 128 x 1, factor 4 x 4 x 1", "brain MRI 60 x 60 x 1, factor 4 x 4 x 1",
        "brain MRI 60 x 60 x 3, factor 4 x 4 x 1",
    ]  # fmt: skip
    found = rows.pop()
    assert (found["volumes"], float(found["s to find them"]) > 0) == ("7", True)
    for row in rows:
        seconds = [float(row[f"{stage} (s)"]) for stage in STAGES]
        assert min(seconds) > 0
        assert sum(seconds) == pytest.approx(float(row["whole (s)"]))
    assert [float(row["result, float32 (MiB)"]) for row in rows[1:3]] == pytest.approx([5 * 240**2 / 2**18, 1])
    with pytest.raises(OutputError, match=r"volumes\.csv exists already"):
        bench_volumes.main("cpu", output_dir=str(tmp_path / "out"), **options)


def test_the_plan_multiplies() -> None:
    sizes = {"file in (MiB)": 1, "file out (MiB)": 10}
    planned = bench_volumes.plan({"volume": "a", "whole (s)": 3.6, "read (s)": 0.9, "network (s)": 2.7, **sizes})
    assert planned["hours of one process"] == pytest.approx(100)
    assert (planned["slowest stage"], planned["its share (%)"]) == ("network", pytest.approx(75))
    assert planned["files out (TB)"] == pytest.approx(1.048576)
