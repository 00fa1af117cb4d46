from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bundle_runs import BUNDLES
from helpers.phantoms import write_brats_folder
from helpers.tiny import started
from torch import Tensor

from benchmarks import posterior
from benchmarks.posterior import BANDS, Body, Calibration, crps_of, patient_row, spectrum_rows
from miar_monai.errors import SettingError
from miar_monai.networks import Estimator
from miar_monai.networks.weights import save_weights

SIZES: dict[str, Any] = {"channels": [8, 16], "blocks": [1, 1], "guide_channels": 1}


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def body(std: float, count: int = 4000, seed: int = 0) -> Body:
    """Return voxels whose standard deviation differs, with samples that have ``std`` times the true one."""
    scale, center = (drawn((count,), seed) / 2).exp(), drawn((count,), seed + 1)
    truth = center + scale * drawn((count,), seed + 2)
    return Body(truth, center, scale, center[:, None] + std * scale[:, None] * drawn((count, 16), seed + 3))


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Write heads of three patients, and the weights and the config of a tiny network that samples; return options."""
    write_brats_folder(tmp_path / "data", 3, (40, 36, 6))
    split = {"training": [], "validation": ["BraTS_00000"], "test": ["BraTS_00001", "BraTS_00002"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    torch.manual_seed(0)
    network = started(Estimator(**SIZES, noise_channels=1))
    torch.nn.init.normal_(network.unet.conv_in.weight[:, -4:], std=0.5)
    network.unet.conv_out.weight.data.mul_(0.1)
    save_weights(network, tmp_path / "sampling.pt")
    sizes = {f"network_def#{key}": value for key, value in SIZES.items()}
    (tmp_path / "overlay.json").write_text(json.dumps(sizes))
    return {
        "dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json"), "device": "cpu",
        "bundle": str(BUNDLES / "miar_brats"), "output_dir": str(tmp_path / "out"), "num_slices": 2, "every": 1,
        "metrics": ["PSNR"], "overlay": str(tmp_path / "overlay.json"), "noise_channels": 1, "samples": 4,
        "checkpoint": str(tmp_path / "sampling.pt"),
    }  # fmt: skip


def test_samples_of_the_true_distribution_have_the_figures_of_it() -> None:
    calibration = Calibration.of([body(1.0, seed=10)])
    assert calibration.interval_factor == pytest.approx(1.0, abs=0.05)
    row = patient_row([body(1.0), body(1.0, seed=4)], calibration)
    assert row["spread over skill"] == pytest.approx(1.0, abs=0.05)
    assert [row["coverage"], row["coverage, conformal"]] == pytest.approx([0.9, 0.9], abs=0.02)
    assert row["CRPS, samples"] < row["CRPS, Laplace"]  # the truth is normal
    assert row["rank correlation, samples"] > 0.3
    assert row["AUSE, samples"] == pytest.approx(row["AUSE, regression"], abs=0.05)


def test_a_factor_from_the_validation_patients_mends_the_coverage_of_samples_that_are_too_alike() -> None:
    calibration = Calibration.of([body(0.5, seed=10)])
    row = patient_row([body(0.5)], calibration)
    assert calibration.interval_factor > 1.8
    assert row["coverage"] < 0.7
    assert row["coverage, conformal"] == pytest.approx(0.9, abs=0.02)
    assert row["spread over skill"] < 0.6
    assert row["CRPS, samples"] > 1.05 * crps_of(body(1.0), calibration)[0]


def test_the_scale_of_the_rival_is_fitted() -> None:
    """The expected error of the rival counts up to a factor, whatever the factor of the error model."""
    voxels = body(1.0)
    wrong = voxels._replace(expected=3 * voxels.expected)
    scores = [crps_of(one, Calibration.of([one]))[1] for one in (voxels, wrong)]
    assert scores[0] == pytest.approx(scores[1], rel=0.01)


def test_spectra_are_relative_to_the_truth() -> None:
    flat = torch.ones(len(BANDS) - 1)
    power = {"a": {"truth": flat, "one sample": 10 * flat}, "b": {"truth": 2 * flat, "one sample": 2 * flat}}
    assert spectrum_rows(power) == [("one sample", *["+5.00"] * 8)]


def test_the_benchmark_writes_its_tables(options: dict[str, Any], tmp_path: Path) -> None:
    posterior.main(**options)
    text = (tmp_path / "out" / "posterior.md").read_text(encoding="utf-8")
    for part in ("4 samples of one slice of 240 × 240 voxels", "| mean of 4 samples | PSNR | ", "| 0.7–0.8 |"):
        assert part in text
    assert (tmp_path / "out" / "posterior.png").stat().st_size > 10_000
    with (tmp_path / "out" / "posterior_patients.csv").open(newline="") as file:
        patients = {row.pop("subject"): row for row in csv.DictReader(file)}
    assert [*patients] == ["BraTS_00001", "BraTS_00002"]
    assert all(float(row["spread over skill"]) > 0 for row in patients.values())
    with (tmp_path / "out" / "posterior.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    methods = {row["method"] for row in rows}
    assert methods == {"faithful", "perceptual", "one sample", "mean of 4 samples"}
    mean = {method: sum(float(row["PSNR"]) for row in rows if row["method"] == method) for method in methods}
    assert mean["mean of 4 samples"] > mean["one sample"]
    posterior.main(**{**options, "output_dir": str(tmp_path / "again")})
    assert (tmp_path / "again" / "posterior.csv").read_text() == (tmp_path / "out" / "posterior.csv").read_text()


def test_networks_that_do_not_sample_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    save_weights(Estimator(**SIZES), tmp_path / "plain.pt")
    with pytest.raises(SettingError, match="this Estimator was not trained to sample"):
        posterior.main(**{**options, "noise_channels": 0, "checkpoint": str(tmp_path / "plain.pt")})
    with pytest.raises(SettingError, match="samples is 1"):
        posterior.main(**{**options, "samples": 1})
