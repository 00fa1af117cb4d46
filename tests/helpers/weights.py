"""Weights of metrics, which a test needs or is skipped without."""

from __future__ import annotations

from pathlib import Path

import pytest


def need(weights_home: Path, *files: str) -> None:
    """Skip the test, saying why, if files are missing in the torch hub folder."""
    absent = [file for file in files if not (weights_home / "hub" / file).is_file()]
    if absent:
        pytest.skip(f"{weights_home}/hub lacks {absent}; set TORCH_HOME to the folder whose subfolder hub has them")
