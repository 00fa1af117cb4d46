from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundle_runs import ESTIMATOR
from helpers.tiny import started, tiny_slices
from helpers.tiny_bundle import write_bundle_with_data
from helpers.tiny_peers import shrink_peers
from scipy import stats
from torch import Tensor

from benchmarks import hallucination
from benchmarks.common import every_nth
from benchmarks.correlation_scans import CEILING, FLOOR, Limits, Scans
from benchmarks.frechet import FeatureSets
from benchmarks.paired import jackknife, paired, pairs
from miar_monai.cli.workflow import SlicePairs
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, OutputError, SettingError
from miar_monai.evaluation import SuperResolutionEvaluation
from miar_monai.networks import Estimator
from miar_monai.networks.weights import save_weights

FIDELITIES = [f"MIAR, fidelity {fidelity}" for fidelity in ("0", "0.25", "1")]


def textured(count: int, seed: int = 0) -> Tensor:
    """Return slices with detail in a body that leaves a margin: (count, 1, 90, 70)."""
    hr = torch.rand(count, 1, 90, 70, generator=torch.Generator().manual_seed(seed))
    hr[..., :10, :] = hr[..., 80:, :] = 0
    return hr


# Scans


def test_the_shares_of_a_patient_are_those_of_the_patches_in_the_body() -> None:
    hr = textured(3)
    sr = torch.stack([hr[0], 1 - hr[1], torch.zeros_like(hr[2])])
    limits, body = Limits(side=20), torch.zeros_like(hr, dtype=torch.bool)
    body[..., 10:50, :] = True
    scans = Scans(limits, "ours")
    scans.add({"ours": sr}, hr, body, "p", [7, 8, 9], "t2")
    assert [(row["subject"], row["contrast"], row["slice"]) for row in scans.rows] == [
        ("p", "t2", i) for i in (7, 8, 9)
    ]
    assert [row["labelled below 0.32 (%)"] for row in scans.rows] == [0, 100, 100]
    assert [row["invented below 0.32 (%)"] for row in scans.rows] == [0, 100, 0]
    assert scans.example.note == "slice 8 of p, t2"
    (missing, invented) = scans.example.squares["ours"].values()
    assert not missing
    assert len(invented) == scans.example.count == 5 * 6  # of 8 x 6 patches
    assert {x for x, _ in invented} == {5, 15, 25, 35, 45}  # the middle of the patches
    assert not any(abs(a - c) < 10 and abs(b - d) < 10 for a, b in invented for c, d in invented if (a, b) != (c, d))


def test_slices_without_a_body_are_left_out_of_the_means() -> None:
    hr, body = textured(2), torch.ones(2, 1, 90, 70, dtype=torch.bool)
    body[1] = False
    scans = Scans(Limits(side=20), "ours")
    for patient in "pq":
        scans.add({"ours": 1 - hr, FLOOR: hr}, hr, body, patient, [0, 1])
    result = paired(pairs(scans.rows, "ours", FLOOR, "invented below 0.32 (%)"))
    assert (result.estimate, result.patients) == (100, 2)
    report = scans.report(0.25)
    assert "| ours | invented below 0.32 (%) | 100.0 | [100.0, 100.0] | [100.0, 100.0] | 2 |" in report
    assert f"| {FLOOR} | invented below 0.32 (%) | +100.0 | [+100.0, +100.0] |" in report
    assert f"| {FLOOR} | invented below 0.5 (%) | 0.0 |" in report
    assert "the Nyquist frequency of the input is at 0.25" in report


