from __future__ import annotations

import csv
import re
import sqlite3
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.affines import upscaled_affine
from helpers.bundle_runs import (
    EACH_NETWORK,
    NAMES,
    TOKENS,
    arguments,
    command,
    config,
    has_estimator,
    parsed,
    quick_command,
    tiny_checkpoint,
    tiny_tokenizer_file,
    workflow,
)
from helpers.phantoms import write_brats_folder, write_dicom_series, write_nifti_phantom
from helpers.tiny import started
from helpers.tiny_bundle import write_tiny_bundle

from miar_monai.cli.main import main
from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import read_volume
from miar_monai.inference.volume_inferer import VolumeInferer
from miar_monai.networks.weights import load_weights, save_weights
from miar_monai.transforms import ScaleIntensityRobust


# raised inside MONAI and ITK
def write_dataset(name: str, folder: Path) -> Path:
    if name == "miar_brats":
        return write_brats_folder(folder, 4, (40, 36, 6), contrasts=("t2",))
    for i in range(3):
        write_nifti_phantom(folder / f"case{i}.nii.gz", (40, 36, 6), seed=i, low=-1000, high=400)
    write_dicom_series(folder / "LIDC-IDRI-0001" / "study" / "series", (40, 36, 6))
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, TOKENS])
def test_train_both_stages_evaluate_and_infer(name: str, tmp_path: Path) -> None:
    """One bundle runs in new processes, the others in forked ones."""
    data, out = write_dataset(name, tmp_path / "data"), tmp_path / "out"
    common = {"dataset_dir": data, "output_dir": out}
    run = command if name == "miar_brats" else partial(quick_command, folder=tmp_path)
    first = run(*arguments(name, "train_stage1", tmp_path, run_id="training", lr=1e-3, tracking="mlflow", **common))
    assert first.returncode == 0, first.stderr
    assert (out / "tokenizer.pt").is_file()
    assert list((out / "stage1").glob("events.out.tfevents.*"))
    metrics = sqlite3.connect(out / "mlruns.db").execute("select key from metrics").fetchall()
    assert {("train_loss",), ("psnr",), ("codes_used",)} <= set(metrics)

    second = run(*arguments(name, "train", tmp_path, run_id="training", self_correction=0, **common))
    assert second.returncode == 0, second.stderr
    assert "epoch 1/1, iteration 1: token_loss" in second.stdout
    assert "ssim" in second.stdout

    trained = out / "model.pt"
    if has_estimator(name):
        settings = {**common, "output_dir": tmp_path / "estimator"}
        third = run(*arguments(name, "train_estimator", tmp_path, run_id="training", **settings))
        assert third.returncode == 0, third.stderr
        assert "epoch 1/1, iteration 1: faithful_loss" in third.stdout
        trained = tmp_path / "estimator" / "model.pt"

    evaluated = run(*arguments(name, "evaluate", tmp_path, run_id="evaluating", checkpoint=trained, **common))
    assert evaluated.returncode == 0, evaluated.stderr
    found = rows(out / "metrics.csv")
    assert {"nearest", "bicubic", "linear inverse", "MIAR"} <= {row["method"] for row in found}
    assert len({(row["subject"], row["slice"]) for row in found}) == 2  # one patient, two slices
    assert "| MIAR |" in (out / "metrics.md").read_text()
    assert '<th scope="row">MIAR</th>' in (out / "metrics.html").read_text(encoding="utf-8")

    volume = write_nifti_phantom(tmp_path / "lr.nii.gz", (20, 17, 3))
    inferred = run(
        *arguments(name, "inference", tmp_path, dataset_dir=volume, output_dir=out / "sr", checkpoint=trained)
    )
    assert inferred.returncode == 0, inferred.stderr
    assert "Traceback" not in inferred.stderr
    assert [path.name for path in (out / "sr").iterdir()] == ["lr_sr.nii.gz"]


