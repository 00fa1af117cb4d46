"""The wheels of `make dist`: their contents, and that they work without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers.phantoms import write_nifti_phantom

from miar_monai import __version__, super_resolve
from miar_monai.cli.build_bundles import bundle_files
from miar_monai.errors import SettingError
from miar_monai.inference import bundle as bundles
from miar_monai.inference.bundle import MODELS, find_bundle, locate_bundle

ROOT = Path(__file__).parents[2]
SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "miar_monai", "pyproject.toml", "setup.cfg")


def python(*words: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, without the environment variables of this process for packages and bundles."""
    clean = {name: value for name, value in os.environ.items() if name not in ("MIAR_BUNDLES", "PYTHONPATH")}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env={**clean, **environment}, capture_output=True, encoding="utf-8")


def build(project: Path, output: Path) -> Path:
    """Return the wheel of a project, built from its sdist."""
    done = python("-m", "build", "--no-isolation", "--outdir", output, project, folder=output.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = output.glob("*.whl")
    assert len([*output.glob("*.tar.gz")]) == 1
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the wheels of the code and of the weights, built from a copy of the repository."""
    folder = tmp_path_factory.mktemp("wheels")
    (folder / "code").mkdir()
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / "code" / name)
    shutil.copytree(ROOT / "bundles", folder / "weights", ignore=shutil.ignore_patterns("*.egg-info"))
    return build(folder / "code", folder / "code_dist"), build(folder / "weights", folder / "weights_dist")


def test_bundles_are_found_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(folder: Path) -> Path:
        (folder / "configs").mkdir(parents=True)
        (folder / "configs" / "inference.json").touch()
        return folder

    monkeypatch.delenv("MIAR_BUNDLES", raising=False)
    monkeypatch.setattr(bundles, "__file__", str(tmp_path / "clone" / "miar_monai" / "inference" / "bundle.py"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    needed = r"^the weights .* brats are not installed: the package miar-monai-bundles is needed; install its wheel \("
    with pytest.raises(SettingError, match=needed):
        locate_bundle("brats")
    about = tmp_path / "site" / "miar_monai_bundles-0.1.7.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: miar-monai-bundles\nVersion: 0.1.7\n")
    with pytest.raises(SettingError, match=needed):  # an incomplete installation
        locate_bundle("brats")
    installed = put(tmp_path / "site" / "miar_monai_bundles" / "miar_brats")
    assert locate_bundle("brats") == (installed, "miar-monai-bundles 0.1.7")
    cloned = put(tmp_path / "clone" / "bundles" / "miar_brats")
    assert locate_bundle("brats") == (cloned, "the repository")
    monkeypatch.setenv("MIAR_BUNDLES", str(tmp_path / "named"))
    with pytest.raises(SettingError, match=r"named/miar_brats/.*\.json does not exist: .*; set MIAR_BUNDLES"):
        locate_bundle("brats")
    named = put(tmp_path / "named" / "miar_brats")
    assert locate_bundle("brats") == (named, "MIAR_BUNDLES")
    assert locate_bundle(installed) == (installed, "the given folder")
    assert find_bundle("brats") == named


@pytest.mark.slow
def test_installed_wheels_work_without_the_repository(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    home, empty = tmp_path / "home", tmp_path / "empty"
    empty.mkdir()

    def install(wheel: Path) -> None:
        done = python("-m", "pip", "install", "--no-index", "--no-deps", "--target", home, wheel, folder=empty)
        assert done.returncode == 0, done.stderr

    def miar(*words: object) -> str:
        done = python(home / "bin" / "miar", *words, folder=empty, PYTHONPATH=str(home))
        assert done.returncode == 0, done.stderr
        return done.stdout

    code, weights = wheels
    install(code)
    assert f"{MODELS[0]}: the weights of the model {MODELS[0]} are not installed: the package" in miar("info")
    install(weights)
    info = miar("info")
    assert f"miar {__version__} in {home / 'miar_monai'}\n" in info
    scan = write_nifti_phantom(tmp_path / "scan.nii.gz", (20, 24, 1))
    for model in MODELS:
        bundle = home / "miar_monai_bundles" / f"miar_{model}"
        assert f"in {bundle} (from miar-monai-bundles {__version__})\n" in info
        assert miar("weights", "verify", "--model", model).startswith(f"{bundle / 'models' / 'model.pt'} sha256")
        miar("sr", scan, "--model", model, "--lookahead-tokens", 0, "--device", "cpu", "-o", f"{model}.nii.gz")
        result = nib.load(empty / f"{model}.nii.gz").get_fdata()
        wanted = super_resolve(nib.load(scan), ROOT / "bundles" / f"miar_{model}", device="cpu", lookahead_tokens=0)
        assert result.shape == (80, 96, 1)
        np.testing.assert_allclose(result, wanted.get_fdata(), rtol=0, atol=1e-3 * np.ptp(result))
    assert sorted(path.name for path in empty.iterdir()) == [f"{model}.nii.gz" for model in MODELS]


@pytest.mark.slow
def test_the_wheels_contain_the_files_of_the_repository(wheels: tuple[Path, Path]) -> None:
    code = {path for path in (ROOT / "miar_monai").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    weights = {path for model in MODELS for path in bundle_files(ROOT / "bundles" / f"miar_{model}")}
    assert contents(wheels[0]) == {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in code}
    assert contents(wheels[1]) == {
        f"miar_monai_bundles/{path.relative_to(ROOT / 'bundles').as_posix()}": path.read_bytes() for path in weights
    }
    assert all(wheel.stat().st_size < 100e6 for wheel in wheels)  # PyPI takes no larger file


@pytest.mark.slow
def test_the_wheel_of_the_weights_states_the_terms_of_the_training_data(wheels: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(wheels[1]) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(about))
    assert metadata["Version"] == __version__
    assert metadata["Requires-Dist"] == "miar-monai~=0.1.0"
    assert metadata["License-Expression"] == "Apache-2.0 AND LicenseRef-data-license"
    assert {f"miar_{model}/docs/data_license.txt" for model in MODELS} <= {*metadata.get_all("License-File", [])}
    assert "available after registration, **for research**" in metadata.get_payload()
