"""The bundles with small networks and random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from helpers.bundle_runs import (
    ESTIMATOR,
    NETWORK,
    bundle_folder,
    config,
    has_estimator,
    tiny,
    tiny_checkpoint,
    tiny_paper,
)
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from helpers.tiny import spread, started

from benchmarks.paper import RUNS, paper_config, paper_tokenizer
from miar_monai.networks import Estimator
from miar_monai.networks.weights import save_weights


def write_tiny_bundle(folder: Path, name: str = "miar_brats", **settings: Any) -> Path:
    """Write a bundle to ``folder``: the configs of a bundle with a tiny network, random weights and other settings."""
    shutil.copytree(bundle_folder(name) / "configs", folder / "configs")
    for workflow in ("inference", "evaluate"):
        path = folder / "configs" / f"{workflow}.json"
        content = json.loads(path.read_text())
        content["network_def"].update(ESTIMATOR if has_estimator(name) else NETWORK)
        content |= settings
        path.write_text(json.dumps(content))
    path = folder / "configs" / "metadata.json"
    content = json.loads(path.read_text())
    del content["weights_sha256"]  # of the shipped weights
    path.write_text(json.dumps(content))
    (folder / "models").mkdir()
    tiny_checkpoint(folder / "models", name, **settings).rename(folder / "models" / "model.pt")
    return folder


def write_sampling_bundle(folder: Path) -> Path:
    """Write a bundle for brain MRI whose tiny network samples and takes a guide."""
    write_tiny_bundle(folder, noise_channels=1)
    torch.manual_seed(0)
    network = started(Estimator(**ESTIMATOR, guide_channels=1, noise_channels=1))
    torch.nn.init.normal_(network.unet.conv_in.weight[:, -4:], std=0.3)
    network.unet.conv_out.weight.data.mul_(0.05)
    save_weights(network, folder / "models" / "model.pt")
    return folder


def write_bundle_with_data(tmp_path: Path, name: str = "miar_brats") -> Path:
    """Write a bundle for the benchmarks, ``miar_tiny``, and beside it ``data`` of its kind and a ``split.json``."""
    folder = tmp_path / "miar_tiny"
    (folder / "configs").mkdir(parents=True)
    sizes = {workflow: tiny(workflow, name) for workflow in ("evaluate", "train", "train_stage1", "train_estimator")}
    sizes |= {f"paper_{workflow}": tiny_paper(workflow) for workflow in ("evaluate", "train", "train_stage1")}
    for file, settings in sizes.items():
        content = json.loads(Path(config(name, file)).read_text())
        for key, value in settings.items():
            setting, _, entry = key.partition("#")
            if setting in content:
                content |= {setting: {**content[setting], entry: value} if entry else value}
        (folder / "configs" / f"{file}.json").write_text(json.dumps(content))
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


def write_paper_runs(bundle: Path, folder: Path) -> Path:
    """Write the runs of the paper's system of a bundle of `write_bundle_with_data`: weights that tokens decide."""
    torch.manual_seed(0)
    tokenizer = started(paper_tokenizer(str(bundle)))
    tokenizer.quantizer.initialize_codebook(tokenizer.encoder(torch.rand(2, 1, 256, 256)))
    for run in RUNS:
        network = paper_config(str(bundle), {}, run=run).get_parsed_content("network_def")
        spread(network.transformer)
        network.load_tokenizer(tokenizer)
        save_weights(network, folder / run / "model.pt", half=False)
        save_weights(tokenizer, folder / run / "tokenizer.pt", half=False)
    return folder