def test_an_estimator_learns_to_sample(tmp_path: Path) -> None:
    name, data = "miar_brats", write_dataset("miar_brats", tmp_path / "data")
    files = str([config(name, kind) for kind in ("train_estimator", "train_posterior")])
    plain = tmp_path / "plain.pt"
    save_weights(started(parsed(name, "train_estimator", "network_def")), plain)
    done = quick_command(
        *arguments(
            name, "train_estimator", tmp_path, run_id="training", config_file=files, pretrained=plain, feature_weight=0,
            dataset_dir=data, output_dir=tmp_path / "out",
        ),
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "spread_over_skill 0.0000" in done.stdout  # before the first step
    sampling = parsed(name, "train_estimator", "network_def", noise_channels=2)
    load_weights(sampling, tmp_path / "out" / "model.pt", "")
    assert (sampling.unet.noise_layers[0].weight != 0).any()


OBLIQUE = np.array([[0.1, 0.02, 2.4, -30], [-0.85, 0.1, 0.3, 40], [0.08, 0.9, 0.1, -7], [0, 0, 0, 1]])
AXIAL_FIRST = np.array([[0, 0, -0.8, 12], [0, 1.1, 0, -20], [-3, 0, 0, 5], [0, 0, 0, 1.0]])
FLIPPED = np.array([[-0.7, 0, 0, 20], [0, -0.9, 0, 30], [0, 0, -2.5, 10], [0, 0, 0, 1]])
# storage: which array axis is the patient's inferior-superior one
STORAGES = {"flipped": (FLIPPED, 2), "axial axis first": (AXIAL_FIRST, 0), "oblique sagittal": (OBLIQUE, 1)}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", [*NAMES, TOKENS])
def test_results_cover_the_field_of_view_of_their_input(name: str, storage: str, tmp_path: Path) -> None:
    affine, through_plane = STORAGES[storage]
    shape = [21, 18, 20]
    shape[through_plane] = 3
    path = write_nifti_phantom(tmp_path / "in.nii.gz", shape, affine, low=0 if name == "miar_brats" else -1000)
    before = path.read_bytes()
    factors = [4, 4, 4]
    factors[through_plane] = 1
    run = workflow(
        name, "inference", dataset_dir=str(path), output_dir=str(tmp_path / "out"),
        checkpoint=str(tiny_checkpoint(tmp_path, name)), progress=False,
    )  # fmt: skip
    run.run()

    result = nib.load(tmp_path / "out" / "in_sr.nii.gz")
    assert result.shape == tuple(np.multiply(shape, factors))
    np.testing.assert_allclose(result.affine, upscaled_affine(affine, factors), atol=1e-4)
    np.testing.assert_allclose(fov_corners(result.affine, result.shape), fov_corners(affine, shape), atol=1e-4)
    assert nib.aff2axcodes(result.affine) == nib.aff2axcodes(affine)
    assert result.header["sform_code"] == 1
    assert result.get_data_dtype() == np.int16
    assert path.read_bytes() == before
    lr, sr = (np.asanyarray(image.dataobj).astype(float) for image in (nib.load(path), result))
    assert abs(sr.mean() - lr.mean()) < 0.05 * np.ptp(lr)  # in the units of the input


def test_folders_and_series_are_super_resolved_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "volumes"
    for name in ("a.nii.gz", "b.nii"):
        write_nifti_phantom(folder / name, (16, 16, 2))
    (folder / "notes.txt").write_text("not a volume")
    series = write_dicom_series(tmp_path / "series.1", (16, 16, 2))
    checkpoint = str(tiny_checkpoint(tmp_path, "miar_lidc"))
    for inputs in (str(folder), [str(series), str(folder / "a.nii.gz")]):
        out = tmp_path / f"out{len(inputs) == 2}"
        workflow(
            "miar_lidc", "inference", dataset_dir=inputs, output_dir=str(out), checkpoint=checkpoint, progress=False
        ).run()
    assert sorted(path.name for path in (tmp_path / "outFalse").iterdir()) == ["a_sr.nii.gz", "b_sr.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "outTrue").iterdir()) == ["a_sr.nii.gz", "series.1_sr.nii.gz"]
    lr, sr = read_volume(series), read_volume(tmp_path / "outTrue" / "series.1_sr.nii.gz")
    np.testing.assert_allclose(
        fov_corners(sr.affine, sr.array.shape), fov_corners(lr.affine, lr.array.shape), atol=1e-4
    )


def test_inference_does_not_degrade_and_uses_its_settings(tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "in.nii.gz", (20, 20, 1))
    run = workflow(
        "miar_brats", "inference", dataset_dir=str(path), output_dir=str(tmp_path),
        checkpoint=str(tiny_checkpoint(tmp_path)), lookahead_tokens=2, fidelity=1.0, strategy="greedy", progress=False,
    )  # fmt: skip
    item = run.parser.get_parsed_content("dataset")[0]["image"]
    toward_ras = torch.from_numpy(read_volume(path).array[None, ::-1, ::-1].copy())
    assert torch.equal(item.as_tensor(), ScaleIntensityRobust()(toward_ras).as_tensor())
    inferer = run.parser.get_parsed_content("inferer")
    assert inferer.fidelity == 1
    assert inferer.decoding.strategy == "greedy"


def test_num_slices_0_takes_all_slices(tmp_path: Path) -> None:
    data = write_dataset("miar_brats", tmp_path / "data")
    run = workflow("miar_brats", "evaluate", dataset_dir=str(data), num_slices=0)
    item = run.parser.get_parsed_content("dataset")[0]
    assert item["label"].shape == (1, 256, 256, 6)
    assert item["image"].shape == (1, 64, 64, 6)


@pytest.mark.parametrize("name", EACH_NETWORK)
def test_the_bundle_reports_what_the_command_reports(name: str, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", name)
    write_nifti_phantom(tmp_path / "in" / "sub-1" / "t2.nii", (19, 13, 2))
    noisy = 500 + 300 * np.random.default_rng(0).standard_normal((40, 36, 2))
    nib.save(nib.Nifti1Image(noisy.astype(np.float32), np.diag([1.0, 1, 3, 1])), tmp_path / "noisy.nii")
    with zipfile.ZipFile(tmp_path / "in" / "packed.zip", "w") as archive:
        archive.write(tmp_path / "noisy.nii", "inside.nii")
    settings = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out", "uncertainty": True}
    weights = {"checkpoint": bundle / "models" / "model.pt"}
    done = quick_command(*arguments(name, "inference", tmp_path, **settings, **weights), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    options = ["-o", tmp_path / "out", "--overwrite", "--uncertainty", "--model", bundle, "--device", "cpu"]
    command = CliRunner().invoke(main, ["sr", str(tmp_path / "in"), *map(str, options)])
    assert command.exit_code == 0, command.output
    for path in ("packed_sr.nii.gz", "sub-1/t2_sr.nii.gz"):
        assert f"\n{tmp_path}/out/{path}\n" in done.stderr
        assert f"{tmp_path}/out/{path}\n" in command.stdout

    def messages(text: str) -> list[str]:
        lines = sorted({re.sub(r" in [0-9.]+ s;", "", line) for line in text.splitlines()})
        return [line for line in lines if " -> " in line or line.startswith(("warning: ", "uncertainty: "))]

    assert messages(done.stderr) == messages(command.stderr)
    assert sum(" -> " in line for line in messages(done.stderr)) == 2
    assert any("the axial slices have 19 x 13 voxels" in line for line in messages(done.stderr))
    assert any("noisier than the training data" in line for line in messages(done.stderr))
    if name != "miar_brats":
        assert any("air in a CT has -1000 HU" in line for line in messages(done.stderr))


def test_each_case_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    for name, shape in (("a", (19, 13, 2)), ("b", (11, 15, 1))):
        write_nifti_phantom(tmp_path / "in" / f"{name}.nii", shape)
    plan, planned = VolumeInferer.plan, []

    def counted(self: VolumeInferer, image: Any, network: Any) -> Any:
        planned.append(tuple(image.shape))
        return plan(self, image, network)

    monkeypatch.setattr(VolumeInferer, "plan", counted)
    settings = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "factor": [2, 2, 1]}
    workflow("miar_brats", "inference", checkpoint=str(bundle / "models" / "model.pt"), **settings).run()
    assert planned == [(1, 19, 13, 2), (1, 11, 15, 1)]
    shapes = [nib.load(tmp_path / "out" / f"{name}_sr.nii.gz").shape for name in "ab"]
    assert shapes == [(38, 26, 2), (22, 30, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train_stage1", "train"])
def test_two_runs_of_one_seed_give_the_same_weights(kind: str, tmp_path: Path) -> None:
    data = write_dataset("miar_brats", tmp_path / "data")
    tokenizer = tiny_tokenizer_file(tmp_path)
    weights = []
    for i, seed in enumerate((5, 5, 6)):
        out = tmp_path / f"run{i}"
        settings = {"dataset_dir": data, "output_dir": out, "seed": seed, "num_workers": 1}
        if kind == "train":
            settings["tokenizer_path"] = tokenizer
        done = quick_command(*arguments("miar_brats", kind, out, **settings), folder=out)
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(out / ("model.pt" if kind == "train" else "tokenizer.pt"), weights_only=True))
    first, second, other = weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
