from __future__ import annotations

import base64
import csv
import io
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures are read by Pillow, of the extra demo")

from helpers.html_page import Page
from hypothesis import given
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from PIL import Image
from torch import Tensor, nn

from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, OutputError
from miar_monai.evaluation import EvaluationHandler, SlicePictures, SuperResolutionEvaluation, by_contrast
from miar_monai.evaluation.metrics import psnr
from miar_monai.inference.bundle import model_notes

METRICS = ["PSNR", "SSIM", "PSNR body"]


@pytest.fixture
def hr(phantom: Tensor) -> Tensor:
    return nn.functional.pad(phantom.movedim(-1, 0), (0, 13, 0, 3))  # 40 x 44: multiples of 4


METHODS = ("nearest", "bicubic", "linear inverse", "MIAR", "MIAR, data-consistent")
PICTURES = ("low resolution", *METHODS[1:], "truth")
"""Low resolution, enlarged by a browser, is the nearest voxel."""


def evaluation(metrics: list[str] = METRICS) -> SuperResolutionEvaluation:
    return SuperResolutionEvaluation(Degradation(), metrics)


def cells(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {method: values for method, *values in lines}


def test_each_slice_has_a_row_for_each_method(hr: Tensor) -> None:
    measure = evaluation()
    measure(Degradation()(hr), hr, hr, "a", range(7))
    assert [(row["method"], row["slice"]) for row in measure.rows] == [
        (method, i) for method in METHODS for i in range(7)
    ]


def test_the_truth_is_perfect_and_the_baselines_keep_their_known_order(hr: Tensor) -> None:
    measure = evaluation(["PSNR", "SSIM"])
    measure(Degradation()(hr), hr, hr, "a", range(7))
    mean = {method: np.mean([row["PSNR"] for row in measure.rows if row["method"] == method]) for method in METHODS}
    assert mean["nearest"] < mean["bicubic"] < mean["linear inverse"] < mean["MIAR"] == math.inf


def test_the_batch_size_changes_nothing(hr: Tensor) -> None:
    one, all_at_once = evaluation(), evaluation()
    one.batch_size = 1
    for measure in (one, all_at_once):
        measure(Degradation()(hr), hr.flip(0), hr, "a", range(7))
    for a, b in zip(one.rows, all_at_once.rows, strict=True):
        assert [a[name] for name in METRICS] == pytest.approx([b[name] for name in METRICS], rel=1e-5, nan_ok=True)


def test_intensities_are_clamped_before_they_are_measured(hr: Tensor) -> None:
    measure = evaluation(["PSNR"])
    measure(Degradation()(hr), torch.where(hr > 0.5, 7.0, hr), hr, "a", range(7))
    wanted = psnr(torch.where(hr > 0.5, 1.0, hr), hr)
    torch.testing.assert_close(torch.tensor([row["PSNR"] for row in measure.rows if row["method"] == "MIAR"]), wanted)


@given(st.lists(st.floats(0.01, 0.5), min_size=2, max_size=5))
def test_the_table_holds_mean_and_standard_deviation_over_slices(errors: list[float]) -> None:
    measure = evaluation(["PSNR"])
    hr = torch.full((len(errors), 1, 16, 16), 0.25)
    sr = hr + torch.tensor(errors).view(-1, 1, 1, 1)
    measure(hr[..., :4, :4], sr, hr, "a", range(len(errors)))
    values = -20 * np.log10(np.float64(np.float32(errors)))
    mean, deviation = map(float, cells(measure.table())["MIAR"][0].split(" ± "))
    assert mean == pytest.approx(values.mean(), abs=0.006)
    assert deviation == pytest.approx(values.std(ddof=1), abs=0.006)


def test_the_table_counts_patients_and_slices_and_lists_missing_values(
    hr: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    measure = evaluation(["PSNR", "LPIPS"])
    for subject in ("a", "b"):
        measure(Degradation()(hr), hr, hr, subject, range(7))
    table = measure.table()
    assert table.startswith("14 slices of 2 patients;")
    assert "- LPIPS is left out" in table
    assert "- PSNR of MIAR: mean over the 0 of 14 finite values." in table
    assert cells(table)["method"] == ["PSNR ↑"]
    assert cells(table)["MIAR"] == ["–"]


def test_slices_of_other_sizes_are_refused(hr: Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"a: the LR slices \(7, 1, 40, 44\), .* are inconsistent at scale 4"):
        evaluation()(hr, hr, hr, "a", range(7))


def test_files_are_written_whole_and_replaced_only_when_allowed(hr: Tensor, tmp_path: Path) -> None:
    measure = evaluation()
    measure(Degradation()(hr), hr, hr, "a", range(7), milliseconds=12.5)
    rows, table = measure.write(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["metrics.csv", "metrics.md"]
    assert table.read_text(encoding="utf-8") == measure.table()
    with rows.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 7 * len(METHODS)
    assert float(read[0]["PSNR"]) == measure.rows[0]["PSNR"]
    assert [row["ms per slice"] for row in (read[0], read[21])] == ["", "12.5"]
    with pytest.raises(OutputError, match=r"metrics\.csv exists already and is left as it is"):
        measure.write(tmp_path / "new")
    measure.write(tmp_path / "new", overwrite=True)


class _Nearest(Inferer):
    """Super-resolve volumes by repeating voxels."""

    def __call__(self, inputs: Tensor, network: nn.Module) -> Tensor:
        return inputs.repeat_interleave(4, 2).repeat_interleave(4, 3)


def run(hr: Tensor, output_dir: Path, names: list[dict[str, str]], **more: Any) -> SuperResolutionEvaluation:
    label = MetaTensor(hr.movedim(0, -1))
    items = []
    for name in names:
        copy = label.clone()
        copy.meta["filename_or_obj"] = name["file"]
        lr = MetaTensor(Degradation()(hr).movedim(0, -1))
        items.append({"image": lr, "label": copy} | {key: name[key] for key in ("subject", "contrast") if key in name})
    measure = evaluation()
    loader = DataLoader(Dataset(items), batch_size=1, num_workers=0)
    handler = EvaluationHandler(measure, output_dir, **more)
    SupervisedEvaluator(torch.device("cpu"), loader, nn.Identity(), inferer=_Nearest(), val_handlers=[handler]).run()
    return measure


def test_the_handler_evaluates_every_slice_and_logs_the_table(
    hr: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="miar_monai.evaluation")
    measure = run(hr, tmp_path, [{"file": "in/a_t2.nii.gz"}, {"file": "in/b_t2.nii.gz", "subject": "b"}])
    assert {row["subject"] for row in measure.rows} == {"a_t2", "b"}
    ours = {(row["subject"], row["slice"]): row["PSNR"] for row in measure.rows if row["method"] == "MIAR"}
    nearest = {(row["subject"], row["slice"]): row["PSNR"] for row in measure.rows if row["method"] == "nearest"}
    assert ours == pytest.approx(nearest)
    assert len(ours) == 14
    assert (tmp_path / "metrics.md").read_text(encoding="utf-8") in caplog.text
    assert all(row["ms per slice"] > 0 for row in measure.rows if row["method"] == "MIAR")


def test_the_handler_keeps_the_contrasts_of_a_patient_apart(hr: Tensor, tmp_path: Path) -> None:
    both = [{"file": f"a_{contrast}.nii.gz", "subject": "a", "contrast": contrast} for contrast in ("t1", "t2")]
    measure = run(hr, tmp_path, both)
    keys = [(row["contrast"], row["slice"], row["method"]) for row in measure.rows]
    assert len(set(keys)) == len(keys) == 2 * 7 * len(METHODS)


def test_the_handler_writes_a_page_with_the_middle_slice_of_each_volume(hr: Tensor, tmp_path: Path) -> None:
    both = [{"file": f"a_{contrast}.nii.gz", "subject": "a", "contrast": contrast} for contrast in ("t1", "t2")]
    run(hr, tmp_path, both)
    page = Page((tmp_path / "metrics.html").read_text(encoding="utf-8"))
    titles = [f"{title}, slice 3 of a, {contrast}" for contrast in ("t1", "t2") for title in PICTURES]
    assert [found["alt"] for tag, found in page.elements if tag == "img"] == titles
    sources = [found["src"] for tag, found in page.elements if tag == "img"]
    pictures = dict(zip(titles, sources, strict=True))
    low, repeated = (pixels_of(pictures[f"{title}, slice 3 of a, t1"]) for title in ("low resolution", "MIAR"))
    np.testing.assert_array_equal(low.repeat(4, 0).repeat(4, 1), repeated)  # of `_Nearest`
    assert len(set(sources[: len(PICTURES)])) == len(PICTURES)
    assert pictures["MIAR, slice 3 of a, t1"] != pictures["truth, slice 3 of a, t1"]
    wanted = SlicePictures()
    wanted.add("a", None, 3, hr[3:4], {}, hr[3:4])
    truth = base64.b64encode(wanted.slices["a", ""].pictures["truth"]).decode()
    assert pictures["truth, slice 3 of a, t2"] == f"data:image/png;base64,{truth}"


@pytest.mark.parametrize("has_metadata", [True, False])
def test_the_page_names_the_weights_and_the_model_if_it_is_of_a_bundle(
    has_metadata: bool, hr: Tensor, tmp_path: Path
) -> None:
    weights, bundle = tmp_path / "other.pt", tmp_path / "bundle"
    weights.write_bytes(b"abc")
    (bundle / "configs").mkdir(parents=True)
    if has_metadata:
        about = {"name": "miar_<b>", "version": "0.2.0", "weights_sha256": "0" * 64}  # of the bundle's own weights
        (bundle / "configs" / "metadata.json").write_text(json.dumps(about))
    run(hr, tmp_path / "out", [{"file": "a.nii.gz"}], notes=model_notes(bundle, weights))
    text = (tmp_path / "out" / "metrics.html").read_text(encoding="utf-8")
    assert re.findall("<li>(.*)</li>", text) == [
        *["Model: miar_&lt;b&gt;, version 0.2.0"][: int(has_metadata)],
        "Weights (SHA-256): ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # of FIPS 180-2
    ]


def pixels_of(source: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode((source or "").partition(",")[2]))))


@pytest.mark.parametrize("name", ["metrics.md", "metrics.html"])
def test_the_handler_stops_at_the_start_if_results_exist(name: str, hr: Tensor, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name} exists already"):
        run(hr, tmp_path, [{"file": "a.nii.gz"}])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_data_consistency_brings_an_estimate_closer_to_the_truth(hr: Tensor) -> None:
    measure = evaluation(["PSNR"])
    measure(Degradation()(hr), 0.9 * hr, hr, "a", range(7))
    mean = {m: np.mean([row["PSNR"] for row in measure.rows if row["method"] == m]) for m in METHODS}
    assert mean["MIAR, data-consistent"] > mean["MIAR"] + 1


def two_contrasts(hr: Tensor) -> SuperResolutionEvaluation:
    """Measure one patient whose T1 is off by 0.1 and whose T2 is off by 0.01."""
    measure = evaluation(["PSNR"])
    for contrast, error in (("t1", 0.1), ("t2", 0.01)):
        truth = torch.full_like(hr, 0.5)
        measure.add({"shifted": truth + error}, truth, "a", range(7), contrast)
    return measure


def test_there_is_a_table_for_each_contrast_and_one_for_all(hr: Tensor) -> None:
    sections = two_contrasts(hr).table().split("### ")
    assert [section.split("\n")[0] for section in sections] == ["", "t1", "t2", "all contrasts"]
    assert [cells(section)["shifted"][0].split(" ± ")[0] for section in sections[1:]] == ["20.00", "40.00", "30.00"]
    counts = [section.split("\n")[2].split(";")[0] for section in sections[1:]]
    assert counts == ["7 slices of 1 patient, t1", "7 slices of 1 patient, t2", "14 slices of 1 patient, t1, t2"]


def test_two_volumes_of_a_patient_count_as_twice_the_slices(hr: Tensor) -> None:
    measure = evaluation(["PSNR"])
    for _ in range(2):
        measure.add({"truth": hr, "darker": 0.9 * hr}, hr, "a", range(7))
    assert measure.table().startswith("14 slices of 1 patient; mean")


def test_the_contrast_column_exists_if_contrasts_are_given(hr: Tensor, tmp_path: Path) -> None:
    with two_contrasts(hr).write_rows(tmp_path / "two.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["contrast"] for row in read] == ["t1"] * 7 + ["t2"] * 7
    measure = evaluation(["PSNR"])
    measure.add({"truth": hr}, hr, "a", range(7))
    header = measure.write_rows(tmp_path / "none.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "subject,slice,method,PSNR,ms per slice"


def test_rows_of_one_contrast_are_not_listed_twice(hr: Tensor) -> None:
    rows = two_contrasts(hr).rows
    assert list(by_contrast(rows[:7])) == ["t1"]
    assert [len(found) for found in by_contrast(rows).values()] == [7, 7, 14]


def test_times_are_medians_of_the_method_that_has_them(hr: Tensor) -> None:
    measure = evaluation(["PSNR"])
    for subject, milliseconds in (("a", 1000.0), ("b", 2.0), ("c", 3.0)):  # the first call warms the device up
        measure.add({"timed": 0.9 * hr, "not": 0.8 * hr}, hr, subject, range(7), milliseconds={"timed": milliseconds})
    assert [cells(measure.table())[method][-1] for method in ("method", "timed", "not")] == ["ms per slice", "3.0", "–"]


def test_estimates_of_another_size_are_refused(hr: Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"a: half has slices \(7, 1, 20, 44\), the truth \(7, 1, 40, 44\)"):
        evaluation().add({"half": hr[:, :, :20]}, hr, "a", range(7))
    with pytest.raises(ConfigurationError, match="there are 6 indices"):
        evaluation().add({"all": hr}, hr, "a", range(6))
