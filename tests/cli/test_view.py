"""Pages to look at: ``miar sr --html`` and ``miar view``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers.commands import miar, sr
from helpers.html_page import Page
from helpers.phantoms import write_dicom_series, write_nifti_phantom

from miar_monai.inference.bundle import weights_path, weights_sha256
from miar_monai.visualize import page as page_module

pytestmark = pytest.mark.usefixtures("elsewhere")

SHAPE = (19, 13, 3)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_nifti_phantom(tmp_path / "in" / "scan.nii.gz", SHAPE)


def read(path: str) -> tuple[str, Page]:
    text = Path(path).read_text(encoding="utf-8")
    return text, Page(text)


def same(image: nib.Nifti1Image, other: nib.Nifti1Image) -> bool:
    return np.array_equal(image.get_fdata(), other.get_fdata()) and np.allclose(image.affine, other.affine, atol=1e-5)


def test_sr_writes_a_page_with_the_report_the_model_and_the_warnings(bundle: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy.nii.gz"
    array = np.random.default_rng(0).integers(0, 1000, (24, 20, 3)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 4, 1])), noisy)
    done = sr(bundle, noisy, "--html", "--uncertainty", "--report", "run.json")
    assert done.exit_code == 0
    assert done.stdout == "noisy_sr.nii.gz\n"
    assert "\npage: noisy_sr.html\n" in done.stderr
    (case,) = json.loads(Path("run.json").read_text())["cases"]
    assert case["auxiliary_outputs"]["page"] == "noisy_sr.html"
    text, page = read("noisy_sr.html")
    assert "<title>noisy_sr.nii.gz: super-resolved from noisy.nii.gz</title>" in text
    assert "24x20x3 at 2x2x4 mm -&gt; 96x80x3 at 0.5x0.5x4 mm in" in text
    assert weights_sha256(weights_path(bundle)) in text
    assert any("noisier than the training data" in sentence for sentence in case["warnings"])
    assert text.count("<li>") == len(case["warnings"])
    written = nib.load("noisy_sr.nii.gz")
    assert same(page.volume("result"), written)
    assert same(page.volume("input"), nib.load(noisy))
    error = nib.load("noisy_sr_uncertainty.nii.gz").get_fdata()
    assert page.volume("map-1").get_fdata() == pytest.approx(error, abs=error.max() / 256)


def test_view_shows_files_as_sr_does(bundle: Path, scan: Path) -> None:
    assert sr(bundle, scan, "--html", "--uncertainty", "--report", "run.json").exit_code == 0
    made = miar(
        "view",
        scan,
        "scan_sr.nii.gz",
        "--map",
        "scan_sr_uncertainty.nii.gz",
        "--report",
        "run.json",
        "-o",
        "out/a.html",
    )
    assert (made.exit_code, made.output) == (0, "out/a.html\n")
    (text, page), (_, expected) = read("out/a.html"), read("scan_sr.html")
    for key in ("input", "result", "map-1"):
        assert same(page.volume(key), expected.volume(key))
    assert page.texts["settings"] == expected.texts["settings"]
    assert weights_sha256(weights_path(bundle)) in text
    refused = miar("view", scan, "scan_sr.nii.gz")
    assert refused.exit_code == 1
    assert "scan_sr.html exists already and is left as it is" in refused.stderr
    assert miar("view", scan, "scan_sr.nii.gz", "--overwrite").exit_code == 0
    assert "Weights" not in read("scan_sr.html")[0]


def test_a_series_has_a_page_in_hounsfield_units(bundle: Path, tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "series", (11, 9, 3))
    assert sr(bundle, series, "--html", "--out-format", "dicom").exit_code == 0
    text, page = read("series_sr.html")
    assert "<title>series_sr: super-resolved from series</title>" in text
    assert page.volume("result").shape == (44, 36, 3)
    assert miar("view", series, "series_sr", "-o", "again.html").exit_code == 0
    assert np.array_equal(read("again.html")[1].volume("result").get_fdata(), page.volume("result").get_fdata())


def test_pages_that_cannot_be_made_are_refused_in_one_sentence(
    bundle: Path, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sr(bundle, scan, "--report", "run.json", "--quiet").exit_code == 0
    shutil.copy("scan_sr.nii.gz", "other.nii.gz")
    Path("broken.json").write_text('{"cases": [')
    for options, sentence, code in (
        (["-o", "a.nii.gz"], "'a.nii.gz' must be an .html file.", 2),
        (["--map", scan], "scan.nii.gz has other voxels than scan_sr.nii.gz: a map on the voxels of the result", 1),
        (["--report", "broken.json"], "broken.json is not the report of a run (", 1),
        (["--report", "missing.json"], "missing.json is not the report of a run (", 1),
    ):
        refused = miar("view", scan, "scan_sr.nii.gz", *options)
        assert (refused.exit_code, sentence in refused.stderr) == (code, True), refused.output
    refused = miar("view", scan, "other.nii.gz", "--report", "run.json")
    assert "run.json has no case with the result other.nii.gz" in refused.stderr
    monkeypatch.setattr(page_module, "MAX_PAGE_VOXELS", 1000)
    refused = sr(bundle, scan, "-o", "big.nii.gz", "--html")
    assert refused.exit_code == 2
    assert "the result has 76x52x3 voxels, but a page holds at most 1000: leave the page out" in refused.stderr
    assert sorted(path.name for path in Path().iterdir()) == [
        "broken.json", "other.nii.gz", "run.json", "scan_sr.nii.gz",
    ]  # fmt: skip
    Path("mine_sr.html").write_text("mine")
    refused = sr(bundle, scan, "-o", "mine_sr.nii.gz", "--html")
    assert refused.exit_code == 1
    assert "mine_sr.html exists already and is left as it is" in refused.stderr
    assert Path("mine_sr.html").read_text() == "mine"
