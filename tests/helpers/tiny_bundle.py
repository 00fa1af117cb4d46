"""The bundles with small networks and random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from helpers.bundle_runs import ESTIMATOR, NETWORK, bundle_folder, config, has_estimator, tiny, tiny_checkpoint
from helpers.phantoms import write_brats_folder, write_nifti_phantom


def write_tiny_bundle(folder: Path, name: str = "miar_brats") -> Path:
    """Write a bundle to ``folder``: the configs of a bundle with a tiny network and random weights."""
    shutil.copytree(bundle_folder(name) / "configs", folder / "configs")
    for workflow in ("inference", "evaluate"):
        path = folder / "configs" / f"{workflow}.json"
        content = json.loads(path.read_text())
        content["network_def"].update(ESTIMATOR if has_estimator(name) else NETWORK)
        path.write_text(json.dumps(content))
    path = folder / "configs" / "metadata.json"
    content = json.loads(path.read_text())
    del content["weights_sha256"]  # of the shipped weights
    path.write_text(json.dumps(content))
    (folder / "models").mkdir()
    tiny_checkpoint(folder / "models", name).rename(folder / "models" / "model.pt")
    return folder


def write_bundle_with_data(tmp_path: Path, name: str = "miar_brats") -> Path:
    """Write a bundle for the benchmarks, ``miar_tiny``, and beside it ``data`` of its kind and a ``split.json``."""
    folder = tmp_path / "miar_tiny"
    (folder / "configs").mkdir(parents=True)
    for workflow in ("evaluate", "train", "train_estimator"):
        content = json.loads(Path(config(name, workflow)).read_text())
        for key, value in tiny(workflow, name).items():
            setting, _, entry = key.partition("#")
            if entry:
                content[setting][entry] = value
            elif setting in content:
                content[setting] = value
        (folder / "configs" / f"{workflow}.json").write_text(json.dumps(content))
    (folder / "models").mkdir()
    tiny_checkpoint(tmp_path, name).rename(folder / "models" / "model.pt")
    if name == "miar_brats":
        write_brats_folder(tmp_path / "data", 4, (40, 36, 6))
        patients = [f"BraTS_{i:05d}" for i in range(4)]
    else:
        patients = [f"case{i}" for i in range(4)]
        for i, patient in enumerate(patients):
            write_nifti_phantom(tmp_path / "data" / f"{patient}.nii.gz", (40, 36, 6), seed=i, low=-1000, high=400)
    split = {"training": patients[:1], "validation": patients[1:2], "test": patients[2:]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    return folder
