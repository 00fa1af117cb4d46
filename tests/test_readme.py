"""The README's commands and examples run as they stand, and the files it names exist."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from bundle_runs import NAMES, tiny
from click.testing import CliRunner
from monai.bundle import ConfigParser
from phantoms import write_brats_folder, write_dicom_series, write_nifti_phantom
from tiny_bundle import write_tiny_bundle

from miar_monai.app import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLAN = (ROOT / "docs" / "many_volumes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
SHAPE = (19, 13, 3)

pytestmark = [
    pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
]


def commands(start: str, text: str = README) -> list[list[str]]:
    """Return the commands of all blocks that begin with a word, without comments and continued lines joined."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    lines = [line.strip() for line in blocks.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{start} ")]


@pytest.fixture
def _user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start where a user has the folders and files that the README talks of, with tiny bundles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("MIAR_BUNDLES", str(tmp_path / "bundles"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    for name in NAMES:
        write_tiny_bundle(tmp_path / "bundles" / name, name)
    write_nifti_phantom("my_scan.nii.gz", SHAPE)
    write_dicom_series("dicom_series", SHAPE)
    write_nifti_phantom("patients/1/t2.nii.gz", SHAPE)
    write_nifti_phantom("patients/2.nii.gz", SHAPE)


@pytest.mark.usefixtures("_user")
def test_every_miar_command_runs() -> None:
    found = commands("miar") + [command[command.index("sr") - 1 :] for command in commands("torchrun")]
    assert len(found) >= 5
    for command in found:
        result = CliRunner().invoke(main, command[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"
    for made in ("my_scan_sr.nii.gz", "result.nii.gz", "result.png", "results/1/t2_sr.nii.gz", "run.json"):
        assert Path(made).is_file()
    assert len(list(Path("results/dicom_series_sr").iterdir())) == SHAPE[2]


@pytest.mark.usefixtures("_user")
def test_the_bundle_infers_as_written() -> None:
    (command,) = [command for command in commands("python") if "inference.json" in " ".join(command)]
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert Path("output/my_scan_sr.nii.gz").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("_user")
def test_the_bundle_trains_and_evaluates_as_written() -> None:
    write_brats_folder("BraTS2021", 4, (40, 36, 6), contrasts=("t2",))
    for kind in ("train_stage1", "train", "evaluate"):
        config, parser = f"bundles/miar_brats/configs/{kind}.json", ConfigParser()
        parser.read_config(config)
        for name, value in tiny(kind).items():
            parser[name] = value
        ConfigParser.export_config_file(parser.get(), config, indent=4)
    (block,) = [block for block in BLOCKS if "train_stage1.json" in block]
    activate = Path(".venv/bin/activate")
    activate.parent.mkdir(parents=True)
    activate.touch()
    done = subprocess.run(["bash", "-euc", block], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for made in ("tokenizer.pt", "model.pt", "metrics.csv", "metrics.md"):
        assert Path("runs/brats", made).is_file()


def test_benchmarks_take_the_options_that_are_named() -> None:
    found = [command for text in (README, PLAN) for command in commands("python", text) if "benchmarks" in command[2]]
    assert len(found) >= 4
    for command in found:
        taken = inspect.signature(import_module(command[2]).main).parameters
        for option in command[3:]:
            name = option.removeprefix("--")
            free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
            assert not option.startswith("--") or name in taken or free, f"{option} of {command[2]}"


def test_make_has_the_targets_that_are_named() -> None:
    for command in [*commands("make"), ["make", "bundles"]]:
        done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr


def test_scripts_take_the_steps_that_are_named() -> None:
    script = (ROOT / "benchmarks" / "recipe.sh").read_text(encoding="utf-8")
    lines = commands("MINUTES=10") + commands("MINUTES=3")
    steps = [step for line in lines for step in line[line.index("benchmarks/recipe.sh") + 5 :]]
    assert steps
    assert [step for step in steps if not re.search(rf"\b{step}\b", script)] == []


def test_the_python_example_prints_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    promised = re.findall(r"print\(.*\)  # (.*)", code)
    exec(compile(code, "README.md", "exec"), {})
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\((.*?)\)", README) if not target.startswith("http")]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_configs_that_commands_name_exist() -> None:
    named = set(re.findall(r"\$BUNDLE/configs/(\w+\.json)", README))
    assert {"train_stage1.json", "train.json", "evaluate.json", "multi_gpu_train.json"} <= named
    for bundle in NAMES:
        assert [name for name in named if not (ROOT / "bundles" / bundle / "configs" / name).is_file()] == []