def test_the_controls_bracket_the_scan() -> None:
    """The linear inverse invents nothing; the mirrored detail is invented, although it explains the input."""
    degradation, hr = Degradation(), torch.nn.functional.pad(textured(2), (13, 13, 3, 3))
    evaluation, scans = SuperResolutionEvaluation(degradation, []), Scans(Limits(side=24), FLOOR)
    volume = SlicePairs("p", None, degradation(hr), hr)
    methods = {FLOOR: evaluation.baseline_methods[FLOOR], "truth": lambda lr: hr[: len(lr)]}
    peers = {"dark": lambda lr: torch.zeros_like(hr[: len(lr)])}
    hallucination.measure([volume], methods, peers, evaluation, scans, None, batch_size=2)
    assert "contrast" not in scans.rows[0]
    for method, labelled, invented in (
        (FLOOR, (90, 100), (0, 5)),
        (CEILING, (90, 100), (75, 100)),
        ("truth", (0,), (0,)),
    ):
        rows = [row for row in scans.rows if row["method"] == method]
        assert len(rows) == 2
        for kind, wanted in (("labelled", labelled), ("invented", invented)):
            assert all(min(wanted) <= row[f"{kind} below 0.5 (%)"] <= max(wanted) for row in rows), (method, kind)
    shares = {
        name: [row[key] for row in scans.rows if row["method"] == name for key in row if "%" in key]
        for name in ("dark", "dark, data-consistent", FLOOR)
    }
    assert shares["dark"] == [100, 0] * 8  # all detail is missing, at all frequencies
    assert shares["dark, data-consistent"] == pytest.approx(shares[FLOOR], abs=5)  # the correction of nothing


# Fréchet distances


def pixels(images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return two features of each voxel in a mask."""
    return {"voxels": torch.cat([images, images.square()], dim=1).movedim(1, -1)[mask[:, 0]]}


def test_the_distance_does_not_depend_on_batches_and_has_the_interval_of_the_jackknife() -> None:
    sets, hr = [FeatureSets(pixels), FeatureSets(pixels)], [textured(4, seed) for seed in range(3)]
    body = hr[0] > 0
    for found, size in zip(sets, (1, 4), strict=True):
        for patient, images in enumerate(hr):
            for start in range(0, 4, size):
                part = slice(start, start + size)
                estimates = {"same": images[part].flip(-1), "darker": 0.5 * images[part]}
                found.add(estimates, images[part], body[part], str(patient))
    for method in ("same", "darker"):
        (one, without), (again, _) = (found.distances("voxels", method) for found in sets)
        assert one == pytest.approx(again, abs=1e-9)
        assert len(without) == 3
        assert (one < 1e-3) == (method == "same")
    alone = FeatureSets(pixels)
    for patient in (1, 2):
        alone.add({"darker": 0.5 * hr[patient]}, hr[patient], body, str(patient))
    assert sets[0].distances("voxels", "darker")[1][0] == pytest.approx(
        alone.distances("voxels", "darker")[0], abs=1e-9
    )
    table = sets[0].table("same").splitlines()
    assert [line.split(" | ")[4] for line in table[2:]] == ["", f"+{sets[0].distances('voxels', 'darker')[0]:.2f}"]


def test_a_single_patient_has_a_distance_without_an_interval() -> None:
    sets, hr = FeatureSets(pixels), textured(2)
    sets.add({"darker": 0.5 * hr}, hr, hr > 0, "p")
    assert sets.table("darker").splitlines()[2].split(" | ")[3] == "–"


def test_the_jackknife_of_a_mean_is_the_t_interval(rng: np.random.Generator) -> None:
    values = rng.normal(3, 2, 9)
    result = jackknife(values.mean(), [np.delete(values, i).mean() for i in range(9)])
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert result.t_interval == pytest.approx((wanted.low, wanted.high))
    assert np.isnan(result.bootstrap).all()


# The command


def test_every_nth_slice_is_from_the_middle_of_the_first_n() -> None:
    hr = tiny_slices(7)
    (volume,) = every_nth([SlicePairs("p", None, hr, hr)], 3)
    assert torch.equal(volume.hr, hr[[1, 4]])
    assert torch.equal(volume.lr, volume.hr)
    with pytest.raises(SettingError, match="every is 0"):
        every_nth([], 0)
    with pytest.raises(SettingError, match="between 1 and 7"):
        every_nth([SlicePairs("p", None, hr, hr)], 8)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Write a bundle with a tiny network, its weights, and data and a split for it; return options."""
    bundle = write_bundle_with_data(tmp_path)
    files = {"dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json")}
    return {"bundle": str(bundle), "output_dir": str(tmp_path / "out"), "device": "cpu", **files}


