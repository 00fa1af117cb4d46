"""The command ``miar`` in the process of the tests."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from miar_monai.cli.main import main

__all__ = ["miar", "sr"]


def miar(*parts: object) -> Result:
    """Run a command, and check that it shows no traceback."""
    result = CliRunner().invoke(main, [str(part) for part in parts])
    assert "Traceback" not in result.output
    return result


def sr(bundle: Path, *parts: object) -> Result:
    """Run ``miar sr`` with a bundle on the CPU."""
    return miar("sr", "--model", bundle, "--device", "cpu", *parts)
