"""Reading and writing of weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from miar_monai.data.atomic_write import atomic_file
from miar_monai.errors import CheckpointError

__all__ = ["first_line", "load_weights", "save_weights"]


def save_weights(network: nn.Module, path: str | Path, half: bool = True) -> None:
    """Write the state dict of a network atomically.

    Args:
        network: the network, possibly wrapped for several GPUs.
        path: file to write; its folder is created if necessary.
        half: write parameters in half precision. Buffers keep their precision: sums of the codebook would overflow.

    Raises:
        OutputError: if the file cannot be written.
    """
    path, network = Path(path), getattr(network, "module", network)
    parameters = {name for name, _ in network.named_parameters()}
    state = {
        name: (value.half() if half and name in parameters else value).cpu()
        for name, value in network.state_dict().items()
    }
    with atomic_file(path, overwrite=True) as part:
        torch.save(state, part)


def load_weights(network: nn.Module, path: str | Path, hint: str) -> nn.Module:
    """Load a state dict into a network and return the network.

    Args:
        network: receives the weights.
        path: file written by `save_weights`.
        hint: advice to the user if the weights cannot be loaded.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there are no weights at {path}; {hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({first_line(error)}); {hint}") from error
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} belongs to another network ({first_line(error)}); use the configuration it was made with, or"
            f" {hint}"
        ) from error
    return network


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(":")
