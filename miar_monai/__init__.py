"""MIAR: fourfold super-resolution of MRI and CT slices by next-scale prediction, for MONAI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miar_monai._version import __version__

if TYPE_CHECKING:
    from miar_monai.inference.resolver import SuperResolver, super_resolve

__all__ = ["SuperResolver", "__version__", "super_resolve"]

__path__ = [*__path__, f"{__path__[0]}/_renamed"]  # configs and code that were written before the shelves go on working


def __getattr__(name: str) -> Any:
    """Load PyTorch and MONAI when they are needed: ``miar info`` answers without them."""
    if name in ("SuperResolver", "super_resolve"):
        from miar_monai.inference import resolver

        return getattr(resolver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
