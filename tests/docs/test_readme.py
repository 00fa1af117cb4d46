"""The commands and examples of the README and the guides run as they stand, and the files they name exist."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.bundle_runs import BUNDLES, NAMES, tiny, tiny_paper
from helpers.phantoms import write_brats_folder, write_dicom_series, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle
from monai.bundle import ConfigParser

from miar_monai.cli.main import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# docs/results/*.md are written by the benchmarks, with the command of each table
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), DOCS / "results" / "index.md"]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
README = TEXTS["README.md"]
ALL = "\n".join(TEXTS.values())
SHAPE = (19, 13, 3)

TESTED = {
    "miar ": "test_every_miar_command_runs",
    "torchrun ": "test_every_miar_command_runs",
    "make ": "test_make_has_the_targets_that_are_named",
    "python -m benchmarks.": "test_benchmarks_take_the_options_that_are_named",
    "python -m monai.bundle run --config_file bundles/miar_brats/configs/": "test_the_bundle_infers_as_written",
    "MINUTES=": "test_scripts_take_the_steps_that_are_named",
    ". .venv/bin/activate": "test_the_bundle_trains_and_evaluates_as_written",
    "BUNDLE=": "test_the_bundle_trains_and_evaluates_as_written",
    "ARGS=": "test_the_bundle_trains_and_evaluates_as_written",
    "python -m monai.bundle run training --config_file $BUNDLE": "test_the_bundle_trains_and_evaluates_as_written",
    "python -m monai.bundle run --config_file $BUNDLE": "test_the_bundle_trains_and_evaluates_as_written",
    "python -m monai.bundle run training --config_file \"['$BUNDLE": "test_the_system_of_the_paper_trains_as_written",
    "python -m monai.bundle run --config_file \"['$BUNDLE": "test_the_system_of_the_paper_trains_as_written",
}
NOT_RUN = {
    "pip install": "it would change the environment of the tests; make demo installs in the same way",
    "cp -r $(miar label-app)": "tests/label copies the app and starts it, where MONAI Label is installed",
    "monailabel start_server": "tests/label starts a server, where MONAI Label is installed",
    "curl": "tests/label sends the same requests to a real server",
    "docker ": "it needs a daemon; tests/test_container.py runs the steps of the Dockerfile",
    "hf ": "it needs an account on Hugging Face",
    "python -m monai.bundle download": "tests/bundles/test_bundles.py downloads from a server on loopback",
    "export OMP_NUM_THREADS": "it changes the speed only",
}
NOT_RUN_PYTHON = {"slicer.util.loadVolume": "the Python of 3D Slicer; tests/label sends the same request"}


def blocks(language: str, text: str = ALL) -> list[str]:
    """Return the blocks in a language, also those that are part of a list."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)


def lines(text: str = ALL) -> list[str]:
    """Return the lines of all command blocks, without comments, and continued ones joined."""
    joined = "".join(blocks("sh", text)).replace("\\\n", " ")
    return [line for each in joined.splitlines() if (line := each.strip()) and not line.startswith("#")]


def commands(start: str, text: str = ALL) -> list[list[str]]:
    """Return the words of all commands that begin with a word, without comments."""
    return [shlex.split(line, comments=True) for line in lines(text) if line.startswith(f"{start} ")]


def test_every_command_is_tested_or_says_why_not() -> None:
    known = [*TESTED, *NOT_RUN]
    assert [line for line in lines() if not line.startswith(tuple(known))] == []
    assert [start for start in known if not any(line.startswith(start) for line in lines())] == []
    assert [test for test in TESTED.values() if test not in globals()] == []


def test_all_code_blocks_are_in_known_languages() -> None:
    languages = set(re.findall(r"^ *```(\S+)$", ALL, flags=re.MULTILINE))
    assert {each for each in languages if not each.startswith("{")} == {"sh", "python", "py"}
    assert len(re.findall(r"^ *```", ALL, flags=re.MULTILINE)) % 2 == 0
    for block in blocks("py"):
        assert any(part in block for part in NOT_RUN_PYTHON)


