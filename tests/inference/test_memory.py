from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_bundle import write_sampling_bundle, write_tiny_bundle

from miar_monai import SuperResolver
from miar_monai.errors import ImageError
from miar_monai.inference import memory
from miar_monai.inference.memory import MemoryForecast, available_memory

GIB = 2**30
ROOT = Path(__file__).parents[2]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_available_memory_is_that_of_the_machine(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    write(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    2097152 kB\n"})
    assert available_memory(tmp_path) == 2 * GIB
    write(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\n"})  # of an old kernel
    assert available_memory(tmp_path) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_memory_that_is_allocated_is_not_available() -> None:
    before = available_memory()
    assert before is not None
    block = torch.ones(GIB // 4)
    after = available_memory()
    assert after is not None
    assert after < before
    del block


@pytest.mark.parametrize("group", ["", "job_7/step_0"])
def test_the_limit_of_a_container_or_job_counts(group: str, tmp_path: Path) -> None:
    about = f"sys/fs/cgroup/{group}/memory"
    files = {
        "proc/meminfo": f"MemAvailable: {64 * GIB // 1024} kB\n",
        "proc/self/cgroup": f"0::/{group}\n",
        "sys/fs/cgroup/other/memory.max": "0",  # of another job
        "sys/fs/cgroup/other/memory.current": "0",
        f"{about}.max": f"{4 * GIB}\n",
        f"{about}.current": f"{3 * GIB}\n",
        f"{about}.stat": f"anon {2 * GIB}\ninactive_file {GIB // 2}\n",
    }
    assert available_memory(write(tmp_path, files)) == 3 * GIB // 2
    write(tmp_path, {f"{about}.current": f"{9 * GIB}\n"})
    assert available_memory(tmp_path) == 0
    write(tmp_path, {f"{about}.max": "max\n"})
    assert available_memory(tmp_path) == 64 * GIB


def test_a_result_that_does_not_fit_is_refused_before_the_network_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = SuperResolver(write_tiny_bundle(tmp_path / "miar_brats"), "cpu")
    image = torch.rand(8, 8, 2).numpy()
    needed = MemoryForecast([(32, 32, 2)]).needed
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    assert resolver(image).shape == (32, 32, 2)
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    monkeypatch.setattr(resolver.network, "forward", lambda *_, **__: pytest.fail("the network ran"))
    with pytest.raises(ImageError, match=r"^the result of 32 x 32 x 2 voxels needs 0\.0 GiB of memory, but"):
        resolver(image)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    MemoryForecast([(9999, 9999, 9999)]).check()


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "the uncertainty": {"uncertainty": True},
    "the samples": {"samples": 8, "keep_samples": True},
    "the guide": {"guide": True},
    "the uncertainty or the guide": {"uncertainty": True, "guide": True},
    "the label map": {"label_bytes": 2},
}


@pytest.mark.parametrize("options", list(OPTIONS))
def test_the_sentence_says_how_much_is_needed_and_what_helps(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * GIB)
    forecast = MemoryForecast([(2048, 2048, 600)], **OPTIONS[options])
    with pytest.raises(ImageError) as caught:
        forecast.check()
    assert f" needs {forecast.needed / GIB:.1f} GiB of memory, but 2.0 GiB are available: " in str(caught.value)
    assert f"coarser grid, {options and f'leave {options} out, '}crop" in str(caught.value)
    assert (forecast.needed > MemoryForecast(forecast.shapes).needed) is bool(options)


MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from benchmarks.measuring import PeakMemory, resident_bytes
from miar_monai import SuperResolver
from miar_monai.data.io import parts_to_save, write_volume
from miar_monai.data.volume import Volume

settings, guided, shapes = json.loads(sys.argv[2])
resolver = SuperResolver(sys.argv[1], "cpu", sw_batch_size=1, **settings)
for shape in [shapes[1], *shapes]:  # operators of a size are made once
    image, other = np.random.default_rng(0).random((2, *shape), np.float32)
    scan, guide = (Volume(x, np.diag([-1.0, -1, 3, 1]), np.dtype("int16"), Path("scan.nii")) for x in (image, other))
    prepared = resolver.prepare(scan, guide if guided else None)
    grids = prepared.plan.grids(scan.grid)
    before = resident_bytes()
    with PeakMemory(torch.device("cpu")) as peak:
        result = resolver.volume(scan, prepared)
        for part, kind in parts_to_save(result):
            for suffix in (".nii.gz", ".nrrd", ".mha"):
                write_volume(kind + suffix, part, overwrite=True)
    needed = resolver.volume_inferer.forecast(prepared.plan, grids, guided).needed
    print(result.array.nbytes, needed, peak.mib * 2**20 - before)
    del scan, guide, image, other, prepared, result, part
"""

AXIAL, THROUGH = [(48, 48, 2), (48, 48, 200)], [(96, 96, 8), (384, 384, 8)]
JOBS: dict[str, tuple[dict[str, Any], bool, list[tuple[int, ...]], float]] = {
    "axial": ({}, False, AXIAL, 1),
    "uncertainty": ({"uncertainty": True}, False, AXIAL, 2),
    "guide": ({}, True, AXIAL, 2),
    "through-plane": ({"factor": [1, 1, 4]}, False, THROUGH, 1),
    "samples": ({"samples": 3, "save_samples": True}, False, [(48, 48, 2), (48, 48, 80)], 8),
    "samples of two planes": ({"samples": 3, "factor": [1, 1, 4]}, False, THROUGH, 8),
    "two stages": ({"uncertainty": True, "factor": [2, 2, 1.5]}, False, [(48, 48, 4), (48, 48, 160)], 3.5),
}


COMMAND = """
import json, sys
from pathlib import Path
import nibabel as nib
import numpy as np
import torch
from click.testing import CliRunner
from benchmarks.measuring import PeakMemory, resident_bytes
from miar_monai.cli.main import main
from miar_monai.transforms import labels

labels._TILE = 64  # blocks of a size are not forecast
dtype, ending, options = json.loads(sys.argv[2])
shape = (48, 48, 800)  # slices so small that a batch of them needs little
for _ in range(2):  # operators of a size are made once
    voxels = np.random.default_rng(0).integers(-30_000, 30_000, (2, *shape)) * (1000 if dtype == "int32" else 1)
    z, y, x = np.ogrid[:shape[0], :shape[1], :shape[2]]
    organs = np.broadcast_to(z // 24 + 4 * (y // 24), shape).astype(np.uint8)
    for name, array in {"scan": voxels[0].astype(dtype), "guide": voxels[1].astype(dtype), "labels": organs}.items():
        nib.save(nib.Nifti1Image(array, np.diag([-1, -1, 3, 1])), name + ending)
    del voxels, organs, array
    before = resident_bytes()
    with PeakMemory(torch.device("cpu")) as peak:
        settings = ["--model", sys.argv[1], "--device", "cpu", "--quiet", "--overwrite", "--report", "run.json"]
        done = CliRunner().invoke(main, ["sr", "scan" + ending, *settings, *options.split()], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    (case,) = json.loads(Path("run.json").read_text())["cases"]
    print(np.prod(case["after"]["shape"]) * 4, case["memory_needed_bytes"], peak.mib * 2**20 - before)
"""

COMMANDS: dict[str, tuple[str, str, str, float]] = {  # dtype and ending of the file, options, size in results
    "16 bits": ("int16", ".nii", "--factor 2,2,1", 1 + 1 / 4),
    "16 bits, compressed": ("uint16", ".nii.gz", "--factor 2,2,1", 1 + 1 / 4),
    "floats": ("float32", ".nii.gz", "--factor 2,2,1 --uncertainty", 2 + 2 / 4),
    "guide": ("int16", ".nii", "--factor 2,2,1 --guide guide.nii", 2 + 2 / 4),
    "labels": ("int16", ".nii", "--factor 2,2,1 --labels labels.nii", 1 + 1 / 4 + 1 / 16 + 1 / 4),
    "32 bits": ("int32", ".nii", "--factor 2,2,1", 2 + 2 / 4),
    "32 bits, written by layers": ("int32", ".nii", "--factor 2,2,1 -o result.nrrd", 1 + 2 / 4),
}


def measured(code: str, bundle: Path, job: Sequence[Any], folder: Path) -> list[np.ndarray]:
    """Return the numbers in the lines that code prints; those of a warm-up come first."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # so that small arrays are freed like large ones
    }
    command = [sys.executable, "-c", code, str(bundle), json.dumps(job)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return [np.array([float(x) for x in line.split()]) for line in done.stdout.splitlines()]


READING = """
import json, sys
from pathlib import Path
import nibabel as nib
import numpy as np
import torch
from benchmarks.measuring import PeakMemory, resident_bytes
from miar_monai.data.io import read_volume, write_volume
from miar_monai.data.volume import Volume

name, slope = json.loads(sys.argv[2])
voxels = np.random.default_rng(0).integers(-1000, 3000, (128, 128, 256)).astype(np.int16)
if name.endswith(".nrrd"):
    write_volume(name, Volume(voxels, np.eye(4), voxels.dtype, Path(name)))
else:
    image = nib.Nifti1Image(voxels * slope, np.eye(4), dtype=np.int16)
    nib.save(image, name)
    del image
del voxels
for _ in range(2):  # libraries are loaded once
    before = resident_bytes()
    with PeakMemory(torch.device("cpu")) as peak:
        volume = read_volume(name)
    print(volume.array.nbytes, peak.mib * 2**20 - before)
    del volume
"""

FILES = {"integers.nii": (1, 1), "integers.nii.gz": (1, 1), "scaled.nii.gz": (0.37, 1), "integers.nrrd": (1, 2)}
"""Factor of the intensities, and the memory at the peak as sizes of the volume in float32."""


needs_kernel = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("job", list(JOBS))
def test_the_forecast_is_close_to_the_measured_peak(job: str, tmp_path: Path) -> None:
    settings, guided, shapes, factor = JOBS[job]
    bundle = write_sampling_bundle(tmp_path / "sampling")
    _, small, large = measured(MEASURE, bundle, [settings, guided, shapes], tmp_path)
    result, forecast, peak = large - small
    assert forecast / result == pytest.approx(factor, rel=0.02)
    assert peak / forecast == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("job", list(COMMANDS))
def test_the_forecast_of_the_command_includes_all_files(job: str, tmp_path: Path) -> None:
    *settings, factor = COMMANDS[job]
    _, (result, forecast, peak) = measured(COMMAND, write_sampling_bundle(tmp_path / "sampling"), settings, tmp_path)
    assert forecast / result == pytest.approx(factor, rel=0.02)
    assert 0.85 < peak / forecast < 1.1  # 1.15 if an image of 16 bits as read were in memory too


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("name", list(FILES))
def test_a_file_is_read_without_copies_of_the_volume(name: str, tmp_path: Path) -> None:
    slope, size = FILES[name]
    _, (volume, peak) = measured(READING, Path(), [name, slope], tmp_path)
    assert peak / volume < size + 0.4  # a quarter is of the checks
