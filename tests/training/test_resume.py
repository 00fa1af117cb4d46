from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bundle_runs import Finished, arguments, quick_command, start, tiny_tokenizer_file
from helpers.phantoms import write_brats_folder

SETTINGS = {"max_epochs": 4, "epoch_length": 3, "checkpoint_interval": 1, "val_interval": 2, "num_workers": 1}


def wait_for(file: Path, process: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < end, f"{file} did not come"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage", "result"), [("train_stage1", 1, "tokenizer.pt"), ("train", 2, "model.pt")])
def test_a_killed_run_continues_where_it_stopped(kind: str, stage: int, result: str, tmp_path: Path) -> None:
    data = write_brats_folder(tmp_path / "data", 6, (40, 36, 6), contrasts=("t2",))
    settings = {**SETTINGS, "dataset_dir": data}
    if stage == 2:
        settings["tokenizer_path"] = tiny_tokenizer_file(tmp_path)

    def parts(folder: Path, **more: Any) -> list[str]:
        return arguments("miar_brats", kind, folder, output_dir=folder, **settings, **more)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = quick_command(*parts(whole), folder=whole)
    assert done.returncode == 0, done.stderr

    process = start(parts(cut), cut)
    wait_for(cut / f"stage{stage}" / "checkpoint_1.pt", process)
    process.kill()  # SIGKILL, somewhere in the second epoch
    process.join()
    assert not (cut / result).exists()

    refused = quick_command(*parts(cut), folder=cut)
    assert refused.returncode == 1
    assert "add --resume True to continue it" in refused.sentence
    resumed = quick_command(*parts(cut, resume=True), folder=cut)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after epoch" in resumed.stdout
    expected, found = (torch.load(folder / result, weights_only=True) for folder in (whole, cut))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_settings_given_by_name_reach_the_run(tmp_path: Path) -> None:
    data = write_brats_folder(tmp_path / "data", 4, (40, 36, 6), contrasts=("t2",))
    settings = {"max_epochs": 2, "batch_size": 1, "lr": 3e-3, "epoch_length": 2, "log_interval": 1, "seed": 3}
    done: Finished = quick_command(
        *arguments("miar_brats", "train_stage1", tmp_path, dataset_dir=data, output_dir=tmp_path / "out", **settings),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2, iteration 4: " in done.stdout
    checkpoint = torch.load(tmp_path / "out" / "stage1" / "checkpoint_2.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 4
    assert checkpoint["lr_scheduler"]["base_lrs"] == [3e-3]
    assert json.loads((tmp_path / "tiny_train_stage1.json").read_text())["batch_size"] == 2  # the name came second
