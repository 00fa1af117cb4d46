"""A bundle for another organ: one source file, documents and weights are all that it needs."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
from helpers.bundle_runs import BUNDLES, NETWORK, TOKENIZER, quick_command
from helpers.phantoms import head, write_nifti_phantom
from monai.bundle import ConfigWorkflow
from monai.bundle.scripts import verify_metadata

from miar_monai import super_resolve
from miar_monai.cli.build_bundles import build_zip, render
from miar_monai.inference.bundle import find_bundle, models

SCALING = {"_target_": "miar_monai.transforms.ScaleIntensityRobustd", "keys": "image"}
CONTRAST = {"_target_": "RandAdjustContrastd", "keys": "image", "prob": 0.5, "gamma": [0.8, 1.2]}
SOURCE: dict[str, dict[str, Any]] = {
    "base": {"intensity_transforms": [SCALING]},
    "tokenizer_sizes": {"tokenizer_sizes": TOKENIZER},
    "network": "miar",
    "miar": {f"network_def#{key}": value for key, value in NETWORK.items() if key not in TOKENIZER},
    "data": {
        "num_slices": 2,
        "datalist": {
            "_target_": "miar_monai.data.datasets.subject_datalist",
            "dataset_dir": "@dataset_dir",
            "contrasts": {"pd": ["{subject}_pd"]},
        },
    },
    "training": {
        "val_num_slices": 2,
        "num_workers": 0,
        "max_epochs": 1,
        "epoch_length": 2,
        "perceptual_weight": 0,
        "train#intensity_augmentation": [CONTRAST],
    },
    "train_stage1": {"discriminator_def#channels": 8, "adversarial_start_epoch": 1},
    "evaluate": {"metrics": ["PSNR", "SSIM"]},
    "metadata": {
        "changelog": {"0.1.0": "first version"},
        "name": "Knee MRI axial slice super-resolution (MIAR)",
        "task": "Fourfold in-plane super-resolution of knee MRI",
        "description": "Super-resolves axial slices of knee MRI four times in-plane.",
        "data_source": "phantoms",
        "data_type": "nibabel",
        "image_classes": "one axial slice of a volume, scaled by the robust range of the volume",
        "pred_classes": "estimate of the slice at four times the in-plane resolution, scaled as the image",
        "eval_metrics": {"psnr_db": 20.0},
        "intended_use": "Tests only.",
        "training_range": {"in_plane_spacing_mm": [1.0, 1.0], "minimum": [0.0, 0.0], "maximum": [1.0, 1.5]},
        "references": [],
    },
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Write a bundle for knee MRI, without weights, and return its folder."""
    shutil.copytree(BUNDLES / "common", tmp_path / "bundles" / "common")
    folder = tmp_path / "bundles" / "miar_knee"
    (folder / "docs").mkdir(parents=True)
    (folder / "docs" / "README.md").write_text("# Model Overview\n")
    (folder / "source.json").write_text(json.dumps(SOURCE))
    render(str(folder.parent))
    return folder


def run(bundle: Path, workflow: str, *words: object, **settings: object) -> None:
    """Run a workflow of the bundle as its documents say, and check that it succeeds."""
    log = bundle.parent.parent / "log"
    log.mkdir(exist_ok=True)
    given = {"config_file": bundle / "configs" / f"{workflow}.json", "bundle_root": bundle, "device": "cpu", **settings}
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    done = quick_command("run", *map(str, words), *options, folder=log)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_bundle_is_a_source_file_documents_and_weights(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for i in range(4):
        write_nifti_phantom(data / f"knee{i}" / f"knee{i}_pd.nii.gz", (40, 36, 6), seed=i)
    run(bundle, "train_stage1", "training", dataset_dir=data, output_dir=out)
    run(bundle, "train", "training", dataset_dir=data, output_dir=out)
    (bundle / "models").mkdir()
    shutil.copy(out / "model.pt", bundle / "models")

    run(bundle, "evaluate", dataset_dir=data, output_dir=out)
    assert "| MIAR |" in (out / "metrics.md").read_text()
    scan = write_nifti_phantom(tmp_path / "scan.nii.gz", (20, 17, 3))
    run(bundle, "inference", dataset_dir=scan, output_dir=out)
    assert nib.load(out / "scan_sr.nii.gz").shape == (80, 68, 3)

    monkeypatch.setenv("MIAR_BUNDLES", str(bundle.parent))
    assert "knee" in models()
    assert find_bundle("knee") == bundle
    assert super_resolve(head((9, 7, 1)), model="knee", device="cpu").shape == (36, 28, 1)

    schema = shutil.copy(Path(__file__).parent / "meta_schema_20240725.json", tmp_path)
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=schema)
    names = set(zipfile.ZipFile(build_zip(bundle, tmp_path / "dist")).namelist())
    assert {f"miar_knee/{name}" for name in ("LICENSE", "docs/README.md", "models/model.pt")} < names
    assert "miar_knee/source.json" not in names


@pytest.mark.parametrize("workflow", ["train_stage1", "train", "inference"])
def test_its_workflows_have_the_properties_of_a_bundle(bundle: Path, workflow: str, tmp_path: Path) -> None:
    for i in range(3):
        write_nifti_phantom(tmp_path / "data" / f"knee{i}" / f"knee{i}_pd.nii.gz", (20, 20, 3), seed=i)
    built = ConfigWorkflow(
        config_file=str(bundle / "configs" / f"{workflow}.json"),
        workflow_type="train" if workflow.startswith("train") else "infer",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(tmp_path / "data"),
        device="cpu",
    )
    built.parser["initialize"] = []  # the hook for errors is for processes of their own
    built.initialize()
    assert built.check_properties() == []
