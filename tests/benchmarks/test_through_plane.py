from __future__ import annotations

import csv
import json
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.bundle_runs import BUNDLES
from helpers.phantoms import head
from helpers.tiny_peers import shrink_peers
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.processing import resample_from_to

from benchmarks import run_program, thick_slices, through_plane
from benchmarks.peers.volumes import rcan_method, thin_slices
from benchmarks.thick_slices import CHANGES, SLICES, ThickSlices
from benchmarks.through_plane_methods import bundled, cubic, linear_inverse, saved_results
from miar_monai.data.geometry import corner_distance, fov_corners
from miar_monai.data.io import Volume
from miar_monai.errors import CheckpointError, ConfigurationError, DatasetError, OutputError
from miar_monai.inference.acquisition import SLICE_PROFILES
from miar_monai.inference.resolver import SuperResolver
from miar_monai.networks import Estimator
from miar_monai.networks.weights import save_weights

RAS = np.array([[1.0, 0, 0, -20], [0, 1, 0, -30], [0, 0, 1, 10], [0, 0, 0, 1]])


def volume(array: np.ndarray, height: float = 1.0) -> Volume:
    return Volume(array.astype(np.float32), RAS @ np.diag([1, 1, height, 1]), np.dtype("float32"), Path("v.nii.gz"))


# Thick slices


@given(
    st.sampled_from([*SLICES, (2.5, 0.5)]),
    st.integers(20, 47),
    st.sampled_from([1.0, 1.25, 0.8]),
    st.sampled_from(SLICE_PROFILES),
)
@settings(max_examples=20, deadline=None)
def test_thick_slices_have_the_field_of_view_of_the_truth_and_its_degradation(
    slices: tuple[float, float], size: int, height: float, profile: str
) -> None:
    array = np.random.default_rng(size).random((5, 7, size))
    case = ThickSlices.of("p", "t2", *slices, volume(array, height), profile=profile)
    assert case.name == f"p_t2_{profile}_{slices[0]:g}_{slices[1]:g}"
    assert case.thick.grid.spacing[2] == pytest.approx(sum(slices))
    assert size - case.truth.array.shape[2] < sum(slices) / height + 1
    corners = [fov_corners(x.affine, x.array.shape) for x in (case.truth, case.thick)]
    tolerance = 1e-6 if sum(slices) % height == 0 else height / 2 + 1e-6
    np.testing.assert_allclose(corners[0], corners[1], atol=tolerance)
    planes = torch.from_numpy(case.truth.array)[:, None].double()
    sizes = tuple(planes.shape[2:]), case.thick.array.shape[1:]
    rows, columns = case.degradation.axes(*sizes)
    np.testing.assert_allclose(planes[:, 0] @ columns.matrix().T, case.thick.array, atol=1e-5)
    assert torch.equal(rows.matrix(), torch.eye(7, dtype=torch.float64))
    assert cubic(case).shape == linear_inverse(case).shape == case.truth.array.shape


def test_the_truth_is_the_central_part_of_the_volume() -> None:
    array = np.random.default_rng(0).random((3, 3, 23))
    case = ThickSlices.of("p", "t1", 5, 0, volume(array))
    assert case.truth.array.shape == (3, 3, 20)
    np.testing.assert_array_equal(case.truth.array, array[..., 1:21].astype(np.float32))
    assert case.truth.affine[2, 3] == 11


def test_both_methods_restore_a_ramp_at_the_right_positions() -> None:
    ramp = np.broadcast_to(np.arange(60.0), (6, 6, 60))
    case = ThickSlices.of("p", "t1", 5, 0, volume(ramp))
    for method, ripple in ((cubic, 0.01), (linear_inverse, 0.3)):
        error = (method(case) - case.truth.array)[..., 20:40]
        assert np.abs(error).max() < ripple, method
        assert abs(error.mean()) < 0.01, method


@pytest.mark.parametrize("size", [(5, 7, 29), (4, 9, 33)])
def test_the_spline_along_the_slices_is_the_one_of_the_volume(size: tuple[int, int, int]) -> None:
    case = ThickSlices.of("p", "t1", 3, 0.5, volume(np.random.default_rng(0).random(size), 1.25))
    image = nib.Nifti1Image(case.thick.array, case.thick.affine)
    wanted = resample_from_to(image, (case.truth.array.shape, case.truth.affine), order=3, mode="nearest")
    np.testing.assert_allclose(cubic(case), wanted.get_fdata(), atol=1e-5)


