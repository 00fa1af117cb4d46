"""The command ``miar``: its files, its messages and its exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import click
import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundle_runs import workflow
from helpers.commands import miar, sr
from helpers.phantoms import write_brats_folder, write_dicom_series, write_nifti_phantom

from miar_monai.cli import runner
from miar_monai.cli.main import main
from miar_monai.data import cases
from miar_monai.data.cases import find_cases, unpacked
from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import read_volume
from miar_monai.errors import DatasetError, ImageError
from miar_monai.inference.bundle import metadata, weights_path, weights_sha256
from miar_monai.inference.report import data_consistency_rms
from miar_monai.inference.resolver import super_resolve

pytestmark = pytest.mark.usefixtures("elsewhere")

SHAPE = (19, 13, 3)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_nifti_phantom(tmp_path / "in" / "scan.nii.gz", SHAPE)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_command_call_and_bundle_agree_voxel_by_voxel(bundle: Path, scan: Path, tmp_path: Path) -> None:
    before = scan.read_bytes()
    result = sr(bundle, scan)
    assert (result.exit_code, result.stdout) == (0, "scan_sr.nii.gz\n")
    assert files(Path()) == ["scan_sr.nii.gz"]
    weights, output = str(bundle / "models" / "model.pt"), str(tmp_path / "out")
    workflow("miar_brats", "inference", checkpoint=weights, dataset_dir=str(scan), output_dir=output).run()
    written, by_bundle = Path("scan_sr.nii.gz"), Path(output, "scan_sr.nii.gz")
    assert np.array_equal(voxels(written), voxels(by_bundle))
    assert np.array_equal(voxels(written), np.asarray(super_resolve(scan, bundle, "cpu").dataobj))
    assert np.array_equal(nib.load(written).affine, nib.load(by_bundle).affine)
    assert nib.load(written).get_data_dtype() == nib.load(by_bundle).get_data_dtype() == np.int16
    assert scan.read_bytes() == before


def test_settings_reach_the_network(bundle: Path, scan: Path) -> None:
    for name, options in (("a", ()), ("b", ("--fidelity", 1)), ("c", ("--fidelity", 1, "--lookahead-tokens", 0))):
        assert sr(bundle, scan, "-o", f"{name}.nii", "--quiet", *options).exit_code == 0
    assert not np.array_equal(voxels(Path("a.nii")), voxels(Path("b.nii")))
    expected = super_resolve(scan, bundle, "cpu", fidelity=1, lookahead_tokens=0)
    assert np.array_equal(voxels(Path("c.nii")), np.asarray(expected.dataobj))


def test_noise_beyond_the_training_range_causes_a_warning_unless_quiet(bundle: Path, scan: Path) -> None:
    image = nib.load(scan)
    noise = 0.5 * voxels(scan).max() * np.random.default_rng(0).standard_normal(image.shape)
    noisy = scan.with_name("noisy.nii.gz")
    nib.save(nib.Nifti1Image((voxels(scan) + noise).astype(np.int16), image.affine), noisy)
    noted = sr(bundle, noisy, "-o", "noted.nii")
    assert noted.exit_code == 0
    assert noted.stderr.count("\nwarning: the input is noisier than the training data") == 1
    quiet = sr(bundle, noisy, "-o", "quiet.nii", "--quiet", "--report", "run.json")
    assert quiet.exit_code == 0
    (case,) = json.loads(Path("run.json").read_text())["cases"]
    assert sum("noisier than the training data" in sentence for sentence in case["warnings"]) == 1
    assert quiet.stderr == ""
    ours = logging.getLogger("miar_monai")
    assert (ours.level, ours.handlers) == (logging.NOTSET, [])


def test_stdout_has_only_the_path_and_quiet_prints_nothing(bundle: Path, scan: Path) -> None:
    quiet = sr(bundle, scan, "--quiet", "--preview", "--report", "run.json")
    assert (quiet.exit_code, quiet.output) == (0, "")
    talking = sr(bundle, scan, "--overwrite")
    assert talking.stdout == "scan_sr.nii.gz\n"
    assert re.search(r"super-resolving: 100%.* 3/3 \[\d\d:\d\d<\d\d:\d\d", talking.stderr)  # elapsed < remaining
    assert "19x13x3 at 1x1x1.5 mm -> 76x52x3 at 0.25x0.25x1.5 mm in" in talking.stderr


def test_nothing_is_overwritten_without_the_option(bundle: Path, scan: Path) -> None:
    assert sr(bundle, scan, "-o", "out", "--preview", "--report", "run.json").exit_code == 0
    made = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in map(Path, files(Path()))}
    assert sorted(map(str, made)) == ["out/scan_sr.nii.gz", "out/scan_sr.png", "run.json"]
    for options in (("-o", "out"), ("-o", "new", "--report", "run.json"), ("-o", "out/scan_sr.nii.gz")):
        refused = sr(bundle, scan, *options)
        assert refused.exit_code == 1
        assert "exists already and is left as it is" in refused.stderr
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made} == made
    assert files(Path()) == sorted(map(str, made))
    assert sr(bundle, scan, "-o", "out", "--preview", "--report", "run.json", "--overwrite").exit_code == 0
    assert Path("run.json").stat().st_mtime_ns > made[Path("run.json")][1]


@pytest.mark.parametrize("name", ["scan_sr.nii.gz", "scan_sr_uncertainty.nii.gz", "scan_sr.png", "run.json"])
@pytest.mark.parametrize("source", ["scan.nii.gz", "."], ids=["case", "folder"])
def test_an_existing_output_is_reported_with_the_option_to_overwrite_it(
    source: str, name: str, bundle: Path, scan: Path
) -> None:
    Path("out").mkdir()
    Path("out", name).write_text("mine")
    outputs = ("-o", "out", "--preview", "--uncertainty", "--report", "out/run.json")
    refused = sr(bundle, scan.parent / source, *outputs)
    sentence = f"out/{name} exists already and is left as it is: give another output, remove it, or allow overwriting"
    assert refused.exit_code == (1 if source == "scan.nii.gz" or name == "run.json" else 3)
    assert f"error: {sentence} (--overwrite).\n" in refused.stderr
    assert Path("out", name).read_text() == "mine"


def test_the_input_is_refused_as_output(bundle: Path, scan: Path) -> None:
    before, named = scan.read_bytes(), scan.with_name("x_uncertainty.nii.gz")
    shutil.copy(scan, named)
    for source, output in ((scan, scan), (named, named.with_name("x.nii.gz"))):  # of whose result it would be the map
        refused = sr(bundle, source, "-o", output, "--overwrite")
        assert refused.exit_code == 2
        assert f"{source} is the input, which is never changed" in refused.stderr
    assert scan.read_bytes() == named.read_bytes() == before


@pytest.mark.parametrize("name", ["in/scan.nii.gz", "scan_sr.nii.gz", "scan_sr.png"])
def test_a_report_cannot_replace_an_image(name: str, bundle: Path, scan: Path) -> None:
    before, report = scan.read_bytes(), Path(scan.parents[1] if name.startswith("in/") else "", name)
    refused = sr(bundle, scan, "--preview", "--report", report, "--overwrite")
    assert refused.exit_code == 2
    assert f"{str(report)!r} must be a .json file." in refused.stderr
    assert (scan.read_bytes(), files(Path())) == (before, [])


def test_results_are_named_after_their_sources(bundle: Path, scan: Path, tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "series.4", (11, 9, 3))
    packed = shutil.make_archive(str(tmp_path / "study"), "zip", tmp_path, "series.4")
    with zipfile.ZipFile(tmp_path / "volume.zip", "w") as archive:
        archive.write(scan, "deep/in/scan.nii.gz")
        archive.writestr("__MACOSX/deep/._scan.nii.gz", b"shadow")
        archive.writestr("readme.txt", b"hello")
    for source in (series, packed, tmp_path / "volume.zip", scan):
        assert sr(bundle, source, "--quiet").exit_code == 0
    assert files(Path()) == ["scan_sr.nii.gz", "series.4_sr.nii.gz", "study_sr.nii.gz", "volume_sr.nii.gz"]
    assert np.array_equal(voxels(Path("series.4_sr.nii.gz")), voxels(Path("study_sr.nii.gz")))
    assert np.array_equal(voxels(Path("scan_sr.nii.gz")), voxels(Path("volume_sr.nii.gz")))


def test_a_failing_case_does_not_stop_the_others(bundle: Path, tmp_path: Path) -> None:
    root = write_brats_folder(tmp_path / "patients", 2, SHAPE, ("t2",))
    write_dicom_series(root / "ct" / "series", (11, 9, 3))
    with zipfile.ZipFile(root / "packed.zip", "w") as archive:
        archive.write(next(root.rglob("*_t2.nii.gz")), "inside.nii.gz")
    broken = root / "BraTS_00000" / "broken.nii.gz"
    broken.write_bytes(next(root.rglob("*_t2.nii.gz")).read_bytes()[:300])
    result = sr(bundle, root, "--report", "run.json")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1] == f"1 of 5 cases failed: {broken}"
    assert files(Path("patients_sr")) == [
        "BraTS_00000/BraTS_00000_t2_sr.nii.gz",
        "BraTS_00001/BraTS_00001_t2_sr.nii.gz",
        "ct/series_sr.nii.gz",
        "packed_sr.nii.gz",
    ]
    reports = json.loads(Path("run.json").read_text())["cases"]
    assert [("error" in report, Path(report["input"]).name) for report in reports] == [
        (False, "packed.zip"),
        (False, "BraTS_00000_t2.nii.gz"),
        (True, "broken.nii.gz"),
        (False, "BraTS_00001_t2.nii.gz"),
        (False, "series"),
    ]
    again = sr(bundle, root)
    assert again.exit_code == 3
    assert "5 of 5 cases failed" in again.stderr
    assert "exists already" in again.stderr


def test_the_report_describes_the_run(bundle: Path, scan: Path) -> None:
    assert sr(bundle, scan, "--fidelity", 0.25, "--report", "run.json", "--quiet").exit_code == 0
    report = json.loads(Path("run.json").read_text())
    (case,) = report["cases"]
    assert report["model"]["weights_sha256"] == weights_sha256(weights_path(bundle))
    assert report["settings"]["fidelity"] == 0.25
    assert report["settings"]["strategy"] == "beam"
    assert report["device"] == "cpu"
    assert {"python", "torch", "monai", "miar-monai"} <= set(report["versions"])
    assert (case["before"]["shape"], case["after"]["shape"]) == ([19, 13, 3], [76, 52, 3])
    assert case["before"]["spacing_mm"] == [1, 1, 1.5]
    assert case["after"]["spacing_mm"] == [0.25, 0.25, 1.5]
    assert case["before"]["field_of_view_mm"] == case["after"]["field_of_view_mm"] == [19, 13, 4.5]
    assert case["largest_corner_shift_mm"] < 1e-6
    assert case["before"]["range"] == [0, float(voxels(scan).max())]
    assert case["assumed_blur_voxels"] == 1.0  # the training's: the scan is too small to be measured
    written = read_volume("scan_sr.nii.gz")
    assert case["data_consistency_rms"] == pytest.approx(data_consistency_rms(read_volume(scan), written), abs=0.5)


def test_a_volume_is_preprocessed_once(bundle: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miar_monai.transforms import LoadVolume

    loaded, load = [], LoadVolume.__call__
    monkeypatch.setattr(LoadVolume, "__call__", lambda self, source: loaded.append(source) or load(self, source))
    assert sr(bundle, scan, "--report", "run.json", "--preview").exit_code == 0
    assert [volume.path for volume in loaded] == [scan]


def test_the_blur_of_the_input_can_be_given(bundle: Path, scan: Path) -> None:
    assert sr(bundle, scan, "--blur", 0.5, "--report", "run.json", "--quiet").exit_code == 0
    report = json.loads(Path("run.json").read_text())
    assert report["settings"]["blur"] == 0.5
    assert report["cases"][0]["assumed_blur_voxels"] == 0.5
    by_number = voxels("scan_sr.nii.gz")
    assert sr(bundle, scan, "--blur", "auto", "--overwrite", "--quiet").exit_code == 0
    assert not np.array_equal(voxels("scan_sr.nii.gz"), by_number)
    wrong = sr(bundle, scan, "--blur", "much", "--overwrite")
    assert wrong.exit_code == 2
    assert wrong.stderr == "error: blur is 'much', but a number of LR voxels or 'auto' is needed; correct it.\n"


def test_the_report_lists_auxiliary_outputs(bundle: Path, scan: Path) -> None:
    talking = sr(bundle, scan, "--report", "run.json", "--preview")
    assert talking.exit_code == 0
    (case,) = json.loads(Path("run.json").read_text())["cases"]
    assert case["auxiliary_outputs"] == {"preview": "scan_sr.png"}
    assert Path("scan_sr.png").is_file()
    assert "\npreview: scan_sr.png\n" in talking.stderr
    assert talking.stdout == "scan_sr.nii.gz\n"


def test_the_memory_of_a_result_is_in_the_report_and_that_of_a_large_one_is_printed(
    bundle: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = sr(bundle, scan, "--report", "run.json", "--uncertainty")
    (case,) = json.loads(Path("run.json").read_text())["cases"]
    given, voxels = (np.prod(case[name]["shape"]) for name in ("before", "after"))
    # result and expected error in float32; the input, as read in 16 bits, in float32 once
    assert case["memory_needed_bytes"] == 2 * 4 * voxels + 4 * given
    assert "GiB" not in small.stderr
    monkeypatch.setattr(runner, "_LARGE", 8 * voxels)
    large = sr(bundle, scan, "--uncertainty", "--overwrite")
    assert "\nthe result of 76 x 52 x 3 voxels needs 0.0 GiB of memory\n" in large.stderr


def test_the_residual_is_zero_for_what_degrades_to_the_input() -> None:
    import torch
    from helpers.affines import upscaled_affine

    from miar_monai.data.io import Volume
    from miar_monai.degradation import Degradation

    fine = np.random.default_rng(0).random((3, 20, 12)).astype(np.float32)  # axial slices along the first axis
    affine = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 1]])
    coarse = Degradation()(torch.from_numpy(fine)).numpy()
    hr = Volume(fine, affine, np.dtype(np.float32), Path("hr"))
    lr = Volume(coarse, upscaled_affine(affine, (1, 1 / 4, 1 / 4)), np.dtype(np.float32), Path("lr"))
    assert data_consistency_rms(lr, hr) == pytest.approx(0, abs=1e-6)
    moved = lr._replace(array=coarse - 3)
    assert data_consistency_rms(moved, hr) == pytest.approx(3, rel=1e-5)
    assert data_consistency_rms(moved, hr, limits=(-9, -8)) == pytest.approx(0, abs=1e-6)  # both are clipped to -8


@pytest.mark.parametrize("shape", [(19, 13, 9), (19, 13, 1)], ids=["volume", "slice"])
def test_the_preview_is_a_picture(shape: tuple[int, int, int], bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    scan = write_nifti_phantom(tmp_path / "p.nii", shape, np.diag([-2.0, 1, 3, 1]))
    assert sr(bundle, scan, "-o", "x.nii.gz", "--preview").exit_code == 0
    picture = np.asarray(Image.open("x.png").convert("RGB"))
    assert picture.shape[1] == 1350
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 30


def test_the_preview_marks_the_orientation_if_it_is_known(bundle: Path, tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    from miar_monai.data.io import read_volume
    from miar_monai.visualize.preview import preview

    texts: list[str] = []
    scan = read_volume(write_nifti_phantom(tmp_path / "p.nii", (19, 13, 9), np.diag([-2.0, 1, 3, 1])))
    fine = scan._replace(array=scan.array.repeat(4, 0).repeat(4, 1), affine=scan.affine @ np.diag([0.25, 0.25, 1, 1]))
    with pytest.MonkeyPatch.context() as patch:
        text = Axes.text
        patch.setattr(Axes, "text", lambda self, x, y, s, **o: texts.append(s) or text(self, x, y, s, **o))
        preview(scan, fine, "known.png")
        assert [s for s in texts if len(s) == 1] == ["R", "R", "A"]
        texts.clear()
        preview(scan._replace(space=0), fine, "unknown.png")
        assert [s for s in texts if len(s) == 1] == []


def test_without_matplotlib_a_preview_is_refused_before_the_work(
    bundle: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miar_monai.visualize import preview

    monkeypatch.setattr(preview, "find_spec", lambda name: None)
    refused = sr(bundle, scan, "--preview")
    assert refused.exit_code == 1
    assert "needs matplotlib, which is not installed: install it with pip install miar-monai[demo]" in refused.stderr
    assert files(Path()) == []


def test_bad_files_end_in_one_sentence(bundle: Path, scan: Path, tmp_path: Path) -> None:
    empty, text, cut = (tmp_path / name for name in ("empty.nii", "text.nii.gz", "cut.nii.gz"))
    empty.touch()
    text.write_text("no image")
    cut.write_bytes(scan.read_bytes()[:-20])
    noise = tmp_path / "noise.zip"
    noise.write_bytes(np.random.default_rng(0).bytes(500))
    other = tmp_path / "image.png"
    other.write_bytes(b"\x89PNG")
    (tmp_path / "folder").mkdir()
    for source in (empty, text, cut, noise, other, tmp_path / "folder"):
        refused = sr(bundle, source, "-o", "out")
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert refused.stderr.splitlines()[-1].startswith(f"error: {source}")
    assert files(Path()) == []


def test_debug_shows_where_an_error_comes_from(bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["sr", str(tmp_path), "--debug"])
    assert isinstance(result.exception, DatasetError)


def test_an_unexpected_error_is_one_sentence_too(bundle: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("miar_monai.inference.resolver.SuperResolver.volume", explode)
    result = sr(bundle, scan, "-o", "out")
    assert result.exit_code == 1
    assert "error: unexpected MemoryError (without a message); --debug shows where" in result.stderr
    assert files(Path()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("-o", "x.mhd"), "x.mhd is not the name of a volume that can be written"),
        (("-o", "x.mgz", "--out-format", "nrrd"), "x.mgz has the suffix of another format than --out-format nrrd"),
        (("--fidelity", "much"), "'much' is not a valid float"),
        (("--beams", "2"), "No such option"),
        (("--part", "3/2"), "must be of the form I/N"),
    ],
)
def test_wrong_use_ends_with_2(options: tuple[str, ...], sentence: str, bundle: Path, scan: Path) -> None:
    refused = sr(bundle, scan, *options)
    assert refused.exit_code == 2
    assert sentence in refused.stderr
    assert miar("sr").exit_code == 2
    assert sr(bundle, scan.parent, "-o", "x.nii").exit_code == 2
    assert sr(bundle, scan.with_name("nowhere.nii")).exit_code == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--fidelity", "3"), "fidelity"),
        (("--lookahead-tokens", "30"), "lookahead_tokens"),
        (("--blur", "2"), "blur is 2.0"),
        (("--device", "gpu"), "there is no device 'gpu'"),
        (("--model", "nowhere"), "inference.json does not exist: the folder of a bundle is needed"),
    ],
)
def test_settings_out_of_range_are_reported(options: tuple[str, ...], sentence: str, bundle: Path, scan: Path) -> None:
    refused = sr(bundle, scan, *options)
    assert refused.exit_code == 2
    assert sentence in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../escaped.nii", "would be extracted to another folder"),
        ("/tmp/escaped.nii", "would be extracted to another folder"),
        ("a\\..\\..\\escaped.nii", "would be extracted to another folder"),
        ("c:/escaped.nii", "would be extracted to another folder"),
    ],
)
def test_entries_of_a_zip_file_cannot_escape(name: str, sentence: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    wanted = rf"^{tmp_path}/bad\.zip: the entry .*{sentence}"
    with pytest.raises(ImageError, match=wanted), unpacked(tmp_path / "bad.zip"):
        pass
    assert not list(tmp_path.rglob("escaped.nii"))


def test_links_bombs_and_several_volumes_in_a_zip_file_are_refused(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = zipfile.ZipInfo("link.nii")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ImageError, match=r"'link\.nii' is a link or a device"), unpacked(packed):
        pass
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.nii", bytes(10**6))
    monkeypatch.setattr(cases, "MAX_ZIP_BYTES", 10**5)
    with (
        pytest.raises(ImageError, match=r"packed\.zip contains 1 entries of .* but at most .* extracted"),
        unpacked(packed),
    ):
        pass
    monkeypatch.undo()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(scan, "a.nii.gz")
        archive.write(scan, "b.nii.gz")
    with pytest.raises(ImageError, match=r"packed\.zip contains 2 volumes \(a\.nii\.gz, b"), unpacked(packed):
        pass
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    with pytest.raises(ImageError, match="contains 0 volumes: one"), unpacked(packed):
        pass


def test_a_temporary_folder_goes_away_and_stays_out_of_messages(scan: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x/cut.nii.gz", scan.read_bytes()[:200])
    with pytest.raises(ImageError, match=rf"^{packed}/x/cut\.nii\.gz is truncated") as caught, unpacked(packed) as path:
        read_volume(path)
    assert not path.exists()
    assert "miar-" not in str(caught.value)


def test_cases_are_distinguished_by_content(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "root" / "series", (5, 4, 2))
    (tmp_path / "root" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert [case.source for case in find_cases(tmp_path / "root")] == [series]
    assert find_cases(series) == [(series, Path("series"), "")]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is neither a file nor a folder"):
        find_cases(tmp_path / "pipe")


def test_weights_are_found_and_verified(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    weights = copy / "models" / "model.pt"
    assert miar("weights", "path", "--model", copy).output == f"{weights}\n"
    verified = miar("weights", "verify", "--model", copy)
    assert (verified.exit_code, verified.stdout) == (0, f"{weights} sha256 {weights_sha256(weights_path(bundle))}\n")
    metadata = copy / "configs" / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "weights_sha256": "0" * 64}))
    refused = miar("weights", "verify", "--model", copy)
    assert refused.exit_code == 1
    assert "but the bundle's metadata.json names 0000" in refused.stderr
    weights.write_bytes(b"no weights")
    assert "is not a readable checkpoint" in miar("weights", "verify", "--model", copy).stderr
    weights.unlink()
    assert "there are no weights at" in miar("weights", "verify", "--model", copy).stderr


def test_doctor_checks_models_and_reports_missing_ones(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIAR_BUNDLES", str(tmp_path))
    shutil.copytree(bundle, tmp_path / "miar_brats")
    result = miar("doctor")
    assert result.exit_code == 1
    assert "ok       device cpu:" in result.stdout
    assert f"ok       model brats: {tmp_path / 'miar_brats' / 'models' / 'model.pt'} sha256" in result.stdout
    assert "problem  model lidc:" in result.stdout
    assert "1 problems: model lidc" in result.stderr
    shutil.copytree(bundle, tmp_path / "miar_lidc")
    assert miar("doctor").exit_code == 0


def test_the_monai_label_app_is_located() -> None:
    result = CliRunner().invoke(main, ["label-app"])
    assert result.exit_code == 0
    assert "class MiarApp(MONAILabelApp)" in Path(result.output.strip(), "main.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "answer"),
    [("info", "brats: Brain MRI super-resolution to any finer grid"), ("label-app", "monailabel_app")],
)
def test_light_commands_are_fast_and_do_not_import_pytorch(command: str, answer: str) -> None:
    code = f"import sys; from miar_monai.cli.main import main; main(['{command}'], standalone_mode=False);" + (
        "print({'torch', 'monai', 'numpy'} & set(sys.modules))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
        seconds.append(time.perf_counter() - start)
    assert done.stdout.splitlines()[-1] == "set()"
    assert answer in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize("folder", [False, True])
def test_a_closed_pipe_ends_the_command_quietly(folder: bool, bundle: Path, scan: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    parts = ["sr", str(scan.parent), "--model", str(bundle), "--device", "cpu", "-o", "out"] if folder else ["info"]
    done = subprocess.run([sys.executable, "-m", "miar_monai.cli.main", *parts], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 1
    assert b"roken" not in done.stderr
    assert b"Error" not in done.stderr


def test_evaluate_measures_the_test_patients(bundle: Path, tmp_path: Path) -> None:
    data = write_brats_folder(tmp_path / "data", 3, (40, 36, 44), ("t2",))
    config = shutil.copytree(bundle, tmp_path / "copy") / "configs" / "evaluate.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_slices": 2, "metrics": ["PSNR"]}))
    options = ("-o", "out", "--model", tmp_path / "copy", "--device", "cpu")
    result = miar("evaluate", data, *options, "--lookahead-tokens", 0)
    assert result.exit_code == 0, result.output
    assert files(Path("out")) == ["metrics.csv", "metrics.html", "metrics.md"]
    assert result.stdout.splitlines()[0].startswith("2 slices of 1 patient")
    assert result.stdout.count("| MIAR |") == 1
    page, about = Path("out/metrics.html").read_text(encoding="utf-8"), metadata(bundle)
    assert f"<li>Model: {about['name']}, version {about['version']}</li>" in page
    assert f"<li>Weights (SHA-256): {weights_sha256(weights_path(bundle))}</li>" in page
    again = miar("evaluate", data, *options, "--quiet")
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("error: out/metrics.csv exists already and is left as it is")
    assert again.stderr.endswith("(--overwrite).\n")
    quiet = miar("evaluate", data, *options, "--lookahead-tokens", 0, "--quiet", "--overwrite")
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert logging.root.manager.disable == logging.NOTSET


def test_every_command_has_an_example_and_the_codes_are_documented() -> None:
    assert "3  some cases of a folder failed" in miar("--help").output
    assert "3  some cases of a folder failed" in miar("sr", "--help").output
    commands = {**main.commands, **main.commands["weights"].commands}  # type: ignore[attr-defined]
    for name, command in commands.items():
        if not isinstance(command, click.Group):
            assert f"  miar {name}" in (command.epilog or "") or f"  miar weights {name}" in (command.epilog or "")
    assert miar("--version").output.startswith("miar 0.")


def test_a_killed_command_leaves_nothing_half_written(bundle: Path, tmp_path: Path) -> None:
    scan = write_nifti_phantom(tmp_path / "big.nii.gz", (150, 150, 60))
    parts = ["sr", str(scan), "-o", "out", "--model", str(bundle), "--device", "cpu"]
    command = [sys.executable, "-m", "miar_monai.cli.main", *parts]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    assert process.stderr is not None
    seen = ""
    while "super-resolving" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    process.terminate()
    process.communicate()
    assert process.returncode != 0
    assert files(Path()) == []


def test_the_result_covers_the_field_of_view(bundle: Path, scan: Path) -> None:
    sr(bundle, scan, "--quiet")
    before, after = nib.load(scan), nib.load("scan_sr.nii.gz")
    assert fov_corners(after.affine, after.shape) == pytest.approx(fov_corners(before.affine, before.shape), abs=1e-4)


@pytest.mark.parametrize("ending", [".mgz", ".nrrd", ".mha"])
def test_results_have_the_format_of_their_suffix(ending: str, bundle: Path, scan: Path) -> None:
    options = ("--uncertainty", "--quiet")
    assert sr(bundle, scan, "-o", f"a{ending}", *options).exit_code == 0
    assert sr(bundle, scan, "-o", "a.nii.gz", *options).exit_code == 0
    for name in ("a", "a_uncertainty"):
        found, expected = read_volume(Path(f"{name}{ending}")), read_volume(Path(f"{name}.nii.gz"))
        np.testing.assert_array_equal(found.array, expected.array)
        assert fov_corners(found.affine, found.array.shape) == pytest.approx(
            fov_corners(expected.affine, expected.array.shape), abs=1e-3
        )
        assert found.dtype == expected.dtype
    again = sr(bundle, f"a{ending}", "--out-format", ending[1:], "-o", "folder")  # from the format, and to a folder
    assert again.stdout == f"folder/a_sr{ending}\n"
    assert ("already a super-resolved" in again.stderr) is (ending != ".mgz")
