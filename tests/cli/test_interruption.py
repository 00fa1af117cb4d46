"""Ctrl-C and kill -9 while results are written: they are complete or absent, and the next run continues."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.phantoms import write_dicom_series, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle

from miar_monai.cli.main import main
from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import write_series
from miar_monai.data.io import read_volume, write_volume
from miar_monai.data.volume import Volume

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["miar_monai.cli.main", "miar_monai.inference.resolver", "monai.bundle"])
NUM_CASES = 2


def _miar(parts: list[str]) -> None:
    """Run the command in a forked process, with its messages in the file ``stderr``."""
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let their background jobs ignore it
    sys.exit(main(parts))


def start(parts: list[str]) -> Any:
    process = SERVER.Process(target=_miar, args=(parts,))
    process.start()
    return process


def is_writing(output: Path) -> bool:
    """Return whether a temporary file in a folder has content."""
    try:
        return any(path.stat().st_size for path in output.glob(".miar-*/*"))
    except FileNotFoundError:  # finished in this moment
        return False


def has_begun(output: Path) -> bool:
    """Return whether the folder of a temporary file exists."""
    return any(output.glob(".miar-*"))


def wait_until_writing(process: Any, output: Path, is_writing: Callable[[Path], bool] = is_writing) -> None:
    while not is_writing(output):
        assert process.is_alive(), "the process ended before it wrote anything"
        time.sleep(1e-3)


def results(output: Path) -> list[Path]:
    return [path for path in output.iterdir() if not path.name.startswith(".")]


def check_killed(
    write: Callable[[Path], object], wanted: np.ndarray, is_under_way: Callable[[Path], bool], root: Path, name: str
) -> None:
    """Check that a result is complete or absent, whenever the process that writes it is killed."""
    write(root / "first" / name)  # imports its modules
    begin = time.perf_counter()
    write(root / "whole" / name)
    duration, rng, interrupted = time.perf_counter() - begin, random.Random(0), 0
    for moment in range(20):
        output = root / f"{moment}"
        process = SERVER.Process(target=write, args=(output / name,))
        process.start()
        wait_until_writing(process, output, is_under_way)
        time.sleep(rng.uniform(0, duration))
        interrupted += is_under_way(output)
        process.kill()
        process.join(60)
        for path in results(output):
            np.testing.assert_array_equal(read_volume(path).array, wanted)
        shutil.rmtree(output)
    assert interrupted >= 5


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mgz", ".nrrd", ".mha"])
def test_a_file_is_complete_or_absent_when_its_writer_is_killed(ending: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(128, 128, 64)).astype(np.float32)  # hardly compressible
    volume = Volume(noise, np.eye(4), np.dtype("float32"), Path("noise"))
    is_under_way = has_begun if ending in (".nrrd", ".mha") else is_writing  # ITK compresses before it writes
    check_killed(partial(write_volume, volume=volume), noise, is_under_way, tmp_path, f"a{ending}")


@pytest.mark.slow
def test_a_dicom_series_is_complete_or_absent_when_its_writer_is_killed(tmp_path: Path) -> None:
    volume = read_volume(write_dicom_series(tmp_path / "source", (64, 64, 30)))
    write = partial(write_series, sr=volume, headers=source_headers(volume), derivation="a copy")
    check_killed(write, volume.array, has_begun, tmp_path, "series")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_interrupted_while_it_writes_continues(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle, rng = write_tiny_bundle(tmp_path / "miar_brats"), random.Random(0)
    for i in range(NUM_CASES):
        write_nifti_phantom(tmp_path / "in" / f"{i}.nii.gz", (64, 64, 20), seed=i)
    parts = ["sr", "in", "--model", str(bundle), "--device", "cpu", "--skip-existing"]
    wanted: dict[str, np.ndarray] = {}
    for moment in range(20):
        output = tmp_path / f"out{moment}"
        process = start([*parts, "-o", str(output)])
        wait_until_writing(process, output)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, number)
        process.join(60)
        message = Path("stderr").read_text()
        if number == signal.SIGINT:
            assert process.exitcode == 130, message
            assert message.endswith("\ninterrupted: finished files are kept, and none is half-written.\n")
            assert [path for path in output.iterdir() if path not in results(output)] == []
        else:
            assert process.exitcode == -number
        finished = {path.name: read_volume(path).array for path in results(output)}
        assert len(finished) < NUM_CASES

        process = start([*parts, "-o", str(output)])
        process.join(120)
        message = Path("stderr").read_text()
        assert process.exitcode == 0, message
        assert (f"{len(finished)} of {NUM_CASES} cases had a result already" in message) is bool(finished)
        found = {path.name: read_volume(path).array for path in results(output)}
        wanted = wanted or found
        for arrays in (finished, found):
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, wanted[name])
        assert len(found) == NUM_CASES
