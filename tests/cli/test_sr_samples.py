"""Posterior samples, from file to file: maps, seeds, messages and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from helpers.bundle_runs import workflow
from helpers.commands import miar, sr
from helpers.html_page import Page
from helpers.phantoms import write_dicom_series, write_nifti_phantom
from helpers.tiny_bundle import write_sampling_bundle, write_tiny_bundle

from miar_monai.data.io import read_volume
from miar_monai.data.volume import SAMPLE_MAPS, sample_maps
from miar_monai.inference.resolver import SuperResolver, super_resolve

pytestmark = pytest.mark.usefixtures("elsewhere")

SHAPE = (19, 13, 3)
AFFINE = np.array([[-1.0, 0, 0, 20], [0, -1, 0, 30], [0, 0, 2.5, -10], [0, 0, 0, 1]])


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_nifti_phantom(tmp_path / "in" / "scan.nii.gz", SHAPE, AFFINE)


@pytest.fixture
def sampling(tmp_path: Path) -> Path:
    """Write a bundle whose tiny network samples."""
    return write_sampling_bundle(tmp_path / "sampling")


def voxels(path: str | Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj, dtype=np.float64)


def test_maps_and_samples_are_written_beside_the_result(sampling: Path, scan: Path) -> None:
    done = sr(sampling, scan, "--samples", 4, "--seed", 3, "--save-samples", "--report", "run.json", "--uncertainty")
    assert (done.exit_code, done.stdout) == (0, "scan_sr.nii.gz\n")
    names = ["uncertainty", *sample_maps(4, keep=True)]
    assert {path.name for path in Path().glob("*.gz")} == {"scan_sr.nii.gz", *(f"scan_sr_{x}.nii.gz" for x in names)}
    maps = {name: voxels(f"scan_sr_{name}.nii.gz") for name in names}
    samples = np.stack([maps[f"sample_0{number}"] for number in range(1, 5)])
    spread = samples.std(axis=0, ddof=1)
    assert spread.mean() > 1
    np.testing.assert_allclose(maps["mean"], samples.mean(axis=0), atol=1e-3 * samples.max())
    np.testing.assert_allclose(maps["std"], spread, atol=1e-2 * spread.max())
    assert (maps["p05"] <= maps["mean"] + 1e-3).all()
    assert (maps["mean"] <= maps["p95"] + 1e-3).all()
    result = nib.load("scan_sr.nii.gz")
    for name in names:
        image = nib.load(f"scan_sr_{name}.nii.gz")
        np.testing.assert_array_equal(image.affine, result.affine)
        assert image.get_data_dtype() == np.float32
        assert read_volume(Path(f"scan_sr_{name}.nii.gz")).is_miar_result
    report = json.loads(Path("run.json").read_text())
    assert [report["settings"][name] for name in ("samples", "sampling_seed", "save_samples")] == [4, 3, True]
    assert report["cases"][0]["auxiliary_outputs"]["p95"] == "scan_sr_p95.nii.gz"
    assert "std: scan_sr_std.nii.gz" in done.stderr
    plain = sr(sampling, scan, "-o", "plain.nii.gz")
    assert plain.exit_code == 0
    np.testing.assert_array_equal(voxels("plain.nii.gz"), voxels("scan_sr.nii.gz"))


@pytest.mark.parametrize("grid", [{}, {"isotropic": True}, {"factor": (2, 2, 2.5)}], ids=str)
def test_command_call_and_bundle_agree(grid: dict[str, object], sampling: Path, scan: Path, tmp_path: Path) -> None:
    options = ["--isotropic"] if "isotropic" in grid else ["--factor", "2,2,2.5"] if grid else []
    done = sr(sampling, scan, "--samples", 3, *options)
    assert done.exit_code == 0, done.output
    called = super_resolve(scan, sampling, "cpu", samples=3, **grid)
    assert list(called) == ["image", *SAMPLE_MAPS]
    weights = str(sampling / "models" / "model.pt")
    given = {"network_def#noise_channels": 1, "samples": 3, **grid}
    workflow(
        "miar_brats", "inference", checkpoint=weights, dataset_dir=str(scan), output_dir=str(tmp_path / "out"), **given
    ).run()
    for name, image in called.items():
        file = f"scan_sr_{name}.nii.gz" if name != "image" else "scan_sr.nii.gz"
        assert np.array_equal(voxels(file), np.asarray(image.dataobj)), name
        assert np.array_equal(voxels(file), voxels(tmp_path / "out" / file)), name
        assert nib.load(file).get_data_dtype() == nib.load(tmp_path / "out" / file).get_data_dtype()
        assert nib.load(file).header["descrip"] == nib.load(tmp_path / "out" / file).header["descrip"]


def test_results_are_no_inputs_of_a_later_run(sampling: Path, scan: Path) -> None:
    folder = scan.parent
    for _ in range(2):
        done = sr(sampling, folder, "-o", folder, "--samples", 2, "--save-samples", "--overwrite", "--factor", 2)
        assert (done.exit_code, done.stdout) == (0, f"{folder / 'scan_sr.nii.gz'}\n")
    output = {"dataset_dir": str(folder), "output_dir": str(folder), "overwrite": True, "factor": 2}
    run = workflow("miar_brats", "inference", checkpoint=str(sampling / "models" / "model.pt"), **output)
    assert [Path(item["image"]).name for item in run.parser.get_parsed_content("datalist")] == ["scan.nii.gz"]


def test_the_page_offers_the_maps_that_tell_how_certain_the_result_is(sampling: Path, scan: Path) -> None:
    assert sr(sampling, scan, "--samples", 3, "--uncertainty", "--html").exit_code == 0
    maps = ["--map", "scan_sr_uncertainty.nii.gz", "--map", "scan_sr_std.nii.gz"]
    assert miar("view", scan, "scan_sr.nii.gz", *maps, "-o", "again.html").exit_code == 0
    pages = [Page(Path(name).read_text()) for name in ("scan_sr.html", "again.html")]
    assert pages[0].texts["settings"] == pages[1].texts["settings"]
    for page in pages:
        assert shown_in(page) == ["expected error", "standard deviation of samples"]
        spread = page.volume("map-2").get_fdata()
        assert spread == pytest.approx(voxels("scan_sr_std.nii.gz"), abs=spread.max() / 256)


def shown_in(page: Page) -> list[str]:
    return [volume["name"] for volume in json.loads(page.texts["settings"])["volumes"][2:]]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".mgz", ""])
def test_view_names_a_map_by_what_it_shows(ending: str, sampling: Path, tmp_path: Path) -> None:
    source, options = write_dicom_series(tmp_path / "scan", (9, 8, 3)), ["--samples", 2, "--uncertainty"]
    given = ["--out-format", "dicom"] if not ending else ["-o", f"scan_sr{ending}"]
    assert sr(sampling, source, *options, *given).exit_code == 0
    names = {
        "uncertainty": "expected error",
        "std": "standard deviation of samples",
        "mean": "mean of samples",
        "p95": "95th percentile of samples",
    }
    maps = [word for name in names for word in ("--map", f"scan_sr_{name}{ending}")]
    done = miar("view", source, f"scan_sr{ending}", *maps, "-o", "named.html")
    assert done.exit_code == 0, done.output
    assert shown_in(Page(Path("named.html").read_text())) == list(names.values())
    if ending == ".mgz":  # this format has no field for a description
        return
    Path(f"scan_sr_std{ending}").rename(f"mine{ending}")
    assert miar("view", source, f"scan_sr{ending}", "--map", f"mine{ending}", "-o", "mine.html").exit_code == 0
    assert shown_in(Page(Path("mine.html").read_text())) == [names["std"]]
    other = ["--map", f"scan_sr{ending}", "--map", f"mine{ending}", "--map", f"mine{ending}"]
    assert miar("view", source, f"scan_sr{ending}", *other, "-o", "other.html").exit_code == 0
    assert shown_in(Page(Path("other.html").read_text())) == [f"scan_sr{ending}", names["std"], f"mine{ending}"]


def test_existing_maps_are_not_replaced(sampling: Path, scan: Path) -> None:
    Path("scan_sr_std.nii.gz").write_text("mine")
    done = sr(sampling, scan, "--samples", 2)
    assert done.exit_code == 1
    assert "scan_sr_std.nii.gz exists" in done.stderr
    assert {path.name for path in Path().iterdir()} == {"scan_sr_std.nii.gz"}


def test_arrays_give_arrays_by_name_and_a_seed_gives_the_same(sampling: Path) -> None:
    resolver = SuperResolver(sampling, "cpu", samples=2, uncertainty=True)
    array = np.random.default_rng(0).uniform(100, 200, (9, 8))
    labelled = resolver(array, labels=(array > 150).astype(np.uint8))
    assert list(labelled) == ["image", "uncertainty", *SAMPLE_MAPS, "labels"]
    assert labelled["labels"].shape == (36, 32)
    first, again = resolver(array), resolver.with_settings(sampling_seed=0)(array)
    assert list(first) == ["image", "uncertainty", *SAMPLE_MAPS]
    assert first["std"].shape == (36, 32)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["mean"], resolver.with_settings(sampling_seed=1)(array)["mean"])


def test_maps_are_dicom_series_of_their_own(sampling: Path, tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "series", (9, 8, 3))
    done = sr(sampling, series, "--out-format", "dicom", "--samples", 2, "--save-samples")
    assert done.exit_code == 0, done.output
    names = ["", *(f"_{name}" for name in sample_maps(2, keep=True))]
    volumes = {name: read_volume(Path(f"series_sr{name}")) for name in names}
    assert {path.name for path in Path().iterdir()} == {f"series_sr{name}" for name in names}
    descriptions = {pydicom.dcmread(Path(f"series_sr{name}", "0001.dcm")).SeriesDescription for name in names}
    assert len(descriptions) == len(names)
    assert any("95th percentile of samples" in text for text in descriptions)
    mean = (volumes["_sample_01"].array + volumes["_sample_02"].array) / 2
    np.testing.assert_allclose(volumes["_mean"].array, mean, atol=2)
    np.testing.assert_allclose(volumes["_std"].affine, volumes[""].affine)


def test_the_impossible_is_refused_in_one_sentence(tmp_path: Path, sampling: Path, scan: Path) -> None:
    untrained = write_tiny_bundle(tmp_path / "untrained", noise_channels=0)
    for folder, options, sentence in (
        (untrained, ("--samples", 4), "this Estimator was not trained to sample, but samples were requested"),
        (sampling, ("--samples", 1), "samples is 1, but at least 2 are needed for a spread"),
        (sampling, ("--save-samples",), "save_samples is on, but samples is 0"),
        (sampling, ("--samples", 2, "--seed", -1), "sampling_seed is -1"),
    ):
        done = sr(folder, scan, *options)
        assert done.exit_code == 2, done.output
        assert sentence in done.stderr
    assert not list(Path().iterdir())


@pytest.mark.parametrize(("model", "low", "high"), [("brain_mri", 0, 900), ("chest_ct", -1000, 400)])
def test_the_shipped_models_sample(model: str, low: float, high: float, tmp_path: Path) -> None:
    scan = write_nifti_phantom(tmp_path / "in" / "scan.nii.gz", (24, 20, 1), low=low, high=high)
    maps = super_resolve(scan, model, "cpu", samples=4, factor=(4, 4, 1))
    image, mean, std = (np.asarray(maps[name].dataobj) for name in ("image", "mean", "std"))
    inside = image - low > 0.2 * (image.max() - low)
    assert (std[inside] > 0).mean() > 0.99
    assert std.mean() < 0.05 * (high - low)
    np.testing.assert_allclose(mean[inside].mean() - low, image[inside].mean() - low, rtol=0.01)
