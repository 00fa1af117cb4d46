"""The shipped bundles with small networks and random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from helpers.bundle_runs import BUNDLES, ESTIMATOR, NETWORK, has_estimator, tiny_checkpoint


def write_tiny_bundle(folder: Path, name: str = "miar_brats") -> Path:
    """Write a bundle to ``folder``: the configs of a shipped bundle with a tiny network and random weights."""
    shutil.copytree(BUNDLES / name / "configs", folder / "configs")
    for config in ("inference", "evaluate"):
        path = folder / "configs" / f"{config}.json"
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