def test_the_linear_inverse_explains_its_input_better_than_the_spline() -> None:
    case = ThickSlices.of("p", "t1", 4, 1, volume(head((20, 24, 40))))
    residuals = [
        np.abs(case.degradation(torch.from_numpy(method(case))).numpy() - case.thick.array).max()
        for method in (linear_inverse, cubic)
    ]
    assert residuals[0] < 1e-3 < residuals[1]


def test_changed_slices_differ_as_their_name_says() -> None:
    data = volume(1000 * head((16, 20, 40)))
    plain = ThickSlices.of("p", "t1", 5, 0, data)
    changed = {name: ThickSlices.of("p", "t1", 5, 0, data, name) for name in CHANGES if name != plain.profile}
    assert changed["box"].name == "p_t1_slr_box_5_0"
    assert changed["box"].title == "5‖0, box"
    span = np.ptp(plain.truth.array)
    for name, case in changed.items():
        assert case.degradation == plain.degradation  # what the methods are told
        np.testing.assert_array_equal(case.truth.array, plain.truth.array)
        error = case.thick.array - plain.thick.array
        assert error.any()
        if name.startswith("noise"):
            assert error.std() == pytest.approx(float(name[5:]) * span, rel=0.05)
        elif name.endswith("bits"):
            levels = 2 ** int(name[:-4])
            assert len(np.unique(case.thick.array)) <= levels
            assert np.abs(error).max() <= np.ptp(plain.thick.array) / (levels - 1) / 2 * 1.001
        else:
            assert 0 < np.abs(error).max() < 0.2 * span
    thin = ThickSlices.of("p", "t1", 4, 1, data)
    np.testing.assert_allclose(changed["thinner"].thick.array, thin.thick.array, atol=1e-3)


