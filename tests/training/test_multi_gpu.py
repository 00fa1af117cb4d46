from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.bundle_runs import NAMES, arguments, command, config, tiny_checkpoint
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from monai.bundle import ConfigParser

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
        assert done.stdout.count("epoch 1/1, iteration 2: ") == 1  # the first process speaks
        assert done.stdout.count("Epoch[1] Metrics") == 1
        assert not any(name.startswith("module.") for name in torch.load(out / result, weights_only=True))
        assert len(list((out / stage).glob("events.out.tfevents.*"))) == 1
        assert [path.name for path in (out / stage).glob("*.pt")] == ["checkpoint_1.pt"]


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_the_overlay_changes_only_the_intended_keys(name: str, kind: str) -> None:
    alone, overlaid = ConfigParser(), ConfigParser()
    alone.read_config(config(name, kind))
    overlaid.read_config([config(name, kind), config(name, f"multi_gpu_{kind}")])
    assert len(alone["run"]) == len(overlaid["run"])
    changed = [(old, new) for old, new in zip(alone["run"], overlaid["run"], strict=True) if old != new]
    assert len(changed) == 1
    old, new = changed[0]
    assert new == f"$dist.get_rank() == 0 and {old[1:]}"  # weights are saved once
    assert [h["_target_"].split(".")[-1] for h in alone["train"]["handlers"]] == [
        "EpochSeed", "LrScheduleHandler", "ValidationHandler", "LossLogger", "TimeBudget", "ProgressBar",
    ]  # fmt: skip
    # stage 1 validates in the first process; stage 2 in all, each with its share, as MONAI's metrics gather
    kept = {"train_stage1": "[:2]", "train": "[:3]"}[kind]
    assert overlaid["train#trainer#train_handlers"].endswith(kept)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("miar_brats", 3), ("miar_lidc", 1)])
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
    done = command(*PARALLEL, *parts, module="torch.distributed.run")  # none is overwritten, so none is written twice
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{i}_sr.nii.gz" for i in range(count)]
