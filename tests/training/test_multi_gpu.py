from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.bundle_runs import TOKENS, arguments, command, config, tiny_checkpoint
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from ignite.handlers import ProgressBar
from monai.bundle import ConfigParser
from monai.handlers import LrScheduleHandler, StatsHandler, ValidationHandler
from torch import nn

from miar_monai.training import EpochSeed

PARALLEL = ("--standalone", "--nnodes=1", "--nproc_per_node=2", "-m", "monai.bundle")
STAGES = {"train_stage1": ("tokenizer.pt", "stage1"), "train": ("model.pt", "stage2")}


@pytest.mark.slow
def test_two_processes_train_both_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    data, out = write_brats_folder(tmp_path / "data", 6, (40, 36, 6), contrasts=("t2",)), tmp_path / "out"
    for kind, (result, stage) in STAGES.items():
        files = [config("miar_brats", kind), config("miar_brats", f"multi_gpu_{kind}")]
        parts = arguments(
            "miar_brats", kind, tmp_path, config_file=files, dataset_dir=data, output_dir=out, epoch_length=2
        )
        done = command(*PARALLEL, *parts, module="torch.distributed.run")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1/1, iteration 2: ") == 1  # from the first process
        assert done.stdout.count("Epoch[1] Metrics") == 1
        assert not any(name.startswith("module.") for name in torch.load(out / result, weights_only=True))
        assert len(list((out / stage).glob("events.out.tfevents.*"))) == 1
        assert [path.name for path in (out / stage).glob("*.pt")] == ["checkpoint_1.pt"]


@pytest.mark.slow
def test_two_processes_train_the_estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    data, out = write_brats_folder(tmp_path / "data", 6, (40, 36, 6), contrasts=("t2",)), tmp_path / "out"
    files = [config("miar_brats", "train_estimator"), config("miar_brats", "multi_gpu_train")]
    parts = arguments(
        "miar_brats", "train_estimator", tmp_path, config_file=files, dataset_dir=data, output_dir=out, epoch_length=2
    )
    done = command(*PARALLEL, *parts, module="torch.distributed.run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1, iteration 2: ") == 1
    assert not any(name.startswith("module.") for name in torch.load(out / "model.pt", weights_only=True))
    assert "find_unused_parameters" not in done.stderr  # each step uses all parameters


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", STAGES)
def test_the_first_process_reports_and_saves(
    kind: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    parser = ConfigParser()
    parser.read_config([config("miar_brats", kind), config("miar_brats", f"multi_gpu_{kind}")])
    parser["train#handlers"] = [EpochSeed(0), LrScheduleHandler(None), ValidationHandler(1), ProgressBar()]
    parser["validate#handlers"] = [StatsHandler()]
    parser["weights_file"], parser["ema"] = str(tmp_path / "model.pt"), SimpleNamespace(ema_model=nn.Linear(1, 1))
    parser.parse()
    attached = [type(handler) for handler in parser.get_parsed_content("train#trainer#train_handlers")]
    # stage 1 validates in the first process; stage 2 in all, each with its share, as MONAI's metrics gather
    everywhere = [EpochSeed, LrScheduleHandler] + ([ValidationHandler] if kind == "train" else [])
    assert attached == ([EpochSeed, LrScheduleHandler, ValidationHandler, ProgressBar] if rank == 0 else everywhere)
    if kind == "train":
        assert len(parser.get_parsed_content("validate#evaluator#val_handlers")) == (rank == 0)
    parser.get_parsed_content("save")
    assert (tmp_path / "model.pt").is_file() == (rank == 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("miar_brats", 3), (TOKENS, 1)])
def test_two_processes_infer_each_volume_once(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for i in range(count):
        write_nifti_phantom(tmp_path / "in" / f"{i}.nii.gz", (19, 13, 2), seed=i)
    files = [config(name, "inference"), config(name, "multi_gpu_inference")]
    parts = arguments(
        name, "inference", tmp_path, config_file=files, dataset_dir=tmp_path / "in", output_dir=tmp_path / "out",
        checkpoint=tiny_checkpoint(tmp_path, name),
    )  # fmt: skip
    done = command(*PARALLEL, *parts, module="torch.distributed.run")  # overwriting is an error
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{i}_sr.nii.gz" for i in range(count)]
