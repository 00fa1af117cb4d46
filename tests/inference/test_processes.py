"""A folder of volumes shared by processes, jobs and runs: each volume is processed once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.bundle_runs import Finished, command
from helpers.phantoms import write_nifti_phantom

from miar_monai.cli.main import main
from miar_monai.data.io import read_volume
from miar_monai.errors import ConfigurationError
from miar_monai.inference.devices import choose_device, device_of_process
from miar_monai.inference.processes import part_of, processes

SHAPE = (19, 13, 2)
TWO = ("--standalone", "--nnodes=1", "--nproc_per_node=2", "-m", "miar_monai.cli.main")


@pytest.fixture(autouse=True)
def _loopback(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def cases(folder: Path, count: int) -> Path:
    for i in range(count):
        write_nifti_phantom(folder / f"{i}.nii.gz", SHAPE, seed=i)
    return folder


def options(bundle: Path, source: Path, *parts: object) -> list[str]:
    return ["sr", str(source), "-o", "out", "--model", str(bundle), "--device", "cpu", *map(str, parts)]


def miar(bundle: Path, source: Path, *parts: object) -> Result:
    return CliRunner().invoke(main, options(bundle, source, *parts))


def two_processes(bundle: Path, source: Path, *parts: object) -> Finished:
    return command(*TWO, *options(bundle, source, "--report", "run.json", *parts), module="torch.distributed.run")


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def reports() -> list[dict]:
    found: list[dict] = json.loads(Path("run.json").read_text())["cases"]
    return found


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("parts", range(1, 5))
def test_parts_hold_each_item_once(count: int, parts: int) -> None:
    shares = [part_of(list(range(count)), index, parts) for index in range(parts)]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else: there is no RANK
    monkeypatch.delenv("RANK", raising=False)
    with processes() as alone:
        assert alone == (0, 1)
        assert alone.gather({3: {"x": 1}, 1: {"x": 2}}) == [{"x": 2}, {"x": 1}]


def test_processes_get_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    found = []
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(choose_device("auto").index)
        assert choose_device("cuda:1") == torch.device("cuda:1")
    assert found == [0, 1, 0, 1]


def test_each_process_of_a_training_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of_process() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert device_of_process() == torch.device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigurationError, match=r"^process 2 .* since 1 can be seen: give --nproc_per_node 1, or more"
    ):
        device_of_process()


@pytest.mark.slow
def test_two_processes_share_three_cases_and_report_the_failed_one(bundle: Path, tmp_path: Path) -> None:
    source = cases(tmp_path / "in", 3)
    broken = source / "1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    done = two_processes(bundle, source)
    assert done.returncode == 1, done.stderr  # the launcher's own, of processes that
    assert "exitcode  : 3" in done.stderr  # of both, if the launcher did not end the second when the first had ended
    assert done.stderr.count(f"1 of 3 cases failed: {broken}\n") == 1
    assert sorted(done.stdout.split()) == ["out/0_sr.nii.gz", "out/2_sr.nii.gz"]  # each once
    assert names("out") == ["0_sr.nii.gz", "2_sr.nii.gz"]
    assert [(Path(report["input"]).name, "error" in report) for report in reports()] == [
        ("0.nii.gz", False), ("1.nii.gz", True), ("2.nii.gz", False)
    ]  # fmt: skip
    assert miar(bundle, source / "2.nii.gz", "-o", "alone.nii.gz").exit_code == 0
    assert np.array_equal(read_volume("alone.nii.gz").array, read_volume("out/2_sr.nii.gz").array)


@pytest.mark.slow
def test_one_volume_for_two_processes(bundle: Path, tmp_path: Path) -> None:
    done = two_processes(bundle, cases(tmp_path / "in", 1))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/0_sr.nii.gz\n"
    assert [report["output"] for report in reports()] == ["out/0_sr.nii.gz"]


@pytest.mark.slow
def test_a_killed_run_resumes(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for i in range(6):
        write_nifti_phantom(source / f"{i}.nii.gz", (64, 64, 25), seed=i)
    process = subprocess.Popen([sys.executable, "-m", "miar_monai.cli.main", *options(bundle, source, "--quiet")])
    while process.poll() is None and not (Path("out").is_dir() and len(list(Path("out").glob("*.nii.gz"))) >= 2):
        time.sleep(0.02)
    process.kill()
    assert process.wait(60) != 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.nii.gz")}
    assert 2 <= len(before) < 6
    done = two_processes(bundle, source, "--skip-existing")
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of 6 cases had a result already" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [path.name for path in sorted(Path("out").glob("*.nii.gz"))] == [f"{i}_sr.nii.gz" for i in range(6)]
    assert [report.get("skipped", False) for report in reports()] == [
        Path("out", f"{i}_sr.nii.gz") in before for i in range(6)
    ]


def test_cases_with_a_result_are_skipped(bundle: Path, tmp_path: Path) -> None:
    source = cases(tmp_path / "in", 3)
    assert miar(bundle, source / "1.nii.gz", "--quiet").exit_code == 0
    kept = Path("out/1_sr.nii.gz").read_bytes()
    Path("out/2_sr.png").write_text("left by a killed run")
    assert miar(bundle, source).exit_code == 3  # without the option an existing result is a failure
    Path("out/0_sr.nii.gz").unlink()
    Path("out/2_sr.nii.gz").unlink()
    result = miar(bundle, source, "--skip-existing", "--preview", "--report", "run.json")
    assert (result.exit_code, result.stdout.split()) == (0, ["out/0_sr.nii.gz", "out/2_sr.nii.gz"])
    assert "1 of 3 cases had a result already" in result.stderr
    assert [report.get("skipped", False) for report in reports()] == [False, True, False]
    assert Path("out/1_sr.nii.gz").read_bytes() == kept
    assert names("out") == ["0_sr.nii.gz", "0_sr.png", "1_sr.nii.gz", "2_sr.nii.gz", "2_sr.png"]
    assert Path("out/2_sr.png").read_bytes()[:4] == b"\x89PNG"
    assert miar(bundle, source / "0.nii.gz", "--skip-existing").exit_code == 0
    refused = miar(bundle, source, "--skip-existing", "--overwrite")
    assert refused.exit_code == 2
    assert "exclude each other" in refused.stderr


@pytest.mark.parametrize("output", [".", "sr"])
def test_results_among_the_cases_are_ignored(output: str, bundle: Path, tmp_path: Path) -> None:
    source = cases(tmp_path / "in", 2)
    write_nifti_phantom(source / ".miar-left" / "1_sr.nii.gz", SHAPE)  # by a killed run
    for existing in ("", "2 of 2 cases had a result already"):
        result = miar(bundle, source, "-o", source / output, "--skip-existing")
        assert result.exit_code == 0
        assert existing in result.stderr
    found = [path.parent for path in source.rglob("*_sr.nii.gz") if path.parent.name != ".miar-left"]
    assert found == [source / output] * 2


def test_independent_jobs_process_disjoint_parts(bundle: Path, tmp_path: Path) -> None:
    source = cases(tmp_path / "in", 3)
    for part, made in (("1/2", ["0_sr.nii.gz", "2_sr.nii.gz"]), ("2/2", ["1_sr.nii.gz"]), ("4/4", [])):
        result = miar(bundle, source, "--part", part, "-o", part.replace("/", "of"))
        assert result.exit_code == 0
        assert [Path(line).name for line in result.stdout.split()] == made
    for part in ("0/2", "3/2", "2", "a/b", "-1/2"):
        refused = miar(bundle, source, "--part", part)
        assert refused.exit_code == 2
        assert f"'{part}' must be of the form I/N" in refused.stderr
