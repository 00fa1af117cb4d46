from __future__ import annotations

import csv
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundle_runs import EACH_NETWORK, TOKENS, config, parsed, tiny_tokenizer_file
from helpers.html_page import Page
from helpers.tiny import CODES, tiny_slices, tiny_tokenizer
from helpers.tiny_bundle import write_bundle_with_data, write_paper_runs
from helpers.tiny_peers import shrink_peers
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from benchmarks import table
from benchmarks.paired import differences_table, headline_table, log_ratio, paired, pairs
from benchmarks.peers.loading import TITLES
from benchmarks.plane import perception_distortion
from miar_monai.cli.workflow import SlicePairs
from miar_monai.data.atomic_write import atomic_file
from miar_monai.degradation import Degradation
from miar_monai.errors import CheckpointError, ConfigurationError, DatasetError, OutputError
from miar_monai.evaluation import Row, SuperResolutionEvaluation
from miar_monai.inference.bundle import metadata, weights_path, weights_sha256
from miar_monai.networks.weights import save_weights

FIDELITIES = [f"MIAR, fidelity {fidelity}" for fidelity in ("0", "0.25", "1")]  # of a network without tokens
SWEEP = [f"{name}, greedy" for name in FIDELITIES]
SEARCHES = [f"MIAR, fidelity 0.25, K = {k}" for k in (1, 2, 3)]
BASELINES = ["nearest", "bicubic", "linear inverse"]


# Paired differences


def rows_of(values: dict[str, dict[str, list[float]]], contrast: str = "t2") -> list[Row]:
    """Return rows from {method: {patient: PSNR of each slice}}; LPIPS is a hundredth of it."""
    return [
        {"subject": patient, "contrast": contrast, "slice": i, "method": method, "PSNR": psnr, "LPIPS": psnr / 100}
        for method, patients in values.items()
        for patient, slices in patients.items()
        for i, psnr in enumerate(slices)
    ]


@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=4), min_size=2, max_size=6))
def test_the_interval_is_that_of_a_paired_t_test_over_patients(shifts: list[list[float]]) -> None:
    patients = [np.stack([30 + np.array(shift), np.full(len(shift), 30.0)], axis=1) for shift in shifts]
    result = paired(patients)
    means = [np.mean(shift) for shift in shifts]
    assert result.estimate == pytest.approx(np.mean(means), abs=1e-9)
    assert result.patients == len(shifts)
    if np.ptp(means) > 1e-6:
        wanted = stats.ttest_rel([30 + mean for mean in means], [30] * len(means)).confidence_interval(0.95)
        assert result.t_interval == pytest.approx((wanted.low, wanted.high), abs=1e-6)


def test_a_constant_shift_is_found_without_any_doubt() -> None:
    b = {"p": [30.0, 31.0, 29.5], "q": [25.0, 26.0]}
    a = {patient: [psnr + 0.25 for psnr in slices] for patient, slices in b.items()}
    result = paired(pairs(rows_of({"a": a, "b": b}), "a", "b", "PSNR"))
    assert [result.estimate, *result.t_interval, *result.bootstrap] == pytest.approx([0.25] * 5)


def test_identical_methods_do_not_differ() -> None:
    values = {"p": [30.0, 31.0, 29.5], "q": [25.0, 26.0]}
    rows = rows_of({"a": values, "b": values})
    assert differences_table(rows, ["a"], "b", ["PSNR", "LPIPS"]).splitlines()[2:] == [
        "| a | PSNR | +0.00 | [+0.00, +0.00] | [+0.00, +0.00] | 2 |",
        "| a | LPIPS | +0.0000 | [+0.0000, +0.0000] | [+0.0000, +0.0000] | 2 |",
    ]
    assert "| 1.00 | [1.00, 1.00] | [1.00, 1.00] | 2 |" in headline_table(rows, ["a"], "b").splitlines()[2]


