from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundle_runs import BUNDLES
from helpers.phantoms import write_brats_folder
from helpers.tiny import started

from benchmarks import every_factor, guide
from benchmarks.every_factor import FACTORS, GRIDS, SIDE, degradation_of, parse_checkpoint
from benchmarks.paired import paired, pairs
from miar_monai.cli.workflow import load_slice_pairs, read_config
from miar_monai.errors import CheckpointError, ConfigurationError, DatasetError, OutputError
from miar_monai.networks import Estimator
from miar_monai.networks.weights import save_weights

SIZES: dict[str, Any] = {"channels": [8, 16], "blocks": [1, 1]}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Write heads of three patients, tiny estimators, and the config that describes them; return options."""
    write_brats_folder(tmp_path / "data", 3, (40, 36, 6))
    split = {"training": [], "validation": ["BraTS_00000"], "test": ["BraTS_00001", "BraTS_00002"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    for channels in (0, 1):
        network = {"_target_": "miar_monai.networks.Estimator", **SIZES, "guide_channels": channels}
        (tmp_path / f"overlay{channels}.json").write_text(json.dumps({"network_def": network}))
        torch.manual_seed(channels)
        estimator = started(Estimator(**SIZES, guide_channels=channels))
        estimator.unet.conv_out.weight.data.mul_(0.1)
        save_weights(estimator, tmp_path / f"network{channels}.pt")
    save_weights(Estimator(**SIZES), tmp_path / "linear.pt")  # untrained, so the linear estimate
    return {
        "dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json"), "device": "cpu",
        "bundle": str(BUNDLES / "miar_brats"), "output_dir": str(tmp_path / "out"), "num_slices": 2,
        "metrics": ["PSNR"], "overlay": str(tmp_path / "overlay0.json"),
    }  # fmt: skip


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{**row, "PSNR": float(row["PSNR"])} for row in csv.DictReader(file)]


def mean(rows: list[dict[str, Any]], **keys: str) -> float:
    return float(np.mean([row["PSNR"] for row in rows if all(row[key] == value for key, value in keys.items())]))


# Every factor


def test_every_grid_fits_the_slices_and_has_its_degradation() -> None:
    assert len(GRIDS) == 2 * len(FACTORS)
    hr = torch.rand(1, 1, SIDE, SIDE)
    for grid in GRIDS:
        degradation = degradation_of(grid)
        lr = degradation(hr)
        assert degradation.for_lr(lr).hr_shape == (SIDE, SIDE), grid
        rows, columns = degradation.axes((SIDE, SIDE), tuple(lr.shape[2:]))
        assert np.prod(lr.shape) * np.prod(degradation.scales) == pytest.approx(SIDE**2)
        if grid.endswith("x1"):
            assert (rows.profile, rows.thickness, rows.sigma, columns.sigma) == ("gaussian", 1, 0, 0)
            assert torch.equal(columns.matrix(), torch.eye(SIDE, dtype=torch.float64))
        else:
            assert (rows.profile, rows.sigma) == ("bicubic", 1)
            assert rows == columns
    assert degradation_of("1x3").axes((6, 9), (6, 3))[1].profile == "gaussian"


@pytest.mark.parametrize("grid", ["4", "1x1", "2x3", "0.5x1", "axb", "-2x-2", "2x2x2"])
def test_other_grids_are_an_error(grid: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a grid"):
        degradation_of(grid)


def test_checkpoints_are_files_with_names() -> None:
    assert parse_checkpoint("all=a=b.pt") == ("all", "", "a=b.pt")
    for text in ("all", "=a.pt", "all="):
        with pytest.raises(ConfigurationError, match="is not NAME=FILE"):
            parse_checkpoint(text)


def test_networks_are_measured_on_their_grids_and_compared(options: dict[str, Any]) -> None:
    folder = Path(options["output_dir"]).parent
    networks = (f"all={folder / 'linear.pt'}", f"alone@5x1={folder / 'network0.pt'}")
    every_factor.main(*networks, **options, grids="5x1,1.5x1.5", contrasts=("t1", "t2"))
    rows = read_rows(folder / "out" / "every_factor.csv")
    assert {row["subject"] for row in rows} == {"BraTS_00001", "BraTS_00002"}
    baselines = {"bicubic", "linear inverse", "all, faithful", "all, perceptual"}
    methods = {grid: {row["method"] for row in rows if row["grid"] == grid} for grid in ("5x1", "1.5x1.5")}
    assert methods == {"1.5x1.5": baselines, "5x1": baselines | {"alone, faithful", "alone, perceptual"}}
    assert len(rows) == 2 * 2 * 2 * (4 + 6)
    for grid in methods:
        linear, bicubic = (mean(rows, grid=grid, method=name) for name in ("linear inverse", "bicubic"))
        assert mean(rows, grid=grid, method="all, faithful") == pytest.approx(linear, abs=1.5)
        assert linear > bicubic
    assert mean(rows, grid="1.5x1.5") > mean(rows, grid="5x1")
    text = (folder / "out" / "every_factor.md").read_text(encoding="utf-8")
    at_5 = [row for row in rows if row["grid"] == "5x1"]
    wanted = paired(pairs(at_5, "all, faithful", "alone, faithful", "PSNR")).estimate
    section = text.split("| minus alone, faithful |")[1].splitlines()[2]
    assert section.startswith(f"| all, faithful | PSNR | {wanted:+.2f} | [")
    assert text.count("| minus linear inverse |") == 2 * 2
    with pytest.raises(OutputError, match=r"every_factor\.csv exists already"):
        every_factor.main(**options)


def test_interpolation_needs_no_network(options: dict[str, Any]) -> None:
    every_factor.main(**options, grids="2x2", section="validation")
    rows = read_rows(Path(options["output_dir"]) / "every_factor.csv")
    assert {row["method"] for row in rows} == {"bicubic", "linear inverse"}
    assert "Paired" not in Path(options["output_dir"], "every_factor.md").read_text()


def test_other_weights_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="belongs to another network"):
        every_factor.main(f"all={Path(options['output_dir']).parent / 'network1.pt'}", **options)


# The guide


def test_a_guide_is_measured_at_each_displacement(options: dict[str, Any]) -> None:
    folder = Path(options["output_dir"]).parent
    options["overlay"] = str(folder / "overlay1.json")
    guide.main(f"net={folder / 'network1.pt'}", **options, shifts=(0, 2), grids=("4x4", "5x1"))
    rows = read_rows(folder / "out" / "guide.csv")
    assert {row["contrast"] for row in rows} == {"t2"}
    titles = ("no guide", "t1 moved by 0 mm", "t1 moved by 2 mm")
    methods = {f"net, {estimate}, {title}" for estimate in ("faithful", "perceptual") for title in titles}
    assert {row["method"] for row in rows} == methods | {"linear inverse"}
    assert len({mean(rows, grid="4x4", method=f"net, faithful, {title}") for title in titles}) == 3
    text = (folder / "out" / "guide.md").read_text(encoding="utf-8")
    found = guide.by_patient(
        [row for row in rows if row["grid"] == "5x1"],
        "net, faithful, t1 moved by 2 mm",
        "net, faithful, no guide",
        "PSNR",
    )
    keys = {"grid": "5x1", "subject": "BraTS_00002"}
    moved, without = (mean(rows, **keys, method=f"net, faithful, {title}") for title in (titles[2], titles[0]))
    assert found["BraTS_00002"] == pytest.approx(moved - without)
    assert f"{found['BraTS_00002']:+.2f} |" in text.split("## 5x1")[1]
    assert "t2, guided by t1." in text


def test_a_guide_moves_by_millimeters_of_the_patient(options: dict[str, Any]) -> None:
    settings = {key: options[key] for key in ("dataset_dir", "split_file")} | {"num_slices": 4, "device": "cpu"}
    config = read_config(options["bundle"], {**settings, "datalist#contrasts": ["t1"]})
    volumes = load_slice_pairs(config)
    still, moved = (guide.load_guides(config, volumes, mm) for mm in (0, 3 * 3**0.5))  # 3 mm along each axis
    for volume, slices, others in zip(volumes, still, moved, strict=True):
        ratio = slices.sum() / volume.hr.sum()  # scaled by the whole volume, not by its central slices
        assert torch.allclose(slices, ratio * volume.hr, atol=1e-5)
        ahead, behind = others[2:, :, 113:133, 113:133], slices[:-2, :, 110:130, 110:130]  # voxels of 1 × 1 × 1.5 mm
        assert torch.allclose(ahead, behind, atol=1e-3)


def test_guides_need_a_network_that_accepts_them_and_a_volume_each(options: dict[str, Any]) -> None:
    folder = Path(options["output_dir"]).parent
    with pytest.raises(ConfigurationError, match="the network net accepts no guide"):
        guide.main(f"net={folder / 'network0.pt'}", **options)
    with pytest.raises(ConfigurationError, match="no network is given"):
        guide.main(**options)
    options["overlay"] = str(folder / "overlay1.json")
    (folder / "data" / "BraTS_00002" / "BraTS_00002_t1.nii.gz").unlink()
    with pytest.raises(DatasetError, match="BraTS_00002 has no volume of the guide's contrast"):
        guide.main(f"net={folder / 'network1.pt'}", **options)
