"""Runs of the bundles as by a user, with small networks for slices of 256 x 256."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers.tiny import started
from monai.bundle import ConfigParser, ConfigWorkflow

from miar_monai.cli.compose_configs import write_configs
from miar_monai.networks import MSVQVAE, SuperResolutionNetwork
from miar_monai.networks.weights import save_weights

BUNDLES = Path(__file__).parents[2] / "bundles"
NAMES = ("miar_brats", "miar_lidc")
TOKENS = "miar_tokens"
"""A bundle that is not shipped, composed for the tests: that of chest CT with a `MIAR`, the network with tokens."""
EACH_NETWORK = ("miar_brats", TOKENS)
"""A bundle with an `Estimator` and one with a `MIAR`."""
TOKENIZER: dict[str, Any] = {
    "scales": [1, 2, 4, 32],
    "channels": [8, 8, 16],
    "patch_size": 2,
    "num_res_blocks": 1,
    "latent_channels": 8,
    "num_codes": 16,
    "num_codebooks": 2,
}
NETWORK: dict[str, Any] = {
    **TOKENIZER,
    "context_channels": 8,
    "lr_channels": [8, 16],
    "lr_blocks": 1,
    "dim": 16,
    "depth": 1,
    "num_heads": 2,
}
ESTIMATOR: dict[str, Any] = {"channels": [8, 16, 16], "blocks": [1, 1, 1]}
ONE_STEP: dict[str, Any] = {
    "device": "cpu",
    "num_workers": 0,
    "batch_size": 2,
    "max_epochs": 1,
    "epoch_length": 1,
    "num_slices": 2,
    "val_num_slices": 2,
    "perceptual_weight": 0,
}

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["monai.bundle", "miar_monai.training", "miar_monai.evaluation", "miar_monai.inference"])


class Finished(NamedTuple):
    """A finished command."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def sentence(self) -> str:
        """Return the last line of stderr, the message to the user."""
        return self.stderr.strip().splitlines()[-1]


@cache
def bundle_folder(name: str) -> Path:
    """Return the folder of a bundle, shipped or `TOKENS`."""
    if name != TOKENS:
        return BUNDLES / name
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    shutil.copytree(BUNDLES / "common", root / "common")
    source = json.loads((BUNDLES / "miar_lidc" / "source.json").read_text())
    error_model = {**source["inference"]["inferer#error_model"], "entropy": 3.2}  # only tokens have an entropy
    source["inference"]["inferer#error_model"] = error_model
    for image, side in (("inputs#image", 64), ("outputs#pred", 256)):  # a MIAR takes tiles of one size
        source["metadata"][f"network_data_format#{image}#spatial_shape"] = [side, side]
        source["metadata"][f"network_data_format#{image}#is_patch_data"] = True
    (root / TOKENS).mkdir()
    (root / TOKENS / "source.json").write_text(json.dumps({**source, "network": "miar"}))
    write_configs(root / TOKENS)
    return root / TOKENS


def config(name: str, workflow: str) -> str:
    return str(bundle_folder(name) / "configs" / f"{workflow}.json")


def tiny(workflow: str, name: str = "miar_brats") -> dict[str, Any]:
    """Return the settings of a workflow of a bundle with tiny networks and one training step."""
    sizes = {"tokenizer_sizes": TOKENIZER}
    miar = {f"network_def#{key}": NETWORK[key] for key in NETWORK.keys() - TOKENIZER}
    estimator = {f"network_def#{key}": value for key, value in ESTIMATOR.items()}
    networks = estimator if has_estimator(name) else {**sizes, **miar}
    return {
        "inference": {"device": "cpu", **networks},
        "evaluate": {"device": "cpu", "num_slices": 2, "metrics": ["PSNR", "SSIM"], **networks},
        "train": {**ONE_STEP, **sizes, **miar},
        "train_stage1": {**ONE_STEP, "discriminator_def#channels": 8, "adversarial_start_epoch": 1, **sizes},
        "train_estimator": {**ONE_STEP, "side": 64, "cuda_graphs": False, **estimator},
    }[workflow]


