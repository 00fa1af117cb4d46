"""Memory of ``miar sr`` for a large CT, against its forecast, and the refusal of a result that does not fit.

    python -m benchmarks.large_volume --source chest.nii.gz [--slices 600] [--model bundles/miar_lidc] \
        [--channels 4,8] [--output_dir bench_output] \
        --runs "['--factor 4,4,1', '--factor 1,1,1.5 -o thin.nrrd --preview', '--factor 8,8,1']"

The CT is a scan whose slices are repeated, there and back, in a 16-bit NIfTI file without compression. Each run is a
process ``miar sr`` with some options, whose peak of resident memory is read from the kernel, so Linux is needed.
Memory hardly depends on the network, but time does: ``--channels`` replaces that of the bundle by an `Estimator` with
fewer channels and random weights. Writes ``large_volume.csv`` and ``large_volume.md``.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import fire
import numpy as np
import torch

from benchmarks.common import Row, commit, machine, publish, result_files, rows_table, write_csv
from benchmarks.measuring import peak_bytes
from miar_monai.data.io import read_volume, write_nifti
from miar_monai.errors import ConfigurationError, report_errors_in_one_sentence
from miar_monai.networks import Estimator
from miar_monai.networks.weights import save_weights

GIB = 2**30
RUNS = ("--factor 4,4,1", "--factor 1,1,1.5", "--factor 8,8,1")
_FEW = 8  # slices of the volume whose peak is that of the libraries and the network
_INTERVAL = 0.1  # seconds between two looks at the memory of a process


class Outcome(NamedTuple):
    """What is known of a process that has ended."""

    status: int
    errors: str
    """Its output to stderr."""
    seconds: float
    peak: int
    """Bytes of its memory."""


def write_ct(source: str, path: Path, slices: int) -> None:
    """Write a scan whose slices are repeated, there and back, as 16-bit integers."""
    scan = read_volume(source)
    last = scan.array.shape[2] - 1
    there_and_back = last - abs(np.arange(slices) % max(2 * last, 1) - last)
    write_nifti(path, scan.array[..., there_and_back], scan.affine, np.int16)


def write_bundle(bundle: str, folder: Path, channels: Sequence[int]) -> Path:
    """Write a bundle whose `Estimator` has other channels, one block each, and random weights."""
    shutil.copytree(Path(bundle, "configs"), folder / "configs")
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: config[name] for name in ("guide_channels", "noise_channels")}  # so that options work as with its own
    size = {"channels": [*channels], "blocks": [1] * len(channels), **kept}
    config["network_def"] |= size
    path.write_text(json.dumps(config), encoding="utf-8")
    path = folder / "configs" / "metadata.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    del about["weights_sha256"]  # of the weights of the bundle
    path.write_text(json.dumps(about), encoding="utf-8")
    (folder / "models").mkdir()
    torch.manual_seed(0)
    save_weights(Estimator(**size), folder / "models" / "model.pt")
    return folder


def run(command: Sequence[str], folder: Path) -> Outcome:
    """Run a program in a folder.

    Raises:
        ConfigurationError: if its peak is not known, as elsewhere than on Linux.
    """
    if not Path("/proc/self/status").exists():
        raise ConfigurationError("the memory of a process is read from /proc, which is missing: use Linux.")
    peak, start = 0, time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(_INTERVAL)
        errors.seek(0)
        return Outcome(process.returncode, errors.read().strip(), time.perf_counter() - start, peak)


def measure(options: str, model: Path, folder: Path) -> Row:
    """Run ``miar sr`` on the large volume, and on its first slices, and return a row of the table.

    The row of a refused result has what was printed instead.
    """
    command = [sys.executable, "-m", "miar_monai", "sr", "--model", str(model), "--quiet", "--overwrite"]
    command += ["--report", "report.json", *shlex.split(options)]
    large = run([*command, "ct.nii"], folder)
    if large.status:
        peak = large.peak / GIB
        return {"options": options, "peak (GiB)": peak, "seconds": large.seconds, "stderr": large.errors}
    case = json.loads((folder / "report.json").read_text(encoding="utf-8"))["cases"][0]
    few = run([*command, "few.nii"], folder)
    before, after = (prod(case[name]["shape"]) * 4 / GIB for name in ("before", "after"))
    forecast = case["memory_needed_bytes"] / GIB
    own = (large.peak - few.peak) / GIB
    return {
        "options": options,
        "result": " x ".join(map(str, case["after"]["shape"])),
        "input, float32 (GiB)": before,
        "result, float32 (GiB)": after,
        "forecast (GiB)": forecast,
        "peak (GiB)": large.peak / GIB,
        f"peak for {_FEW} slices (GiB)": few.peak / GIB,
        "difference / forecast": own / forecast,
        "peak / result": large.peak / GIB / after,
        "seconds": large.seconds,
    }


def main(
    source: str,
    slices: int = 600,
    model: str = "bundles/miar_lidc",
    channels: Sequence[int] | None = None,
    runs: Sequence[str] = RUNS,
    output_dir: str = "bench_output",
    overwrite: bool = False,
) -> None:
    """Measure and write the tables.

    Args:
        source: a CT scan, of which the large volume is made.
        slices: number of its slices.
        model: folder of a bundle with an `Estimator`.
        channels: of a smaller network with random weights; the bundle's network by default.
        runs: options of ``miar sr``, a text for each run.
        output_dir: folder of ``large_volume.csv`` and ``large_volume.md``.
        overwrite: replace existing files.
    """
    csv_file, text_file = result_files(output_dir, ("large_volume.csv", "large_volume.md"), overwrite)
    rows, refused = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_ct(source, folder / "ct.nii", slices)
        write_ct(source, folder / "few.nii", _FEW)
        bundle = Path(model).resolve() if channels is None else write_bundle(model, folder / "bundle", channels)
        for options in runs:
            row = measure(options, bundle, folder)
            (refused if "stderr" in row else rows).append(row)
    network = "the network of the bundle" if channels is None else f"an untrained network of channels {channels}"
    text = "\n".join([
        "# A large volume, from file to file", "",
        f"Commit {commit()}, {machine(torch.device('cpu'))}, torch {torch.__version__}, {network}.", "",
        *([rows_table(rows), ""] if rows else []),
        *(["## Refused", "", rows_table(refused), ""] if refused else []),
    ])  # fmt: skip
    write_csv([*rows, *refused], csv_file, overwrite)
    publish(text, text_file, overwrite)


if __name__ == "__main__":
    report_errors_in_one_sentence()
    fire.Fire(main)