@pytest.fixture
def _user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start where a user has the folders and files that the documents name, with tiny bundles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("MIAR_BUNDLES", str(tmp_path / "bundles"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    for name, value in {"JOB_ID": "7", "ARRAY_TASK_ID": "1", "ARRAY_TASK_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in NAMES:
        write_tiny_bundle(tmp_path / "bundles" / name, name)
    for scan in ("t2.nii.gz", "my_scan.nii.gz", "patients/1/t2.nii.gz", "patients/2.nii.gz", "volumes/1.nii.gz"):
        write_nifti_phantom(scan, SHAPE)
    write_nifti_phantom("my_ct.nii.gz", SHAPE)
    write_nifti_phantom("t1.nii.gz", SHAPE, seed=1)
    write_dicom_series("dicom_series", SHAPE)


MADE = {
    "README.md": ["t2_sr.nii.gz", "thin.nii.gz", "guided.nii.gz"],
    "docs/getting_started.md": ["my_scan_sr.nii.gz", "thin.nii.gz", "my_ct_sr.nii.gz", "my_ct_sr.png"],
    "docs/command_line.md": [
        "my_scan_sr.nii.gz",
        "result.nii.gz",
        "result.png",
        "result.html",
        "my_scan_sr.html",
        "seen.html",
        "results/1/t2_sr.nii.gz",
        "run.json",
        "my_scan_lr.nii.gz",
        "thick.nii.gz",
    ],
    "docs/dicom.md": ["dicom_series_sr.nii.gz", "results/dicom_series_sr"],
    "docs/many_volumes.md": ["results/1_sr.nii.gz", "run.json", "reports/7.json"],
    "docs/uncertainty.md": ["certain.nii.gz", "certain_uncertainty.nii.gz", "drawn.nii.gz", "drawn_std.nii.gz"],
}


@pytest.mark.usefixtures("_user")
@pytest.mark.parametrize("document", MADE)
def test_every_miar_command_runs(document: str) -> None:
    alone, shared = commands("miar", TEXTS[document]), commands("torchrun", TEXTS[document])
    found = alone + [command[command.index("miar_monai") :] for command in shared if "miar_monai" in command]
    assert found
    for command in found:
        result = CliRunner().invoke(main, [os.path.expandvars(word) for word in command[1:]])
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert [made for made in MADE[document] if not Path(made).exists()] == []


def test_the_documents_with_miar_commands_are_those() -> None:
    assert {name for name, text in TEXTS.items() if commands("miar", text) or commands("torchrun", text)} == {*MADE}


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
    for kind in ("train_estimator", "train_stage1", "train", "evaluate"):
        config, parser = f"bundles/miar_brats/configs/{kind}.json", ConfigParser()
        parser.read_config(config)
        for name, value in tiny(kind).items():
            parser[name] = value
        ConfigParser.export_config_file(parser.get(), config, indent=4)
    (estimator_block,) = [block for block in blocks("sh") if "train_estimator.json" in block]
    (miar_block,) = [block for block in blocks("sh", TEXTS["docs/bundles.md"]) if "train_stage1.json" in block]
    run_block(estimator_block + miar_block)
    for made in ("brats/model.pt", "brats/metrics.csv", "brats/metrics.html", "miar/tokenizer.pt", "miar/model.pt"):
        assert Path("runs", made).is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("_user")
def test_the_system_of_the_paper_trains_as_written() -> None:
    write_brats_folder("BraTS2021", 4, (40, 36, 6), contrasts=("t2",))
    for kind in ("train_stage1", "train", "evaluate"):
        overlay = Path("bundles/miar_brats/configs", f"paper_{kind}.json")
        overlay.write_text(json.dumps(json.loads(overlay.read_text()) | tiny_paper(kind)))
    (block,) = [block for block in blocks("sh", TEXTS["docs/paper.md"]) if "paper_train_stage1.json" in block]
    run_block(block)
    for made in ("tokenizer.pt", "model.pt", "metrics.csv", "metrics.md"):
        assert Path("runs/paper", made).is_file()


def run_block(block: str) -> None:
    """Run commands as a user of the repository, where the environment is already active."""
    activate = Path(".venv/bin/activate")
    activate.parent.mkdir(parents=True)
    activate.touch()
    done = subprocess.run(["bash", "-euc", block], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_benchmarks_take_the_options_that_are_named() -> None:
    found = [command for command in commands("python") if command[2].startswith("benchmarks.")]
    assert len(found) >= 4
    for command in found:
        taken = inspect.signature(import_module(command[2]).main).parameters
        for option in command[3:]:
            name = option.removeprefix("--")
            free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
            assert not option.startswith("--") or name in taken or free, f"{option} of {command[2]}"


def test_make_has_the_targets_that_are_named() -> None:
    for command in commands("make"):
        done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr


def test_scripts_take_the_steps_that_are_named() -> None:
    script = (ROOT / "benchmarks" / "recipe.sh").read_text(encoding="utf-8")
    found = commands("MINUTES=10") + commands("MINUTES=20") + commands("MINUTES=3")
    steps = [step for line in found for step in line[line.index("benchmarks/recipe.sh") + 5 :]]
    assert steps
    assert [step for step in steps if not re.search(rf"\b{step}\b", script)] == []


@pytest.mark.parametrize("code", sorted(set(blocks("python"))))
def test_the_python_examples_print_what_they_say(
    code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    promised = re.findall(r"print\(.*\)  # (.*)", code)
    exec(compile(code, "example", "exec"), {})
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.parametrize("document", TEXTS)
def test_links_have_targets(document: str) -> None:
    named = re.findall(r"\]\((.*?)\)", TEXTS[document])
    targets = [target.split("#")[0] for target in named if not target.startswith("http")]
    assert [target for target in targets if not ((ROOT / document).parent / target).exists()] == []


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows by their first cell; of several rows with the same one, the last."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize(("part", "page"), [(0, "brain_estimator"), (1, "chest_estimator")])
def test_the_readme_has_the_numbers_of_the_tables(part: int, page: str) -> None:
    text = (DOCS / "results" / f"{page}.md").read_text(encoding="utf-8").split("## Paired differences")[0]
    measured = rows(text.split("### all contrasts")[-1])
    shown = README.split("\n## Results")[1].split("\nChest CT")[part]
    found = {name: cells for name, cells in rows(shown).items() if name not in ("method", "---")}
    assert {"bicubic", "MIAR (default)"} < set(found)
    for name, cells in found.items():
        row = measured[name.replace("MIAR (default)", "MIAR, fidelity 0.25")]
        assert cells == [row[column].split(" ± ")[0] for column in (0, 1, 4)]


@pytest.mark.parametrize(("part", "name"), [(0, "miar_brats"), (1, "miar_lidc")])
def test_the_model_card_has_the_numbers_of_the_readme(part: int, name: str) -> None:
    card = (BUNDLES / name / "docs" / "README.md").read_text(encoding="utf-8").split("## Performance")[1]
    shown = rows(README.split("\n## Results")[1].split("\nChest CT")[part])
    assert {row: cells for row, cells in rows(card.split("\n## ")[0]).items() if row in shown} == shown
    figures = json.loads((BUNDLES / name / "configs" / "metadata.json").read_text())["eval_metrics"]
    assert [f"{figures['psnr_db']:.2f}", f"{figures['lpips']:.4f}"] == shown["MIAR (default)"][::2]


def test_configs_that_commands_name_exist() -> None:
    named = set(re.findall(r"\$BUNDLE/configs/(\w+\.json)", ALL))
    assert {"train_stage1.json", "train.json", "evaluate.json", "multi_gpu_train.json"} <= named
    for bundle in NAMES:
        assert [name for name in named if not (ROOT / "bundles" / bundle / "configs" / name).is_file()] == []
