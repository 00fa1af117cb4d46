"""MIAR: super-resolution of MRI and CT slices by next-scale prediction, for MONAI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miar_monai._version import __version__

if TYPE_CHECKING:
    from miar_monai.inference.resolver import SuperResolver, super_resolve

__all__ = ["SuperResolver", "__version__", "super_resolve"]

__path__ = [*__path__, f"{__path__[0]}/_renamed"]  # former module names stay valid


def __getattr__(name: str) -> Any:
    """Import PyTorch and MONAI only when they are needed, so that ``miar info`` is fast."""
    if name in ("SuperResolver", "super_resolve"):
        from miar_monai.inference import resolver

        return getattr(resolver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
