from __future__ import annotations

import sys
from pathlib import Path

import pytest

from miar_monai.inference.packages import installed_version, installed_versions


@pytest.mark.parametrize("distribution", ["monai", "monai-weekly"])
def test_each_distribution_of_a_package_is_found(
    distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_version("monai") is None
    about = tmp_path / f"{distribution.replace('-', '_')}-1.7.dev1.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.7.dev1\n")
    assert installed_version("monai") == "1.7.dev1"
    assert set(installed_versions()) == {"python", "monai"}


def test_the_release_is_reported_if_both_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name, version in {"monai": "1.6", "monai-weekly": "1.7.dev1"}.items():
        about = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert installed_version("monai") == "1.6"
