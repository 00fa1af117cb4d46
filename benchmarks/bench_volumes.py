"""Duration of a volume from file to file, stage by stage, and peak memory, with the process already running.

    python -m benchmarks.bench_volumes [--device cuda:0] [--brain_slices 155] [--thick_slices 31] [--ct_slices 300] \
        [--growth 1,10,100,1000] [--processes 1,2,4] [--output_dir bench_output] [--sw_batch_size 16]

The volumes are made of the demo's brain (nilearn's ICBM152 template): 60 x 60 voxels as MRI, 240 x 240 voxels in
slices of 5 mm, which become slices of 1 mm, and 128 x 128 voxels as CT, with slices repeated and stretched to the field
of view, noise, and 16-bit NIfTI files. Writes ``volumes.csv`` and ``volumes.md``: the seconds of each stage, for these
kinds of volumes and for growing numbers of slices, medians after a warm-up; and the volumes per hour of one or more
processes of ``miar sr`` under ``torchrun`` on the same devices. Other options, such as ``--sw_batch_size``, are
settings of inference.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import ensure_tuple

from benchmarks.common import Row, commit, machine, publish, result_files, rows_table, write_csv
from benchmarks.measuring import PeakMemory
from miar_monai.cli.demo import template
from miar_monai.data.cases import find_cases
from miar_monai.data.io import read_volume, write_nifti, write_volume
from miar_monai.degradation import Degradation
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.inference.devices import choose_device
from miar_monai.inference.report import case_report
from miar_monai.inference.resolver import SuperResolver
from miar_monai.transforms import CentralSlices, LoadVolume, ScaleIntensityRobust

MIB = 2**20


class Kind(NamedTuple):
    """A kind of volume: bundle, LR voxels along both axes of a slice, range and noise in its units, and factors."""

    bundle: str
    side: int
    low: float
    high: float
    noise: float
    factor: tuple[int, int, int] = (4, 4, 1)


BRAIN = Kind("bundles/miar_brats", 60, 0, 1000, 5)
THICK = Kind("bundles/miar_brats", 240, 0, 1000, 5, (1, 1, 5))
CT = Kind("bundles/miar_lidc", 128, -1000, 1000, 10)


class Stopwatch:
    """Adds up the seconds of each stage in ``seconds``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        """Time a block."""
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def of(self, stage: str, function: Callable) -> Callable:
        """Return a function whose calls are timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(stage):
                return function(*args, **kwargs)

        return timed


def write_lr(path: Path, kind: Kind, slices: int) -> Path:
    """Write a low-resolution volume of a kind."""
    brain = ScaleIntensityRobust()(CentralSlices(150)(LoadVolume()(str(template())))).as_tensor()
    in_plane, _, between = kind.factor  # one of them is 1
    side = in_plane * kind.side
    hr = F.interpolate(brain.movedim(-1, 0), (side, side), mode="bilinear").movedim(0, -1)  # (1, side, side, 150)
    if between > 1:
        thick = Degradation((1, between), 0, profile=("bicubic", "gaussian"))
        lr = thick(hr.movedim(1, 0)).movedim(0, 1)[0].numpy()
    else:
        lr = Degradation(in_plane)(hr.movedim(-1, 0)).movedim(0, -1)[0].numpy()
    lr = np.take(lr, np.arange(slices) % lr.shape[-1], axis=-1)
    noise = kind.noise * np.random.default_rng(0).standard_normal(lr.shape)
    affine = np.diag([240 / kind.side, 240 / kind.side, between, 1])
    return write_nifti(path, kind.low + (kind.high - kind.low) * lr + noise, affine, np.int16)


def from_file_to_file(resolver: SuperResolver, source: Path, target: Path) -> dict[str, float]:
    """Super-resolve a volume as ``miar sr`` does and return the seconds of each stage."""
    watch = Stopwatch()
    with watch("read"):
        volume = read_volume(source)
    stages = {
        "preprocessing": "preprocess",
        "plan": "blur",
        "infer": "network",
        "postprocessing": "postprocess",
    }
    plain = {name: getattr(resolver, name) for name in stages}
    for name, stage in stages.items():
        setattr(resolver, name, watch.of(stage, plain[name]))
    prepared = resolver.prepare(volume)
    result = resolver.volume(volume, prepared)
    for name in stages:
        setattr(resolver, name, plain[name])
    with watch("write"):
        write_volume(target, result, overwrite=True)
    with watch("report"):
        case_report(str(source), target, volume, result, prepared.plan, 0.0, resolver.device, limits=prepared.limits)
    return dict(watch.seconds)


def measure(resolver: SuperResolver, name: str, kind: Kind, slices: int, repeats: int, folder: Path) -> Row:
    """Measure a volume; the first run is a warm-up."""
    source, target, runs = write_lr(folder / "lr.nii.gz", kind, slices), folder / "sr.nii.gz", []
    for repeat in range(repeats + 1):
        with PeakMemory(torch.device("cpu")) as host, PeakMemory(resolver.device) as peak:
            seconds = from_file_to_file(resolver, source, target)
        if repeat:
            runs.append(seconds)
    stages = {f"{stage} (s)": statistics.median(run[stage] for run in runs) for stage in runs[0]}
    size = slices * kind.side**2 * math.prod(kind.factor)
    memory = {"peak of the GPU (MiB)": peak.mib} if resolver.device.type == "cuda" else {}
    row = {
        "volume": f"{name} {kind.side} x {kind.side} x {slices}, factor {' x '.join(map(str, kind.factor))}",
        "whole (s)": statistics.median(sum(run.values()) for run in runs), **stages,
        **memory, "peak of the process (MiB)": host.mib, "result, float32 (MiB)": 4 * size / MIB,
        "file in (MiB)": source.stat().st_size / MIB, "file out (MiB)": target.stat().st_size / MIB,
    }  # fmt: skip
    source.unlink()
    target.unlink()
    return row


def plan(row: Row, volumes: int = 100_000) -> Row:
    """Extrapolate from a measured volume to many, processed one after the other."""
    stages = {name.removesuffix(" (s)"): value for name, value in row.items() if name.endswith(" (s)")}
    whole = stages.pop("whole")
    slowest = max(stages, key=lambda stage: stages[stage])
    return {
        "volume": row["volume"], "hours of one process": whole * volumes / 3600, "slowest stage": slowest,
        "its share (%)": 100 * stages[slowest] / whole,
        "files in (TB)": row["file in (MiB)"] * MIB * volumes / 1e12,
        "files out (TB)": row["file out (MiB)"] * MIB * volumes / 1e12,
    }  # fmt: skip


def measure_listing(volumes: int) -> Row:
    """Measure how long it takes to list a folder with many volumes."""
    with tempfile.TemporaryDirectory() as name:
        for i in range(volumes):
            Path(name, f"{i}.nii.gz").touch()
        start = time.perf_counter()
        count = len(find_cases(name))
    return {"volumes": count, "s to find them": time.perf_counter() - start}


def measure_processes(processes: int, volumes: int, slices: int, device: str) -> Row:
    """Measure ``miar sr`` on a folder of brain volumes under torchrun, including its start."""
    with tempfile.TemporaryDirectory() as name:
        source = write_lr(Path(name, "in", "0.nii.gz"), BRAIN, slices)
        for i in range(1, volumes):
            source.with_name(f"{i}.nii.gz").write_bytes(source.read_bytes())
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [
            "-m",
            "miar_monai",
            "sr",
            f"{name}/in",
            "-o",
            f"{name}/out",
            "--quiet",
            "--model",
            BRAIN.bundle,
        ]
        threads = {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // processes, 1))}
        start = time.perf_counter()
        subprocess.run([sys.executable, *launcher, *command, "--device", device], check=True, env=os.environ | threads)
        seconds = time.perf_counter() - start
        assert len(list(Path(name, "out").iterdir())) == volumes
    return {
        "processes": processes, "volumes": volumes, "slices": slices, "s, with the start": seconds,
        "volumes an hour": 3600 * volumes / seconds,
    }  # fmt: skip


def main(
    device: str = "auto",
    brain_slices: int = 155,
    thick_slices: int = 31,
    ct_slices: int = 300,
    growth: int | Sequence[int] = (1, 10, 100, 1000),
    processes: int | Sequence[int] = (),
    volumes: int = 16,
    listed: int = 100_000,
    repeats: int = 3,
    output_dir: str = "bench_output",
    overwrite: bool = False,
    **settings: Any,
) -> None:
    """Measure and write the tables.

    Args:
        device: auto, cpu, cuda, cuda:<index> or mps.
        brain_slices: number of slices of the MRI volume; 0 to skip it.
        thick_slices: number of slices of the MRI volume with slices of 5 mm; 0 to skip it.
        ct_slices: number of slices of the CT volume; 0 to skip it.
        growth: numbers of slices of further MRI volumes; may be empty.
        processes: numbers of processes of ``miar sr`` that share a folder of volumes; may be empty.
        volumes: number of volumes in that folder, of ``brain_slices`` slices each.
        listed: number of files in the folder that is listed.
        repeats: repetitions for each volume, after a warm-up.
        output_dir: folder of ``volumes.csv`` and ``volumes.md``.
        overwrite: replace existing files.
        **settings: settings of inference, such as ``sw_batch_size`` and ``lookahead_tokens``.
    """
    csv_file, text_file = result_files(output_dir, ("volumes.csv", "volumes.md"), overwrite)
    chosen, rows = choose_device(device), []
    with tempfile.TemporaryDirectory() as name:
        for title, kind, counts in (
            ("brain MRI", BRAIN, [brain_slices]), ("brain MRI", THICK, [thick_slices]),
            ("chest CT", CT, [ct_slices]), ("brain MRI", BRAIN, growth),
        ):  # fmt: skip
            if counts := [count for count in ensure_tuple(counts) if count]:
                resolver = SuperResolver(kind.bundle, str(chosen), factor=kind.factor, **settings)
                rows += [measure(resolver, title, kind, count, repeats, Path(name)) for count in counts]
    shared = [measure_processes(n, volumes, brain_slices, device) for n in ensure_tuple(processes)]
    listing = measure_listing(listed)
    given = ", ".join(f"{name} {value}" for name, value in settings.items()) or "settings of the bundles"
    text = "\n".join([
        "# Volumes, from file to file", "",
        f"Commit {commit()}, {machine(chosen)}, torch {torch.__version__}, {given}.", "",
        "## Stages", "", rows_table(rows), "",
        "## 100,000 such volumes", "", rows_table([plan(row) for row in rows]), "", rows_table([listing]), "",
        *(["## Processes that share a folder", "", rows_table(shared), ""] if shared else []),
    ])  # fmt: skip
    write_csv([*rows, *shared, listing], csv_file, overwrite)
    publish(text, text_file, overwrite)


if __name__ == "__main__":
    report_errors_in_one_sentence()
    fire.Fire(main)
