"""The grid of the result, from file to file: options, settings, geometry, messages, report and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.bundle_runs import BUNDLES, arguments, quick_command, workflow
from helpers.derived_series import by_height
from helpers.phantoms import write_dicom_series, write_nifti_phantom
from nibabel.eulerangles import euler2mat

from miar_monai.cli.main import main
from miar_monai.cli.workflow import read_config
from miar_monai.data.geometry import fov_corners
from miar_monai.data.grid import Grid
from miar_monai.data.io import read_volume
from miar_monai.inference.acquisition import SLICE_PROFILES
from miar_monai.inference.resolver import SuperResolver, super_resolve

pytestmark = pytest.mark.usefixtures("elsewhere")

THICK = np.array([[-1.0, 0, 0, 20], [0, -1, 0, 30], [0, 0, 2.5, -10], [0, 0, 0, 1]])
OBLIQUE = np.array([[0.1, 0.02, 2.4, -30], [-0.85, 0.1, 0.3, 40], [0.08, 0.9, 0.1, -7], [0, 0, 0, 1]])
"""Thick sagittal slices: voxel axes posterior, superior, right."""
SHAPE = (9, 8, 4)
ROTATION = euler2mat(0.1, -0.15, 0.2)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_nifti_phantom(tmp_path / "in" / "scan.nii.gz", SHAPE, THICK)


def sr(bundle: Path, *parts: object) -> Result:
    words = ("sr", "--model", bundle, "--device", "cpu", "--lookahead-tokens", 0, *parts)
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert "Traceback" not in result.output
    return result


def load(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any], tuple[float, float, float]]] = {
    "isotropic": (("--isotropic",), {"isotropic": True}, (1, 1, 2.5)),
    "one spacing": (("--spacing", "0.8"), {"spacing": 0.8}, (1.25, 1.25, 3.125)),
    "spacings": (("--spacing", "1,0.5,1"), {"spacing": (1, 0.5, 1)}, (1, 2, 2.5)),
    "factors and thickness": (
        ("--factor", "1,1,2", "--slice-thickness", "2"),
        {"factor": [1, 1, 2], "slice_thickness": 2},
        (1, 1, 2),
    ),
    "profile": (
        ("--factor", "1,1,2", "--slice-profile", "gaussian"),
        {"factor": [1, 1, 2], "slice_profile": "gaussian"},
        (1, 1, 2),
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_command_call_and_bundle_give_the_grid_that_is_asked_for(
    option: str, bundle: Path, scan: Path, tmp_path: Path
) -> None:
    words, settings, factors = OPTIONS[option]
    result = sr(bundle, scan, *words)
    assert (result.exit_code, result.stdout) == (0, "scan_sr.nii.gz\n"), result.stderr
    voxels, affine = load("scan_sr.nii.gz")
    grid = Grid(SHAPE, THICK).resized([1 / factor for factor in factors])
    assert voxels.shape == grid.shape
    np.testing.assert_allclose(affine, grid.affine, atol=1e-4)

    called = super_resolve(scan, bundle, "cpu", lookahead_tokens=0, **settings)
    np.testing.assert_array_equal(np.asarray(called.dataobj), voxels)
    weights, output = str(bundle / "models" / "model.pt"), str(tmp_path / "out")
    given = {"checkpoint": weights, "dataset_dir": str(scan), "output_dir": output, "lookahead_tokens": 0}
    workflow("miar_brats", "inference", **given, **settings).run()
    by_bundle, its_affine = load(Path(output, "scan_sr.nii.gz"))
    np.testing.assert_array_equal(by_bundle, voxels)
    np.testing.assert_array_equal(its_affine, affine)


@pytest.mark.parametrize(
    "words", [("--isotropic",), ("--spacing", "0.7"), ("--factor", "2,1,1.5"), ("--factor", "4,1,1")]
)
def test_oblique_and_permuted_volumes_stay_where_they_are(
    words: tuple[str, ...], bundle: Path, tmp_path: Path
) -> None:  # fmt: skip
    path = write_nifti_phantom(tmp_path / "sagittal.nii.gz", (8, 9, 4), OBLIQUE)
    assert sr(bundle, path, *words).exit_code == 0
    voxels, affine = load("sagittal_sr.nii.gz")
    old, new = Grid((8, 9, 4), OBLIQUE), Grid(voxels.shape, affine)  # type: ignore[arg-type]
    assert new.patient_axes == old.patient_axes
    wanted = {
        "--isotropic": (min(old.spacing),) * 3,
        "--spacing": (0.7,) * 3,
        "--factor": np.divide(old.patient_spacing, np.fromstring(words[-1], sep=",") if len(words) == 2 else 1),
    }[words[0]]
    np.testing.assert_allclose(new.patient_spacing, wanted, atol=1e-4)
    np.testing.assert_allclose(
        fov_corners(affine, voxels.shape).mean(0), fov_corners(OBLIQUE, (8, 9, 4)).mean(0), atol=0.01
    )
    shift = np.abs(
        (fov_corners(affine, voxels.shape) - fov_corners(OBLIQUE, (8, 9, 4))) @ np.linalg.inv(affine[:3, :3]).T
    )
    assert shift.max() <= 0.25 + 1e-3  # new voxels


def test_by_the_command_line_of_monai(bundle: Path, scan: Path, tmp_path: Path) -> None:
    given = {"dataset_dir": scan, "output_dir": tmp_path / "out", "checkpoint": bundle / "models" / "model.pt"}
    words = arguments("miar_brats", "inference", tmp_path, spacing="1,1,0.5", **given)
    done = quick_command(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "out" / "scan_sr.nii.gz")[0].shape == (9, 8, 20)
    assert "inferior-superior 5 x finer (0.5 mm)\nslices 2.5 mm apart, taken as 2.5 mm thick" in done.stderr
    done = quick_command(*words, "--isotropic", "yes", folder=tmp_path)
    assert done.sentence.startswith("error: isotropic is 'yes', but it must be True or False;")


def test_the_screen_says_which_axis_becomes_how_fine_and_what_else_to_ask_for(bundle: Path, scan: Path) -> None:
    in_plane = "left-right 4 x finer (0.25 mm), posterior-anterior 4 x finer (0.25 mm)"
    assert (
        f"{in_plane}, inferior-superior as it is (2.5 mm); thinner slices with --isotropic, --spacing or --factor\n"
        in sr(bundle, scan, "-o", "a.nii").stderr
    )
    thin = write_nifti_phantom(scan.with_name("thin.nii"), SHAPE)
    assert f"{in_plane}, inferior-superior as it is (1.5 mm)\n" in sr(bundle, thin).stderr
    asked = sr(bundle, scan, "--factor", "1,1,2", "--slice-thickness", 2).stderr
    assert (
        "left-right as it is (1 mm), posterior-anterior as it is (1 mm), inferior-superior 2 x finer (1.25 mm)" in asked
    )
    assert "slices 2 mm thick, 2.5 mm apart (gap 0.5 mm), SLR profile assumed" in asked
    bell = sr(
        bundle, scan, "-o", "bell.nii", "--factor", "1,1,2", "--slice-profile", "gaussian", "--report", "run.json"
    )
    sentence = "slices 2.5 mm apart, taken as 2.5 mm thick since the file states none, Gaussian profile assumed"
    assert sentence in bell.stderr
    assert sentence in Path("run.json").read_text()
    assert not np.allclose(load("bell.nii")[0], load("scan_sr.nii.gz")[0])  # that of the default
    assert "9x8x4 at 1x1x2.5 mm -> 9x8x8 at 1x1x1.25 mm in" in asked
    assert "; assumed blur" not in asked
    assert "to measure the blur" not in asked


def test_sagittal_slices_cause_a_warning_only_if_no_grid_is_asked_for(bundle: Path, tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "sagittal.nii.gz", (8, 9, 4), OBLIQUE)
    sentence = (
        "warning: the slices are sagittal, 2.42 mm apart: only the axial plane becomes finer, which crosses them;"
    )
    assert sentence in sr(bundle, path, "-o", "a.nii").stderr
    assert "the slices are sagittal" not in sr(bundle, path, "-o", "b.nii", "--isotropic").stderr


def test_the_report_has_the_request_and_the_passes(bundle: Path, scan: Path) -> None:
    words = ("--spacing", "0.5,0.5,1", "--slice-thickness", 2, "--blur", 0.5, "--uncertainty", "--preview")
    assert sr(bundle, scan, *words, "--report", "run.json").exit_code == 0
    report = json.loads(Path("run.json").read_text())
    (case,) = report["cases"]
    assert report["settings"]["spacing"] == [0.5, 0.5, 1]
    assert case["grid"]["requested"] == {"factor": None, "spacing": [0.5, 0.5, 1.0], "isotropic": False}
    assert case["grid"]["factor"] == [2, 2, 2.5]
    assert case["grid"]["spacing_mm"] == [0.5, 0.5, 1]
    assert case["grid"]["slices"].startswith("slices 2 mm thick")
    first, second, third = case["grid"]["passes"]
    assert [(one["stage"], one["plane"]) for one in (first, second, third)] == [
        (1, "sagittal"), (1, "coronal"), (2, "axial"),
    ]  # fmt: skip
    assert first == {
        "stage": 1, "plane": "sagittal", "axes": ["posterior-anterior", "inferior-superior"], "factor": [1, 2.5],
        "profile": ["bicubic", "slr"], "thickness": [1, 0.8], "blur_voxels": [0, 0],
    }  # fmt: skip
    assert (third["profile"], third["blur_voxels"]) == (["bicubic", "bicubic"], [0.5, 0.5])
    assert case["assumed_blur_voxels"] == 0.5
    assert case["largest_corner_shift_mm"] < 0.5
    assert load("scan_sr_uncertainty.nii.gz")[0].shape == load("scan_sr.nii.gz")[0].shape == (18, 16, 10)
    assert Path("scan_sr.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--factor", 2, "--isotropic"), 2, "factor and isotropic are given, but only one of factor, spacing and"),
        (("--factor", 2, "--spacing", 1, "--isotropic"), 2, "spacing and isotropic is possible; leave two out."),
        (("--factor", "2,2"), 2, "factor '2,2' must be one positive number, or three with commas, such as 1,1,5."),
        (("--factor", 0.5), 2, "factor is 0.5, but it must lie between 1 and 8; correct the setting."),
        (("--factor", "1,1,9"), 2, "factor is 9, but it must lie between 1 and 8; correct the setting."),
        (
            ("--spacing", 3),
            2,
            "the left-right axis has voxels 1 mm apart, but 3 mm is asked for: only finer voxels are",
        ),
        (
            ("--spacing", "1,1,0.3"),
            2,
            "the inferior-superior axis would become 8.333 times finer, from 2.5 to 0.3 mm, but at most 8 times is"
            " possible; give a spacing of at least 0.3125 mm there.",
        ),
        (("--spacing", "1,1,2.5"), 2, "the voxels would keep their size, 1 x 1 x 2.5 mm; ask for a factor above 1, or"),
        (("--slice-thickness", 50), 2, "a slice thickness of 50 mm is given, but for slices 2.5 mm apart it must lie"),
        (("--slice-thickness", -1), 2, "slice_thickness is -1.0, but it must lie between 0 and inf"),
        (("--slice-profile", "bell"), 2, "Invalid value for '--slice-profile': 'bell' is not one of 'slr', 'gaussian'"),
    ],
)
def test_wrong_requests_are_one_sentence_and_nothing_is_written(
    words: tuple[object, ...], code: int, sentence: str, bundle: Path, scan: Path
) -> None:
    result = sr(bundle, scan, *words)
    assert result.exit_code == code
    assert sentence in result.stderr
    assert not list(Path().iterdir())


def test_profiles_have_the_same_names_everywhere() -> None:
    choices = {
        (command, option.name): option.type.choices
        for command in ("sr", "degrade")
        for option in main.get_command(click.Context(main), command).params
        if isinstance(option.type, click.Choice)
    }
    assert tuple(choices["sr", "slice_profile"]) == SLICE_PROFILES
    assert tuple(choices["degrade", "profile"]) == ("bicubic", *SLICE_PROFILES)


@pytest.mark.parametrize(("name", "profile"), [("miar_brats", "slr"), ("miar_lidc", "gaussian")])
def test_a_bundle_declares_the_profile_of_its_scanners(name: str, profile: str) -> None:
    inferer = read_config(str(BUNDLES / name), {}, workflow="inference").get_parsed_content("volume_inferer")
    assert inferer.slice_profile == profile


def test_a_dicom_series_states_its_thickness(bundle: Path, tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "series", (9, 8, 4), (1, 1, 2.5))
    talking = sr(bundle, series, "--isotropic").stderr
    assert "slices 2.5 mm thick, 2.5 mm apart, SLR profile assumed" in talking
    assert load("series_sr.nii.gz")[0].shape == (9, 8, 10)


@pytest.mark.parametrize("words", [("--isotropic",), ("--factor", "2,1,1.5")])
def test_a_dicom_series_in_and_out(words: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "series", (9, 8, 4), (1, 1, 2.5))
    assert sr(bundle, series, *words, "--out-format", "dicom").exit_code == 0
    assert sr(bundle, series, *words, "-o", "sr.nii").exit_code == 0
    written, (voxels, affine) = read_volume("series_sr"), load("sr.nii")
    expected = Grid(voxels.shape, affine)  # type: ignore[arg-type]
    assert written.grid.shape == expected.shape
    corners = (fov_corners(grid.affine, grid.shape) for grid in (written.grid, expected))
    np.testing.assert_allclose(*corners, atol=0.01)


def test_settings_of_a_resolver_can_be_replaced(bundle: Path) -> None:
    resolver = SuperResolver(bundle, "cpu", lookahead_tokens=0, factor="1,1,2")
    assert resolver.settings["factor"] == (1, 1, 2)
    volume = np.random.default_rng(0).random((6, 5, 3))
    assert resolver(volume).shape == (6, 5, 6)
    assert resolver.with_settings(factor=None, spacing=0.5)(volume).shape == (12, 10, 6)
    assert resolver.with_settings(factor=2)(volume[..., 0]).shape == (12, 10)


@pytest.mark.parametrize("stored", [(1, 23, 19), (23, 1, 19), (23, 19)], ids=["sagittal", "coronal", "two axes"])
def test_a_single_slice_becomes_finer_in_its_own_plane(stored: tuple[int, ...], bundle: Path, tmp_path: Path) -> None:
    flat = write_nifti_phantom(tmp_path / "flat.nii", (23, 19, 1), np.diag([0.9, 0.8, 5, 1]), np.float32)
    voxels, _ = load(flat)
    across = stored.index(1) if 1 in stored else 0
    axes = [axis for axis in range(3) if axis != across]
    order = [*axes, across] if len(stored) == 2 else [0, 1, 2]  # the patient axis of each voxel axis
    spacing = np.zeros(3)
    spacing[axes], spacing[across] = (0.9, 0.8), 5
    affine = np.eye(4)
    affine[:3, :3] = (ROTATION @ np.diag(spacing))[:, order]
    affine[:3, 3] = 31, -12, 7
    nib.save(nib.Nifti1Image(voxels.reshape(stored), affine), "scan.nii")
    done, _ = sr(bundle, "scan.nii", "--preview"), sr(bundle, flat, "-o", "flat_sr.nii.gz")
    assert done.exit_code == 0, done.output
    assert "as it is (5 mm)" in done.stderr
    assert "become finer" not in done.stderr
    (result, finer), (expected, _) = load("scan_sr.nii.gz"), load("flat_sr.nii.gz")
    np.testing.assert_array_equal(result.squeeze(), expected.squeeze())
    corners = fov_corners(affine, (*stored, 1)[:3])
    assert np.abs(fov_corners(finer, (*result.shape, 1)[:3]) - corners).max() < 0.01


@pytest.mark.parametrize("orientation", [(0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1)], ids=["sagittal", "coronal"])
def test_a_series_of_one_slice_becomes_finer_in_its_own_plane(
    orientation: tuple[int, ...], bundle: Path, tmp_path: Path
) -> None:
    folder = write_dicom_series(tmp_path / "one", (30, 26, 1), (0.5, 0.7, 5), orientation=orientation)
    done = sr(bundle, folder, "--out-format", "dicom")
    assert done.exit_code == 0, done.output
    source, result, (image,) = read_volume(folder), read_volume("one_sr"), by_height(Path("one_sr"))
    assert (image.Columns, image.Rows, image.SliceThickness) == (120, 104, 5)
    corners = fov_corners(source.affine, source.array.shape)
    assert np.abs(fov_corners(result.affine, result.array.shape) - corners).max() < 0.01


def test_a_single_slice_is_degraded_in_its_own_plane(tmp_path: Path) -> None:
    scan = write_nifti_phantom(tmp_path / "scan.nii", (32, 1, 24), np.diag([1.0, 5, 1, 1]))
    assert CliRunner().invoke(main, ["degrade", str(scan)]).exit_code == 0
    assert load("scan_lr.nii.gz")[0].shape == (8, 1, 6)