# The commands


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Write heads with noise for detail, the one of the second patient interpolated along z; return options."""
    root = tmp_path_factory.mktemp("data")
    for i in range(3):
        noise = np.random.default_rng(i).random((45, 43, 44))
        if i == 1:
            noise = (noise + np.roll(noise, 1, 2) + np.roll(noise, -1, 2)) / 3
        array = 1000 * head((45, 43, 44), i) * (0.6 + noise)
        path = root / f"BraTS_{i}" / f"BraTS_{i}_t2.nii.gz"
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([-1.0, -1, 1, 1])), path)
    split = root / "split.json"
    split.write_text('{"training": [], "validation": [], "test": ["BraTS_0", "BraTS_1", "BraTS_2"]}')
    return {
        "dataset_dir": str(root), "split_file": str(split), "bundle": str(BUNDLES / "miar_brats"), "device": "cpu",
    }  # fmt: skip


NEAREST = """
import sys, nibabel as nib, numpy as np
image = nib.load(sys.argv[1])
factor = int(sys.argv[3])
affine = image.affine @ np.diag([1, 1, 1 / factor, 1])
affine[:3, 3] = image.affine[:3, 3] - image.affine[:3, 2] * (1 - 1 / factor) / 2
nib.save(nib.Nifti1Image(image.get_fdata().repeat(factor, 2), affine), sys.argv[2] + "/anything.nii.gz")
"""


def test_thick_slices_go_through_a_program_and_are_measured(
    data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thick, results, out = (tmp_path / name for name in ("thick", "nearest", "out"))
    thick_slices.main(**data, output_dir=str(thick), slices=((5, 0), (4, 0)))
    names = [f"BraTS_{i}_t2_slr_{t}_0.nii.gz" for i in (0, 2) for t in (4, 5)]
    assert sorted(path.name for path in thick.iterdir()) == names  # not the interpolated volume
    (tmp_path / "nearest.py").write_text(NEAREST)
    command = f"{sys.executable} {tmp_path / 'nearest.py'} {{input}} {{folder}} {{factor}}"
    run_program.main(str(thick), str(results), command, only="_5_0")
    assert "BraTS_2_t2_slr_5_0.nii.gz: " in capsys.readouterr().out
    run_program.main(str(thick), str(results), "none", only="_5_0")  # nothing is left to run
    image = nib.load(results / names[1])
    assert image.shape == (45, 43, 40)
    assert image.get_data_dtype() == np.int16
    wanted = nib.load(thick / names[1]).get_fdata().repeat(5, 2)
    np.testing.assert_allclose(image.get_fdata(), wanted, atol=wanted.max() / 2**12)
    options = {**data, "metrics": ["PSNR", "SSIM"], "every": 9, "output_dir": str(out)}
    through_plane.main(f"nearest={results}", **options, slices=[[5, 0], [4, 0]])
    with (out / "through_plane.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["subject"] for row in rows} == {"BraTS_0", "BraTS_2"}
    assert {row["plane"] for row in rows} == {"sagittal", "coronal", "axial"}
    found = {(row["thickness‖gap"], row["method"]) for row in rows}
    baselines = ("cubic B-spline", "linear inverse")
    assert found == {*((title, name) for title in ("5‖0", "4‖0") for name in baselines), ("5‖0", "nearest")}
    text = (out / "through_plane.md").read_text()
    assert "- Volumes: BraTS_0 t2, BraTS_2 t2." in text
    assert "Volumes: 2, of patients: 2." in text
    head_of_table = [line.split(" | ") for line in text.splitlines() if line.startswith("| 5‖0 |")]
    assert [line[1] for line in head_of_table] == [*baselines, "nearest"]
    with (results / "seconds.csv").open(newline="") as file:
        seconds = sorted(float(row["seconds"]) for row in csv.DictReader(file))
    assert float(head_of_table[2][-1].strip("| ")) == pytest.approx(sum(seconds) / 2, rel=0.01)
    assert float(head_of_table[1][2]) > float(head_of_table[2][2])  # PSNR
    assert "| minus nearest |" not in text
    assert text.count("| minus cubic B-spline |") == 2
    with pytest.raises(OutputError, match="exists already"):
        through_plane.main(**options)


TINY: dict[str, Any] = {"channels": [8, 16], "blocks": [1, 1]}


def write_bundle(folder: Path, network: Estimator) -> None:
    """Write the brain's bundle with a tiny network."""
    (folder / "models").mkdir(parents=True)
    shutil.copytree(BUNDLES / "miar_brats" / "configs", folder / "configs")
    path = folder / "configs" / "inference.json"
    content = json.loads(path.read_text()) | {"network_def": {"_target_": "miar_monai.networks.Estimator", **TINY}}
    path.write_text(json.dumps(content))
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    metadata.pop("weights_sha256", None)
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    save_weights(network, folder / "models" / "model.pt")


