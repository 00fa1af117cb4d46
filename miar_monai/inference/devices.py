"""Choice of the device, and the device of a network."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from miar_monai.errors import ConfigurationError, SettingError

__all__ = ["choose_device", "device_of", "device_of_process", "unwrapped"]


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


def device_of_process() -> torch.device:
    """Return the GPU of this process of ``torchrun``, which no other process of the machine uses; without GPUs the CPU.

    Raises:
        ConfigurationError: if the machine has fewer GPUs than processes, as NCCL needs one for each.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= count:
        raise ConfigurationError(
            f"process {rank} of torchrun has no GPU, since {count} can be seen: give --nproc_per_node {count}, or more "
            "GPUs in CUDA_VISIBLE_DEVICES."
        )
    return torch.device("cuda", rank)


def unwrapped(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a network without a wrapper for several GPUs."""
    return getattr(network, "module", network)


def device_of(network: Callable[..., Tensor], images: Tensor) -> torch.device:
    """Return the device of a network's weights, or that of the images if it has no weights."""
    module = unwrapped(network)
    weights = module.parameters() if isinstance(module, nn.Module) else iter(())
    return next((p.device for p in weights), images.device)