def test_patients_have_equal_weight_regardless_of_their_number_of_slices() -> None:
    a, b = {"p": [31.0] * 40, "q": [27.0]}, {"p": [30.0] * 40, "q": [24.0]}
    assert paired(pairs(rows_of({"a": a, "b": b}), "a", "b", "PSNR")).estimate == pytest.approx(2)


def test_the_ratio_is_the_geometric_mean_over_patients() -> None:
    patients = [np.array([[0.1, 0.4], [0.3, 0.4]]), np.array([[0.8, 0.1]])]  # ratios 1/2 and 8
    result = paired(patients, log_ratio)
    ratio = result.exp()
    assert ratio.estimate == pytest.approx(2)
    assert np.log(ratio.t_interval) == pytest.approx(result.t_interval)
    assert ratio.bootstrap[0] < ratio.estimate < ratio.bootstrap[1]


def test_the_bootstrap_agrees_with_theory_where_there_are_many_patients(rng: np.random.Generator) -> None:
    patients = [np.stack([rng.normal(rng.normal(1, 1), 2, 20), np.zeros(20)], axis=1) for _ in range(100)]
    result = paired(patients)
    # patients and slices are both redrawn, so the noise of the slices' mean, 2² / 20, counts twice
    variance = np.var([values[:, 0].mean() for values in patients]) + np.mean([v[:, 0].var() / 20 for v in patients])
    width = 2 * stats.norm.ppf(0.975) * np.sqrt(variance / 100)
    assert result.bootstrap[1] - result.bootstrap[0] == pytest.approx(width, rel=0.06)
    assert result.bootstrap == paired(patients).bootstrap != paired(patients, seed=1).bootstrap


def test_a_single_patient_has_no_interval() -> None:
    rows = rows_of({"a": {"p": [31.0, 32.0]}, "b": {"p": [30.0, 30.0]}})
    assert differences_table(rows, ["a"], "b", ["PSNR"]).splitlines()[2] == "| a | PSNR | +1.50 | – | – | 1 |"


def test_values_that_are_not_finite_are_left_out_with_their_partner() -> None:
    rows = rows_of({"a": {"p": [np.inf, 32.0], "q": [np.nan]}, "b": {"p": [10.0, 30.0], "q": [30.0]}})
    found = pairs(rows, "a", "b", "PSNR")
    assert [values.tolist() for values in found] == [[[32.0, 30.0]]]


def test_methods_on_different_slices_are_not_compared() -> None:
    with pytest.raises(ValueError, match="not measured on the same slices"):
        pairs(rows_of({"a": {"p": [1.0], "q": [2.0]}, "b": {"q": [2.0], "p": [1.0]}}), "a", "b", "PSNR")


def test_the_headline_compares_with_the_best_data_consistent_peer() -> None:
    better, worse = "late, data-consistent", "early, data-consistent"
    psnr = {"ours": 33.0, "late": 20.0, better: 32.0, "early": 31.0, worse: 31.5}
    values = {name: {"p": [value], "q": [value - 2]} for name, value in {"linear inverse": 29.0, **psnr}.items()}
    rows = rows_of(values, "t1") + rows_of(values, "t2")
    assert table.best_peer(rows, ["early", "late"]) == better
    report = table.paired_report(rows, ["ours"], ["early", "late"], ["PSNR", "LPIPS"])
    assert report.count(f"| ours | PSNR, minus that of {better} (dB) | +1.00 |") == 3  # per contrast and for all
    assert report.count(f"| minus {better} |") == 3
    assert worse not in report
    alone = table.paired_report(rows, ["ours"], [], ["PSNR", "LPIPS"])
    assert "data-consistent" not in alone
    assert alone.count("| minus linear inverse |") == 3


# The plane


