"""The documentation builds without a warning, holds every module, and needs neither network nor this machine."""

from __future__ import annotations

import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import miar_monai

for package in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(package, reason="the documentation needs the extra docs")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def build(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build as `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", str(docs), str(site)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    docs, site = tmp_path / "docs", tmp_path / "site"
    # a copy, since the pages of the reference are written next to the sources
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("_build", "generated"))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks", "bundles"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = build(docs, site)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    found = pkgutil.walk_packages(miar_monai.__path__[:1], "miar_monai.", onerror=lambda _: None)
    left_out = ("__main__", "_renamed", "_version", "monailabel_app")
    modules = [module.name for module in found if not any(name in module.name for name in left_out)]
    assert len(modules) > 50
    pages = site / "reference" / "generated"
    assert [name for name in modules if not (pages / f"{name}.html").is_file()] == []

    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert f"MIAR for MONAI {miar_monai.__version__}" in texts[site / "index.html"]
    for place in (ROOT, tmp_path, Path.home()):
        assert [path.name for path, text in texts.items() if f"{place}/" in text] == []


def test_a_name_that_does_not_exist_fails_the_build(tmp_path: Path) -> None:
    wrong = {"miar_monai.SuperResolver.no_such_method", "miar_monai.no_such_module", "unheard_of", "torch.no_such_name"}
    right = {"dict", "torch.Tensor", "miar_monai.SuperResolver", "miar_monai.data.io.read_volume"}
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copytree(ROOT / "docs" / "_templates", docs / "_templates")
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    (docs / "index.md").write_text("# Title\n\n" + "\n".join(f"{{py:obj}}`{name}`" for name in sorted(wrong | right)))
    done = build(docs, tmp_path / "site")
    assert done.returncode != 0
    assert set(re.findall(r"reference target not found: (\S+)", done.stderr)) == wrong
