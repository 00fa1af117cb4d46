"""Does this installation work? Each check uses what it checks, and returns a line about it or raises an error."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, requires, version

from miar_monai.errors import CheckpointError, ConfigurationError
from miar_monai.inference.bundle import metadata, weights_sha256

__all__ = ["check_device", "check_packages", "check_weights", "devices", "installed"]


def installed(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed; nothing is imported.

    Example:
        >>> installed("no-such-package") is None
        True
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_packages() -> str:
    """Return the versions of the packages that MIAR needs.

    Raises:
        ConfigurationError: if one is not installed.
    """
    needed = [text for text in requires("miar-monai") or [] if "extra ==" not in text]
    versions = {name: installed(name) for name in (re.split(r"[^\w.-]", text)[0] for text in needed)}
    missing = [name for name, found in versions.items() if found is None]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)} not installed: install them with pip install miar-monai.")
    return ", ".join(f"{name} {found}" for name, found in versions.items())


def devices() -> list[str]:
    """Return the devices of this machine that PyTorch can use."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def check_device(name: str) -> str:
    """Return what a device is, after a convolution on it.

    Raises:
        ConfigurationError: if there is no such device, or its result is wrong.
    """
    import torch

    from miar_monai.inference.resolver import choose_device

    device = choose_device(name)
    ones = torch.ones(1, 1, 5, 5, device=device)
    if not torch.equal(torch.nn.functional.conv2d(ones, ones[..., :3, :3]).cpu(), torch.full((1, 1, 3, 3), 9.0)):
        raise ConfigurationError(f"a convolution on {name} gives a wrong result: reinstall PyTorch for this device.")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"


def check_weights(model: str) -> str:
    """Return path and SHA-256 of a model's weights.

    Raises:
        ConfigurationError: if there is no such bundle.
        CheckpointError: if the weights are missing, do not fit the network, are not finite, or have another SHA-256
            than ``weights_sha256`` in the bundle's ``metadata.json``, where it has this key.
    """
    import torch

    from miar_monai.inference.resolver import SuperResolver

    resolver = SuperResolver(model, "cpu")
    for name, value in resolver.network.state_dict().items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{resolver.weights}: {name} is not finite; get the weights again.")
    found, wanted = weights_sha256(resolver.bundle), metadata(resolver.bundle).get("weights_sha256")
    if wanted not in (None, found):
        raise CheckpointError(
            f"{resolver.weights} has the SHA-256 {found}, but the bundle's metadata.json names {wanted}: get the "
            "weights again, or write the new hash there if you trained them."
        )
    return f"{resolver.weights} sha256 {found}"
