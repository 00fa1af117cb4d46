"""The architecture: imports run one way, as the documentation shows it, and files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "miar_monai"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.parent.name != "_renamed"}


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of the project that a module imports, at whatever level of its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


GRAPH = {name: {found for found in imports(path) if found in MODULES} for name, path in MODULES.items()}


def package(module: str) -> str:
    return [*module.split("."), ""][1]


def documented() -> dict[str, set[str]]:
    """Return the imports of each package, from the table in the documentation."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Packages")[2]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", used)) for name, used in rows}


def test_packages_import_what_the_documentation_says() -> None:
    found: dict[str, set[str]] = {name: set() for name in documented()}
    for module, used in GRAPH.items():
        if package(module) in found:
            found[package(module)] |= {package(name) for name in used} - {package(module), "", "_version"}
    assert found == documented()


def test_packages_and_modules_form_layers() -> None:
    list(TopologicalSorter(documented()).static_order())  # raises CycleError
    list(TopologicalSorter(GRAPH).static_order())


def test_the_picture_shows_every_package_below_those_that_import_it() -> None:
    picture = (ROOT / "docs" / "images" / "packages.svg").read_text(encoding="utf-8")
    heights = {
        name: int(y) for y, name in re.findall(r'y="(\d+)" text-anchor="middle" font-weight="bold">(\w+)<', picture)
    }
    assert set(heights) == set(documented())
    for name, used in documented().items():
        assert all(heights[name] < heights[other] for other in used)


def test_the_package_does_not_depend_on_benchmarks_or_tests() -> None:
    for name, path in MODULES.items():
        assert not {"benchmarks", "tests"} & {found.split(".")[0] for found in imports(path)}, name
        assert "benchmarks." not in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("path", MODULES.values(), ids=module_name)
def test_files_have_about_300_lines_at_most(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_former_names_are_those_of_public_names() -> None:
    import importlib

    for path in sorted((PACKAGE / "_renamed").glob("[a-z]*.py")):
        former = importlib.import_module(f"miar_monai.{path.stem}")
        public = [name for name in vars(former) if not name.startswith("_")]
        assert public, path
    for target in (
        "inferers.BeamSearchInferer", "datasets.brats_datalist", "checkpoints.load_weights", "losses.MIARObjective",
        "uncertainty.ErrorModel", "io.read_volume", "decoding.Decoding", "handlers.CaseReporter", "bundles.find_bundle",
    ):  # fmt: skip
        module, _, name = target.partition(".")
        assert hasattr(importlib.import_module(f"miar_monai.{module}"), name), target
