"""MIAR: fourfold super-resolution of MRI and CT slices by next-scale prediction, for MONAI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miar_monai.api import SuperResolver, super_resolve

__all__ = ["SuperResolver", "__version__", "super_resolve"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load PyTorch and MONAI when they are needed: ``miar info`` answers without them."""
    if name in ("SuperResolver", "super_resolve"):
        from miar_monai import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
