"""Checks of the installation: each one uses what it checks, and returns a line about it or raises an error."""

from __future__ import annotations

import os
import re
from importlib.metadata import requires

from miar_monai.errors import CheckpointError, ConfigurationError
from miar_monai.inference.bundle import metadata, weights_sha256
from miar_monai.inference.packages import installed_version

__all__ = ["check_device", "check_packages", "check_weights", "devices"]


def check_packages() -> str:
    """Return the versions of the packages that MIAR needs.

    Raises:
        ConfigurationError: if one of them is not installed.
    """
    needed = [text for text in requires("miar-monai") or [] if "extra ==" not in text]
    versions = {name: installed_version(name) for name in (re.split(r"[^\w.-]", text)[0] for text in needed)}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)} not installed: install them with pip install miar-monai.")
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def devices() -> list[str]:
    """Return the devices of this machine that PyTorch can use."""
    import torch

    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def check_device(name: str) -> str:
    """Run a convolution on a device and return a description of the device.

    Raises:
        SettingError: if there is no such device.
        ConfigurationError: if the result is wrong.
    """
    import torch

    from miar_monai.inference.devices import choose_device

    device = choose_device(name)
    ones = torch.ones(1, 1, 5, 5, device=device)
    if not torch.equal(torch.nn.functional.conv2d(ones, ones[..., :3, :3]).cpu(), torch.full((1, 1, 3, 3), 9.0)):
        raise ConfigurationError(f"a convolution on {name} gives a wrong result: reinstall PyTorch for this device.")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"


def check_weights(model: str) -> str:
    """Return path and SHA-256 of the weights of a model.

    Raises:
        SettingError: if there is no such bundle.
        CheckpointError: if the weights are missing, do not fit the network or are not finite, or if their SHA-256
            differs from ``weights_sha256`` in the bundle's ``metadata.json`` (checked where it has this key).
    """
    import torch

    from miar_monai.inference.resolver import SuperResolver

    resolver = SuperResolver(model, "cpu")
    for name, value in resolver.network.state_dict().items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{resolver.weights}: {name} is not finite; get the weights again.")
    actual, expected = weights_sha256(resolver.weights), metadata(resolver.bundle).get("weights_sha256")
    if expected not in (None, actual):
        raise CheckpointError(
            f"{resolver.weights} has the SHA-256 {actual}, but the bundle's metadata.json names {expected}: get the "
            "weights again, or write the new hash there if you trained them."
        )
    return f"{resolver.weights} sha256 {actual}"
