"""Acceleration of inference and training on a GPU, without a change of the results: fused layers and CUDA graphs.

One switch, the environment variable ``MIAR_ACCELERATION``: ``all`` (the default), ``graphs`` (CUDA graphs alone),
``kernels`` (Triton kernels alone) or ``none``. On a CPU it has no effect.
"""

from __future__ import annotations

import os

from miar_monai.errors import SettingError

__all__ = ["CHOICES", "graphs", "kernels"]

CHOICES = {"all": ("graphs", "kernels"), "graphs": ("graphs",), "kernels": ("kernels",), "none": ()}
"""Values of the switch, and what they switch on."""


def graphs() -> bool:
    """Return whether CUDA graphs are switched on."""
    return "graphs" in _chosen()


def kernels() -> bool:
    """Return whether Triton kernels are switched on."""
    return "kernels" in _chosen()


def _chosen() -> tuple[str, ...]:
    value = os.environ.get("MIAR_ACCELERATION", "all")
    if value not in CHOICES:
        raise SettingError(
            f"MIAR_ACCELERATION is {value!r}, but it must be one of {', '.join(CHOICES)}; correct or unset it."
        )
    return CHOICES[value]
