"""Acceleration of inference and training on a GPU, with the same results: fused layers and CUDA graphs.

The environment variable ``MIAR_ACCELERATION`` selects it: ``all`` (the default), ``graphs`` (CUDA graphs only),
``kernels`` (Triton kernels only) or ``none``. It has no effect on a CPU.
"""

from __future__ import annotations

import os

from miar_monai.errors import SettingError

__all__ = ["CHOICES", "graphs", "kernels"]

CHOICES = {"all": ("graphs", "kernels"), "graphs": ("graphs",), "kernels": ("kernels",), "none": ()}
"""Values of the switch, and what they switch on."""


def graphs() -> bool:
    """Return whether CUDA graphs are enabled."""
    return "graphs" in _enabled()


def kernels() -> bool:
    """Return whether Triton kernels are enabled."""
    return "kernels" in _enabled()


def _enabled() -> tuple[str, ...]:
    value = os.environ.get("MIAR_ACCELERATION", "all")
    if value not in CHOICES:
        raise SettingError(
            f"MIAR_ACCELERATION is {value!r}, but it must be one of {', '.join(CHOICES)}; correct or unset it."
        )
    return CHOICES[value]