def test_the_plane_has_a_point_and_a_name_for_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures: list[Any] = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args: (figures.append(self), original(self, *args)))
    methods = {name: {"p": [20.0 + i]} for i, name in enumerate([*BASELINES, "SwinIR", *SWEEP])}
    methods["LDM-SR"] = {"p": [9.0]}  # below the linear inverse: not enlarged
    rows = rows_of(methods, "t1") + rows_of(methods, "t2")
    path = perception_distortion(rows, tmp_path / "new" / "plane.png", [SWEEP])
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert [text.get_text().split("  ")[-1] for text in figure.legends[0].get_texts()] == list(methods)
    assert [ax.get_title() for ax in figure.axes[:3]] == ["t1", "t2", "all contrasts"]
    for whole, enlarged in zip(figure.axes[:3], figure.axes[3:], strict=True):
        assert [len(ax.collections) for ax in (whole, enlarged)] == [8, 4]
        numbers = [number for ax in (whole, enlarged) for text in ax.texts for number in text.get_text().split(", ")]
        assert sorted(numbers) == list("12345678")
        assert whole.lines[0].get_xydata().tolist() == [[24, 0.24], [25, 0.25], [26, 0.26]]
    with pytest.raises(OutputError, match="exists already"):
        perception_distortion(rows, path)


# Measuring


def volumes(count: int = 2) -> list[SlicePairs]:
    hr = tiny_slices(5)
    return [SlicePairs(f"p{i}", "t2", Degradation()(hr * (1 - 0.1 * i)), hr * (1 - 0.1 * i)) for i in range(count)]


def shifted(lr: Tensor, shift: float) -> Tensor:
    """Bicubic, brighter."""
    return SuperResolutionEvaluation(Degradation(), []).baselines(lr)["bicubic"] + shift


def test_every_method_is_measured_on_every_slice_and_timed() -> None:
    evaluation = SuperResolutionEvaluation(Degradation(), ["PSNR"])
    sizes = []

    def nothing(lr: Tensor) -> Tensor:
        sizes.append(len(lr))
        return shifted(lr, 0)

    table.measure(evaluation, volumes(), {"ours": nothing, "peer": partial(shifted, shift=0.1)}, batch_size=2)
    assert sizes == [2, 2, 2, 1, 2, 2, 1]  # the first batch twice
    learned = [name + more for name in ("ours", "peer") for more in ("", ", data-consistent")]
    keys = [(row["subject"], row["contrast"], row["slice"], row["method"]) for row in evaluation.rows]
    wanted = {(f"p{i}", "t2", j, method) for i in range(2) for j in range(5) for method in BASELINES + learned}
    assert set(keys) == wanted
    assert len(keys) == len(wanted)
    assert all(row["ms per slice"] > 0 for row in evaluation.rows)
    result = paired(pairs(evaluation.rows, "ours", "bicubic", "PSNR"))
    assert [result.estimate, *result.t_interval, *result.bootstrap] == pytest.approx([0] * 5, abs=1e-9)
    assert paired(pairs(evaluation.rows, "peer", "bicubic", "PSNR")).estimate < -1
    assert paired(pairs(evaluation.rows, "peer, data-consistent", "peer", "PSNR")).estimate > 3


def test_the_middle_slice_of_each_volume_is_drawn_whatever_the_batches() -> None:
    methods = {"ours": partial(shifted, shift=0), "peer": partial(shifted, shift=0.1)}
    drawn = []
    for batch_size in (1, 2, 3, 8):
        evaluation = SuperResolutionEvaluation(Degradation(), ["PSNR"])
        drawn.append(table.measure(evaluation, volumes(), methods, batch_size, shown=["bicubic", "peer"]).slices)
    assert all(found == drawn[0] for found in drawn)
    assert [(key, found.position) for key, found in drawn[0].items()] == [(("p0", "t2"), 2), (("p1", "t2"), 2)]
    assert list(drawn[0]["p0", "t2"].pictures) == ["low resolution", "bicubic", "peer", "truth"]