@pytest.mark.skipif(
    "factor" not in json.loads((BUNDLES / "miar_brats" / "configs" / "inference.json").read_text()),
    reason="bundles make the axial plane finer only",
)
@pytest.mark.parametrize("profile", ["slr", "gaussian"])
def test_a_bundle_is_told_factor_thickness_and_profile(profile: str, data: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_bundle(folder, Estimator(**TINY))  # untrained, so the linear estimate
    options = {**data, "metrics": ["PSNR"], "every": 9, "output_dir": str(tmp_path), "limit": 1}
    through_plane.main(f"MIAR={folder}", **options, slices=((5, 0), (4, 1)), fidelities=1, profile=profile)
    assert f"- The slice profile is {profile}, which" in (tmp_path / "through_plane.md").read_text()
    with (tmp_path / "through_plane.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    psnr = {
        key: np.mean([float(row["PSNR"]) for row in rows if (row["thickness‖gap"], row["method"]) == key])
        for key in product(("5‖0", "4‖1"), ("cubic B-spline", "linear inverse", "MIAR, fidelity 1"))
    }
    for title in ("5‖0", "4‖1"):
        assert psnr[title, "MIAR, fidelity 1"] == pytest.approx(psnr[title, "linear inverse"], abs=0.5)
        assert psnr[title, "MIAR, fidelity 1"] > psnr[title, "cubic B-spline"]


def test_fidelities_between_two_others_are_as_from_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Estimator(**TINY)
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    write_bundle(tmp_path / "tiny", network)
    case = ThickSlices.of("p", "t2", 4, 1, volume(1000 * head((21, 24, 43)), 1.25))
    direct = bundled("MIAR", str(tmp_path / "tiny"), "cpu", (0.3,))(case)["MIAR, fidelity 0.3"]
    calls, original = [], SuperResolver.volume
    monkeypatch.setattr(SuperResolver, "volume", lambda *args: calls.append(args) or original(*args))
    results = bundled("MIAR", str(tmp_path / "tiny"), "cpu", (0, 0.3, 1))(case)
    assert [*results] == [f"MIAR, fidelity {fidelity}" for fidelity in ("0", "0.3", "1")]
    assert len(calls) == 2
    low, mixed, high = results.values()
    np.testing.assert_allclose(mixed.array, direct.array, atol=1e-3)
    assert np.abs(low.array - high.array).max() > 1
    assert mixed.seconds == pytest.approx((low.seconds + high.seconds) / 2)


def test_thin_slices_are_the_mean_of_sagittal_and_coronal_planes() -> None:
    thick = torch.rand(20, 17, 3)
    network = lambda lr: lr.cumsum(dim=2).repeat_interleave(2, dim=3)  # noqa: E731  # depends on the rows
    wanted = (thick.cumsum(dim=1) + thick.cumsum(dim=0)).repeat_interleave(2, dim=2) / 2
    torch.testing.assert_close(thin_slices(network, thick, torch.device("cpu")), wanted)


def test_rcan_is_measured_on_the_slices_it_was_trained_for(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, peers = tmp_path / "rcan_through_plane.pt", shrink_peers(monkeypatch)
    save_weights(peers.rcan_through_plane(), weights)
    options = {**data, "metrics": ["PSNR"], "every": 9, "output_dir": str(tmp_path), "limit": 1, "rcan": str(weights)}
    through_plane.main(**options, slices=((5, 0), (4, 1), (4, 0)))
    with (tmp_path / "through_plane.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    titles = ("RCAN", "RCAN, data-consistent")
    assert {(row["thickness‖gap"], row["method"]) for row in rows if "RCAN" in row["method"]} == {
        ("5‖0", title) for title in titles
    }
    plain, consistent = (np.mean([float(row["PSNR"]) for row in rows if row["method"] == title]) for title in titles)
    assert consistent > plain + 3  # the network is untrained
    with pytest.raises(ConfigurationError, match="is for slices 5 voxels apart and 5 voxels thick, but there are only"):
        through_plane.main(**options, slices=((4, 1), (4, 0)), overwrite=True)
    with pytest.raises(CheckpointError, match="train it first"):
        through_plane.main(**{**options, "rcan": str(tmp_path / "none.pt")}, slices=(5, 0), overwrite=True)


def test_consistent_rcan_explains_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = shrink_peers(monkeypatch)
    save_weights(peers.rcan_through_plane(), tmp_path / "rcan.pt")
    case = ThickSlices.of("p", "t2", 5, 0, volume(1000 * head((20, 24, 40))))
    method = rcan_method(str(BUNDLES / "miar_brats"), tmp_path / "rcan.pt", [case], torch.device("cpu"))
    results = [result.array for result in method(case).values()]
    assert all(result.shape == case.truth.array.shape for result in results)
    plain, consistent = (
        np.abs(case.degradation(torch.from_numpy(result)).numpy() - case.thick.array).max() for result in results
    )
    assert consistent < 1 < 100 < plain  # of 1000


def test_results_must_be_complete_and_on_the_grid_of_the_truth(tmp_path: Path) -> None:
    cases = [ThickSlices.of(f"p{i}", "t2", 5, 0, volume(head((16, 16, 20), i))) for i in range(2)]
    with pytest.raises(DatasetError, match="has no results of any volume"):
        saved_results("peer", tmp_path, cases)
    truth = cases[0].truth
    nib.save(nib.Nifti1Image(truth.array, truth.affine), tmp_path / "p0_t2_slr_5_0.nii.gz")
    with pytest.raises(DatasetError, match="has no results of p1_t2_slr_5_0"):
        saved_results("peer", tmp_path, cases)
    read = saved_results("peer", tmp_path, cases[:1])
    result = read(cases[0])["peer"]
    np.testing.assert_array_equal(result.array, truth.array)
    assert result.seconds is None
    moved = truth.affine.copy()
    moved[2, 3] += 0.5
    assert corner_distance(moved, truth.affine, (16, 16, 20)) == 0.5
    nib.save(nib.Nifti1Image(truth.array, moved), tmp_path / "p0_t2_slr_5_0.nii.gz")
    with pytest.raises(DatasetError, match="but the grid of the truth"):
        read(cases[0])


@pytest.mark.parametrize("slices", ["5", (5,), (0, 1), (5, -1), ((5, 0), (4,)), ("a", 0)])
def test_wrong_slices_are_an_error(data: dict[str, Any], tmp_path: Path, slices: Any) -> None:
    with pytest.raises(ConfigurationError, match="a thickness above 0 and a gap"):
        thick_slices.main(**data, output_dir=str(tmp_path), slices=slices)


def test_a_folder_needs_a_name_and_a_section_an_isotropic_volume(data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not NAME=FOLDER"):
        through_plane.main("runs/eclare", **data, output_dir=str(tmp_path), slices=(5, 0))
    Path(tmp_path, "split.json").write_text('{"training": [], "validation": ["BraTS_0"], "test": ["BraTS_1"]}')
    with pytest.raises(DatasetError, match="none of the 1 volumes has as much detail"):
        thick_slices.main(**{**data, "split_file": str(tmp_path / "split.json")}, output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigurationError, match=r"the changes \['9bits'\] are unknown"):
        thick_slices.main(**data, output_dir=str(tmp_path / "out"), changes="9bits")
    with pytest.raises(
        ConfigurationError, match=r"the changes \['box'\] are unknown: the known ones are .* slr, gaussian,"
    ):
        thick_slices.main(**data, output_dir=str(tmp_path / "out"), changes="box", profile="box")
    with pytest.raises(
        ConfigurationError, match="profile is 'bell', but it must be one of slr, gaussian, box; correct"
    ):
        through_plane.main(**data, output_dir=str(tmp_path / "out"), profile="bell")
    options = {"slices": (8, 0), "subjects": "BraTS_1", "changes": ("box", "8bits")}
    thick_slices.main(**data, output_dir=str(tmp_path / "out"), **options)
    names = [f"BraTS_1_t2_slr{change}_8_0.nii.gz" for change in ("", "_8bits", "_box")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("name", "command", "error", "sentence"),
    [
        ("a_t1_5_0", "false {input}", DatasetError, "false ended with status 1 and 0 results"),
        ("a_t1_5_0", "true", DatasetError, "true ended with status 0 and 0 results"),
        ("a_t1_5_0", "no-such-program", ConfigurationError, "no-such-program cannot be run"),
        ("a_t1_5_0", "true {thick}", ConfigurationError, "cannot be used"),
        ("a_t1", "true", DatasetError, "must be named"),
    ],
)
def test_mistakes_of_programs_are_one_sentence(
    tmp_path: Path, name: str, command: str, error: type[Exception], sentence: str
) -> None:
    (tmp_path / "in").mkdir()
    nib.save(
        nib.Nifti1Image(np.zeros((4, 4, 2), np.float32), np.diag([0.5, 0.5, 5, 1])), tmp_path / f"in/{name}.nii.gz"
    )
    with pytest.raises(error, match=sentence):
        run_program.main(str(tmp_path / "in"), str(tmp_path / "out"), command)
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert not (tmp_path / "out" / "seconds.csv").exists()


def test_thickness_and_factor_are_also_given_in_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a_b_t1_4_1.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 2), np.float32), np.diag([0.5, 0.8, 5, 1])), path)
    assert run_program.values(path) == {
        "input": str(path), "thickness": "4", "spacing": "5", "relative_thickness": "8", "factor": "10",
    }  # fmt: skip
    with pytest.raises(DatasetError, match=r"has no _9\*\.nii\.gz"):
        run_program.main(str(tmp_path), str(tmp_path / "out"), only="_9")
