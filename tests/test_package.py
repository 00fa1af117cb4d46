from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import miar_monai

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "miar_monai").rglob("*.py"))


def loaded(module: str) -> set[str]:
    """Return the packages that a fresh Python has loaded after importing a module."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    return set(done.stdout.split())


def test_the_import_is_cheap() -> None:
    assert not loaded("miar_monai") & {"torch", "monai", "numpy", "nibabel"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_heavy_and_optional_packages_are_loaded_only_when_they_are_used(path: Path) -> None:
    """MONAI loads some of them itself, so the source is what can be checked."""
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    names = [alias.name for line in statements if isinstance(line, ast.Import) for alias in line.names]
    names += [line.module for line in statements if isinstance(line, ast.ImportFrom) and line.module]
    heavy = {"itk", "pyiqa", "lpips", "matplotlib", "pydicom", "nilearn", "mlflow", "torchvision"}
    assert not {name.split(".")[0] for name in names} & heavy


def test_the_version_is_the_same_everywhere() -> None:
    assert f"version: {miar_monai.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    weights = (ROOT / "bundles" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{miar_monai.__version__}"\n' in weights
    assert f"## {miar_monai.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