def test_the_tokenizer_report_counts_the_codes_in_use() -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer().eval()
    tokenizer.quantizer.initialize_codebook(tokenizer.encoder(tiny_slices(8)))
    evaluation = SuperResolutionEvaluation(Degradation(), ["PSNR", "SSIM"])
    report = table.tokenizer_report(evaluation, volumes(), tokenizer, batch_size=3)
    tokens = tokenizer.encode(torch.cat([volume.hr for volume in volumes()]))
    per_scale = [len(maps.unique()) for maps in tokenizer.schedule.split(tokens)]
    for side, used in zip(tokenizer.schedule.sides, per_scale, strict=True):
        assert f"| {side} × {side} | {used} | {100 * used / CODES:.1f} % |" in report
    assert f"| all | {len(tokens.unique())} |" in report
    assert [report.count(f"\n| {name} |") for name in ("reconstruction", "without the quantizer")] == [1, 1]
    assert report.startswith("10 slices of 2 patients, t2;")


# The command


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Write a bundle with tiny networks and its weights, and data and a split for it."""
    return write_bundle_with_data(tmp_path)


def make_table(folder: Path, **options: Any) -> tuple[str, list[dict[str, str]]]:
    """Return ``table.md`` and the rows of ``table.csv``."""
    files = {"dataset_dir": str(folder / "data"), "split_file": str(folder / "split.json")}
    table.main(**{"bundle": str(folder / "miar_tiny"), "output_dir": str(folder / "out"), **files, **options})
    with (folder / "out" / "table.csv").open(newline="", encoding="utf-8") as file:
        return (folder / "out" / "table.md").read_text(encoding="utf-8"), list(csv.DictReader(file))


def test_missing_peers_are_listed_and_the_rest_is_measured(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    shutil.copy(config("miar_brats", "metadata"), bundle / "configs")
    text, rows = make_table(bundle.parent)
    learned = [name + more for name in FIDELITIES for more in ("", ", data-consistent")]
    assert {row["method"] for row in rows} == {*BASELINES, *learned}
    assert {row["subject"] for row in rows} == {"BraTS_00002", "BraTS_00003"}
    assert {row["contrast"] for row in rows} == {"t2"}
    assert len(rows) == 2 * 2 * (3 + 2 * 3)
    for sentence in (
        "SwinIR is left out: swinir.pt not found",
        "RCAN is left out: rcan.pt not found",
        "MHCA is left out: mhca.pt not found",
        "LDM-SR is left out: ldm.pt and vae.pt not found",
    ):
        assert f"- {sentence}" in text
        assert sentence in caplog.text
    assert "- plane.png is left out" in text
    assert not (bundle.parent / "out" / "plane.png").exists()
    assert "Tokenizer" not in text  # the network has no tokens
    assert "- The bundle's default is MIAR, fidelity 0.25." in text
    assert "Section test of the split by split.json: BraTS_00002, BraTS_00003." in text
    assert "| minus linear inverse |" in text
    page = Page((bundle.parent / "out" / "table.html").read_text(encoding="utf-8"))
    about = metadata(bundle)
    for sentence in (
        f"Model: {about['name']}, version {about['version']}",
        f"Weights (SHA-256): {weights_sha256(weights_path(bundle))}",
    ):
        assert f"<li>{sentence}</li>" in (bundle.parent / "out" / "table.html").read_text(encoding="utf-8")
        assert f"- {sentence}\n" in text
    assert "Weights of" not in text  # there are no other networks
    patients = [f"slice 1 of BraTS_0000{i}, t2" for i in (2, 3)]
    assert [found["alt"] for tag, found in page.elements if tag == "img"] == [
        f"{title}, {patient}"
        for patient in patients
        for title in ("low resolution", "bicubic", *FIDELITIES, "truth")
    ]  # fmt: skip
    assert {tuple(line[:3]) for line in page.tables[1][1:]} == {
        (row["subject"], row["contrast"], row["method"]) for row in rows
    }
    with pytest.raises(OutputError, match=r"table\.csv exists already"):
        make_table(bundle.parent)


def test_searches_are_measured_for_a_network_with_tokens(tmp_path: Path) -> None:
    write_bundle_with_data(tmp_path, TOKENS)
    text, rows = make_table(tmp_path, metrics=["PSNR"], num_slices=1)
    learned = [name + more for name in SWEEP + SEARCHES for more in ("", ", data-consistent")]
    assert {row["method"] for row in rows} == {*BASELINES, *learned}
    assert "- The bundle's default is MIAR, fidelity 0.25, K = 1." in text
    assert "Left out: tokenizer.pt not found" in text


def test_peers_tokenizer_other_weights_and_contrasts_are_measured_if_given(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = shrink_peers(monkeypatch)
    for name in ("swinir", "rcan", "vae"):
        save_weights(getattr(networks, name)(), tmp_path / "peers" / f"{name}.pt")
    ldm = networks.Denoiser()
    ldm.scale_factor.fill_(1)
    save_weights(ldm, tmp_path / "peers" / "ldm.pt")
    text, rows = make_table(
        bundle.parent,
        contrasts=("t1", "t2"),
        section="validation",
        peers_dir=str(tmp_path / "peers"),
        tokenizer=str(tiny_tokenizer_file(tmp_path)),
        zero_shot=str(bundle / "models" / "model.pt"),
        num_slices=1,
    )
    assert {"SwinIR", "RCAN", "LDM-SR", "MIAR, zero-shot", "LDM-SR, data-consistent"} < {row["method"] for row in rows}
    weights = {title: tmp_path / "peers" / f"{peer}.pt" for peer, title in TITLES.items() if peer != "mhca"}
    for title, file in {**weights, "MIAR, zero-shot": weights_path(bundle)}.items():
        assert f"- Weights of {title} (SHA-256): {weights_sha256(file)}\n" in text
    assert "Weights of MHCA" not in text
    keys = [(row["subject"], row["contrast"], row["slice"], row["method"]) for row in rows]
    assert len(set(keys)) == len(keys) == 2 * 1 * (3 + 2 * (3 + 3 + 1))
    value = {key[1:]: row["PSNR"] for key, row in zip(keys, rows, strict=True)}
    assert value["t1", "0", "MIAR, zero-shot"] == value["t1", "0", FIDELITIES[1]]  # the same weights
    assert value["t1", "0", "RCAN"] != value["t2", "0", "RCAN"]
    comparison, differences, tokenizer = text.split("\n## ")
    for part in (comparison, differences, tokenizer):
        assert [line for line in part.splitlines() if line.startswith("### ")] == [
            "### t1",
            "### t2",
            "### all contrasts",
        ]
    assert "left out: swinir" not in text
    assert differences.count("| minus SwinIR |") == 3
    assert "| without the quantizer |" in tokenizer
    assert "| all |" in tokenizer


def test_guided_rows_see_the_other_contrast_of_the_patient(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_peers(monkeypatch)
    from benchmarks.peers import diffmsr, disc_diff, mhca

    for name, network in (("mmhca", mhca.MMHCA()), ("disc_diff", disc_diff.DisCDiff()), ("diffmsr", diffmsr.DiffMSR())):
        save_weights(network, tmp_path / "peers" / f"{name}.pt")
    options = {"section": "validation", "peers_dir": str(tmp_path / "peers"), "metrics": ["PSNR"], "num_slices": 1}
    text, rows = make_table(bundle.parent, contrasts=("t1", "t2"), guides=("t1", "t2"), **options)
    guided = ["MMHCA, guided", "DisC-Diff, guided", "DiffMSR, guided", *(f"{name}, guided" for name in FIDELITIES)]
    assert {row["method"] for row in rows if "guided" in row["method"]} == {
        *guided, *(f"{name}, data-consistent" for name in guided)
    }  # fmt: skip
    assert text.split("## Paired differences, guided")[1].count("| minus MMHCA, guided |") == 3
    values = {(row["contrast"], row["method"]): row["PSNR"] for row in rows}
    assert values["t2", FIDELITIES[2]] != values["t2", f"{FIDELITIES[2]}, guided"]
    with pytest.raises(DatasetError, match=r"no guide for its t2 among t2: another contrast is needed"):
        make_table(bundle.parent, guides="t2", overwrite=True, **options)


def test_the_control_of_a_network_with_tokens_is_an_estimator(tmp_path: Path) -> None:
    write_bundle_with_data(tmp_path, TOKENS)
    save_weights(parsed(TOKENS, "train_estimator", "network_def"), tmp_path / "estimator.pt")
    text, rows = make_table(tmp_path, metrics=["PSNR"], num_slices=1, control=str(tmp_path / "estimator.pt"))
    assert {f"estimator, fidelity {value}" for value in ("0", "0.25", "1")} < {row["method"] for row in rows}
    assert "| minus estimator, fidelity 0.25 |" in text


@pytest.mark.parametrize("name", EACH_NETWORK)
def test_the_paper_has_a_row_for_each_decoding_with_and_without_data_consistency(name: str, tmp_path: Path) -> None:
    bundle = write_bundle_with_data(tmp_path, name)
    paper = write_paper_runs(bundle, tmp_path / "paper") / "full"
    text, rows = make_table(tmp_path, metrics=["PSNR", "LPIPS"], num_slices=1, paper=str(paper))
    decodings = [f"paper, {name}" for name in ("greedy", "top-k", "top-p", "K = 1", "K = 2", "K = 3")]
    found = {row["method"] for row in rows if row["method"].startswith("paper")}
    assert found == {title + more for title in decodings for more in ("", ", data-consistent")}
    patient = rows[0]["subject"]
    psnr = {row["method"]: row["PSNR"] for row in rows if row["subject"] == patient}
    assert psnr["paper, greedy"] != psnr["paper, top-p"]
    assert psnr["paper, greedy"] != psnr["paper, greedy, data-consistent"]
    ours, theirs = text.split("## Paired differences, the paper's system")
    assert "| minus paper, K = 1 |" in ours
    assert "| minus paper, K = 1, data-consistent |" in ours
    assert "| paper, K = 1 | PSNR |" in theirs
    assert "| without the quantizer |" in theirs.split("## Tokenizer of the paper")[1]


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"contrast": "t1"}, ConfigurationError, r"evaluate\.json has no key contrast: an option of this command"),
        ({"bundle": "nowhere"}, ConfigurationError, r"nowhere/configs/evaluate\.json does not exist"),
        ({"off_the_shelf": "nowhere"}, ConfigurationError, "nowhere is not a folder"),
        ({"control": "nowhere.pt"}, CheckpointError, r"there are no weights at nowhere\.pt"),
        ({"paper": "nowhere"}, CheckpointError, r"there are no weights at nowhere/model\.pt; train the paper's system"),
        ({"peers_dir": "nowhere"}, ConfigurationError, "nowhere is not a folder"),
        ({"checkpoint": "nowhere.pt"}, CheckpointError, r"there are no weights at nowhere\.pt"),
        ({"zero_shot": "nowhere.pt"}, CheckpointError, r"there are no weights at nowhere\.pt"),
        ({"overwrite": "true"}, ConfigurationError, "overwrite is 'true'"),
    ],
)
def test_mistakes_are_found_before_the_work(
    bundle: Path, options: dict[str, str], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        make_table(bundle.parent, **options)
    assert not [path for path in (bundle.parent / "out").glob("*") if path.is_file()]


def test_an_existing_picture_of_the_plane_stops_the_run(bundle: Path) -> None:
    with atomic_file(bundle.parent / "out" / "plane.png") as part:
        part.write_text("mine")
    with pytest.raises(OutputError, match=r"plane\.png exists already"):
        make_table(bundle.parent)
