from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_bundle import write_tiny_bundle

from miar_monai import SuperResolver
from miar_monai.errors import ImageError
from miar_monai.inference import memory
from miar_monai.inference.memory import available_memory, check_memory, needed_memory

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
    needed = needed_memory((32, 32, 2))
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    assert resolver(image).shape == (32, 32, 2)
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    monkeypatch.setattr(resolver.network, "forward", lambda *_, **__: pytest.fail("the network ran"))
    with pytest.raises(ImageError, match=r"^the result of 32 x 32 x 2 voxels needs 0\.0 GiB of memory, but"):
        resolver(image)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory((9999, 9999, 9999))


def test_the_sentence_says_how_much_is_needed_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * GIB)
    for uncertainty in (False, True):
        with pytest.raises(ImageError) as caught:
            check_memory((2048, 2048, 600), uncertainty)
        assert re.search(r" needs \d+\.\d GiB of memory, but 2\.0 GiB are available: ", str(caught.value))
        assert ("leave the uncertainty out" in str(caught.value)) is uncertainty
    assert needed_memory((2, 2, 2), uncertainty=True) > needed_memory((2, 2, 2))


MEASURE = """
import sys
from pathlib import Path
import numpy as np
import torch
from benchmarks.measuring import PeakMemory
from miar_monai import SuperResolver
from miar_monai.data.io import write_volume
from miar_monai.data.volume import Volume

resolver = SuperResolver(sys.argv[1], "cpu", sw_batch_size=1, uncertainty=sys.argv[2] == "True")
for depth in (1, 80, 480):
    image = np.random.default_rng(0).random((48, 48, depth), np.float32)
    with PeakMemory(torch.device("cpu")) as peak:
        result = resolver.volume(Volume(image, np.eye(4), np.dtype("int16"), Path("scan.nii")))
        write_volume("result.nii.gz", result, overwrite=True)
    print(peak.mib)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("uncertainty", [False, True])
def test_the_estimate_is_close_to_the_measured_peak(uncertainty: bool, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "miar_brats")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(bundle), str(uncertainty)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    _, short, long = (float(line) * 2**20 for line in done.stdout.split())
    estimated = needed_memory((192, 192, 480), uncertainty) - needed_memory((192, 192, 80), uncertainty)
    assert 0.8 * estimated < long - short < 1.2 * estimated