def run(options: dict[str, Any], **more: Any) -> tuple[str, list[dict[str, str]]]:
    """Return ``hallucination.md`` and the rows of ``hallucination.csv``."""
    hallucination.main(**options | more)
    folder = Path((options | more)["output_dir"])
    assert (folder / "hallucination.png").stat().st_size > 10_000
    with (folder / "hallucination.csv").open(newline="", encoding="utf-8") as file:
        return (folder / "hallucination.md").read_text(encoding="utf-8"), list(csv.DictReader(file))


def test_without_peers_and_weights_the_scan_is_written(options: dict[str, Any]) -> None:
    text, rows = run(options, every=2, num_slices=4, patch_side=32, threshold=0.7, cutoff=0.3)
    assert {row["method"] for row in rows} == {FLOOR, *FIDELITIES, "one sample", CEILING}
    assert {(row["subject"], row["contrast"], row["slice"]) for row in rows} == {
        (f"BraTS_0000{i}", "t2", j) for i in (2, 3) for j in ("1", "3")
    }
    for part in (
        "- RCAN is left out: rcan.pt not found",
        "- Fréchet distance is left out: its weights",
        "One in 2 of the 4 slices of a volume.",
        "Patches of 32 × 32 voxels",
        "below 0.7 before 0.3 of",
        "one sample, minus each other method",
        "| MIAR, fidelity 1 | invented below 0.3 (%) |",
    ):
        assert part in text
    assert "## Fréchet distance" not in text
    with pytest.raises(OutputError, match="exists already"):
        run(options)


@pytest.mark.weights
@pytest.mark.usefixtures("lpips_weights")
def test_samples_and_peers_have_rows_and_distances(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = shrink_peers(monkeypatch)
    save_weights(networks.rcan(), tmp_path / "peers" / "rcan.pt")
    torch.manual_seed(0)
    network = started(Estimator(**ESTIMATOR, guide_channels=1, noise_channels=1))
    torch.nn.init.normal_(network.unet.conv_in.weight[:, -4:], std=0.5)  # the noise matters
    network.unet.conv_out.weight.data.mul_(0.1)  # and the network does not diverge
    save_weights(network, tmp_path / "sampling.pt")
    sampling = {"checkpoint": str(tmp_path / "sampling.pt"), "noise_channels": 1, "peers_dir": str(tmp_path / "peers")}
    text, rows = run(options, num_slices=4, every=2, **sampling)
    methods = [FLOOR, *FIDELITIES, "one sample", "RCAN", "RCAN, data-consistent", CEILING]
    assert list(dict.fromkeys(row["method"] for row in rows)) == methods
    scan, distances = text.split("## Fréchet distance")
    assert "one sample, minus each other method" in scan
    for layer in ("layer 2", "layer 5"):
        assert [line.split(" | ")[0][2:] for line in distances.splitlines() if f" | {layer} | " in line] == methods
    assert "RCAN is left out" not in text
    more = {"output_dir": str(tmp_path / "other"), "sample_seed": 1}
    others = run(options, num_slices=4, every=2, **sampling, **more)[0].split("## Fréchet distance")[1]
    lines = [
        [line.split(" | ")[:4] for line in part.splitlines() if " | layer" in line] for part in (distances, others)
    ]
    assert [a[0] for a, b in zip(*lines, strict=True) if a != b] == ["| one sample"] * 2


@pytest.mark.parametrize(
    ("setting", "error", "sentence"),
    [
        ({"patch_side": 3}, SettingError, "patch_side is 3"),
        ({"threshold": 1.5}, SettingError, "threshold is 1.5"),
        ({"cutoff": -0.1}, SettingError, "cutoff is -0.1"),
        ({"every": 0}, SettingError, "every is 0"),
        ({"patch_side": 300}, ConfigurationError, "patches of 300 voxels do not fit into slices of 256 voxels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    options: dict[str, Any], setting: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        hallucination.main(**options, num_slices=2, **setting)
    folder = Path(options["output_dir"])
    assert not folder.exists() or list(folder.iterdir()) == []
