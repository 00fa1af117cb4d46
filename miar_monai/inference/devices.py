"""Choice of the device."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from miar_monai.errors import SettingError

__all__ = ["choose_device"]


def choose_device(name: str) -> torch.device:
    """Return the device with a name.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"mps"``. For ``"auto"`` and ``"cuda"``, the
            processes of ``torchrun`` take turns on the GPUs.

    Raises:
        SettingError: if the name is unknown, or this machine has no such device.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    available: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": lambda: (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available,
    }
    if device.type not in available:
        raise SettingError(f"there is no device {name!r}: give auto, cpu, cuda, cuda:<index> or mps.")
    if not available[device.type]():
        raise SettingError(f"the device {name!r} is not on this machine: give cpu, or auto.")
    return device
