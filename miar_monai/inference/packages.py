"""Versions of installed packages, read without importing them."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_version", "installed_versions"]

_REPORTED = ("miar-monai", "monai", "torch", "numpy", "scipy", "nibabel", "itk")
_OTHER_NAMES = {"monai": "monai-weekly"}
"""Other distributions of the same package."""


def installed_version(package: str) -> str | None:
    """Return the version of a package, from any of its distributions, or None if it is not installed.

    Example:
        >>> installed_version("no-such-package") is None
        True
    """
    for distribution in (package, _OTHER_NAMES.get(package, package)):  # its own name first
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None


def installed_versions(packages: Iterable[str] = _REPORTED) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed.

    Example:
        >>> sorted(installed_versions(["numpy", "no-such-package"]))
        ['numpy', 'python']
    """
    found = {name: installed_version(name) for name in packages}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text is not None}}