def tiny_paper(workflow: str) -> dict[str, Any]:
    """Return the settings of a workflow with its ``paper_<workflow>.json``: one codebook, otherwise as `tiny`."""
    sizes = {"tokenizer_sizes": {**TOKENIZER, "num_codebooks": 1}}
    transformer = {f"network_def#{key}": NETWORK[key] for key in ("dim", "depth", "num_heads")}
    return {
        "evaluate": {"device": "cpu", "num_slices": 2, "metrics": ["PSNR", "SSIM"], **sizes, **transformer},
        "train": {**ONE_STEP, **sizes, **transformer},
        "train_stage1": {**ONE_STEP, "discriminator_def#channels": 8, "adversarial_start_epoch": 1, **sizes},
    }[workflow]


def has_estimator(name: str) -> bool:
    """Return whether the network of a shipped bundle is an `Estimator`, not a `MIAR`."""
    network_def: dict[str, Any] = json.loads(Path(config(name, "inference")).read_text())["network_def"]
    return str(network_def["_target_"]).endswith("Estimator")


def parsed(name: str, kind: str, key: str, **settings: Any) -> Any:
    """Return the parsed content of an id in a tiny workflow of a bundle."""
    parser = ConfigParser()
    parser.read_config(config(name, kind))
    for setting, value in {**tiny(kind, name), **settings}.items():
        parser[setting] = value
    torch.manual_seed(0)
    return parser.get_parsed_content(key)


def network(name: str, **settings: Any) -> SuperResolutionNetwork:
    """Return the tiny network of a bundle with random weights."""
    return started(parsed(name, "inference", "network_def", **settings)).eval()


def tokenizer(name: str = "miar_brats") -> MSVQVAE:
    """Return the tiny tokenizer of a bundle with random weights."""
    return started(parsed(name, "train_stage1", "tokenizer_def")).eval()


def tiny_checkpoint(folder: Path, name: str = "miar_brats", **settings: Any) -> Path:
    """Write random weights for the tiny network."""
    save_weights(network(name, **settings), folder / "tiny.pt", half=False)
    return folder / "tiny.pt"


def tiny_tokenizer_file(folder: Path, name: str = "miar_brats") -> Path:
    """Write random weights for the tiny tokenizer, with a codebook initialized from random slices."""
    network = tokenizer(name)
    network.quantizer.initialize_codebook(network.encoder(torch.rand(2, 1, 256, 256)))
    save_weights(network, folder / "tokenizer.pt")
    return folder / "tokenizer.pt"


def arguments(name: str, workflow: str, folder: Path, **settings: Any) -> list[str]:
    """Return the arguments of ``python -m monai.bundle`` for a tiny workflow, with its settings in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / f"tiny_{workflow}.json"
    settings_file.write_text(json.dumps(tiny(workflow, name)))
    files = settings.pop("config_file", config(name, workflow))
    given = {"config_file": files, "args_file": settings_file, "bundle_root": bundle_folder(name), **settings}
    return ["run", *(part for key, value in given.items() for part in (f"--{key}", str(value)))]


def command(*parts: str, module: str = "monai.bundle", timeout: float = 200) -> Finished:
    """Run ``python -m monai.bundle ...`` and return its result."""
    line = [sys.executable, "-m", module, *parts]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", timeout=timeout)
    return Finished(done.returncode, done.stdout, done.stderr)


def start(parts: list[str], folder: Path) -> Any:
    """Start the same command in a forked process with its imports done; its output goes to files in ``folder``."""
    process = _SERVER.Process(target=_main, args=(parts, folder))
    process.start()
    return process


def quick_command(*parts: str, folder: Path, timeout: float = 120) -> Finished:
    """Run the same as `command` without the time for imports."""
    process = start(list(parts), folder)
    process.join(timeout)
    assert process.exitcode is not None, "the command did not finish"
    return Finished(process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def _main(parts: list[str], folder: Path) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a new process
    sys.argv = ["monai.bundle", *parts]
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.exit(1)


def workflow(name: str, kind: str, **settings: Any) -> ConfigWorkflow:
    """Return an initialized tiny workflow in this process."""
    given = {"bundle_root": str(bundle_folder(name)), **tiny(kind, name), **settings}
    built = ConfigWorkflow(
        config_file=config(name, kind),
        workflow_type="train" if kind.startswith("train") else "infer",
        logging_file=False,
        **given,
    )
    hook = sys.excepthook
    built.initialize()
    sys.excepthook = hook  # the hook of the bundles is for separate processes
    return built
