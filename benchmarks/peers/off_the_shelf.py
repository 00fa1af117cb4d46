"""Networks for photographs as their authors trained them: what a user would pick off the shelf."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from miar_monai.errors import CheckpointError, ConfigurationError

__all__ = ["FILES", "GrayImages", "load_off_the_shelf", "read_ncnn"]

FILES = {
    "DAT_light_x4.pth": "DAT-light, zero-shot",
    "realesrgan-x4plus.bin": "Real-ESRGAN, zero-shot",
    "RealESRGAN_x4plus.pth": "Real-ESRGAN, zero-shot",
}
"""File names of the weights as their packages have them, with the titles of the rows."""

_HALF_PRECISION = 0x01306B47
"""What ncnn writes before weights in half precision."""


class GrayImages(nn.Module):
    """A network for three channels, applied to gray images: three equal channels in, their mean out.

    Args:
        network: maps (B, 3, h, w) to (B, 3, H, W), in [0, 1].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, lr: Tensor) -> Tensor:
        """Return SR slices (B, 1, H, W) for LR slices (B, 1, h, w)."""
        return self.network(lr.expand(-1, 3, -1, -1)).mean(dim=1, keepdim=True)


def read_ncnn(path: str | Path, network: nn.Module) -> nn.Module:
    """Load the convolutions of a network, in the order of their definition, from an ncnn file in half precision.

    Args:
        path: the file: for each convolution a tag, half-precision weights padded to four bytes, and float32 biases.
        network: its convolutions have biases.

    Returns:
        ``network``.

    Raises:
        CheckpointError: if the file does not end where the last convolution does, or has other tags.
    """
    content, start = Path(path).read_bytes(), 0
    try:
        for layer in (layer for layer in network.modules() if isinstance(layer, nn.Conv2d)):
            if int.from_bytes(content[start : start + 4], "little") != _HALF_PRECISION:
                raise ValueError("a tag")
            count = layer.weight.numel()
            weight = np.frombuffer(content, "<f2", count, start + 4)
            start += 4 + 2 * (count + count % 2)
            bias = np.frombuffer(content, "<f4", layer.out_channels, start)
            start += 4 * layer.out_channels
            with torch.no_grad():
                layer.weight.copy_(torch.tensor(weight.astype(np.float32)).view_as(layer.weight))
                assert layer.bias is not None
                layer.bias.copy_(torch.tensor(bias.astype(np.float32)))
        if start != len(content):
            raise ValueError(f"{len(content) - start} bytes more")
    except ValueError as error:
        raise CheckpointError(
            f"{path} does not have the convolutions of this network ({error}): an ncnn file in half precision is "
            "needed; get it again."
        ) from error
    return network


def _load(path: Path) -> nn.Module:
    """Return a network in evaluation mode."""
    from spandrel import ModelLoader
    from spandrel.architectures.ESRGAN import ESRGAN

    if path.suffix == ".bin":
        return GrayImages(read_ncnn(path, ESRGAN(num_filters=64, num_blocks=23, scale=4))).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid")  # spandrel uses a deprecated call
        return GrayImages(ModelLoader(device="cpu").load_from_file(path).model).eval()


def load_off_the_shelf(folder: str | None) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the networks whose weights are in a folder by the titles of their rows, and a sentence for each other.

    Args:
        folder: with some of `FILES`.

    Raises:
        ConfigurationError: if ``folder`` is not a folder.
        CheckpointError: if a file is damaged.
    """
    if folder is None:
        return {}, []
    if not Path(folder).is_dir():
        raise ConfigurationError(f"{folder} is not a folder: that of weights for photographs is needed.")
    loaded = {title: _load(Path(folder, name)) for name, title in FILES.items() if Path(folder, name).is_file()}
    absent = dict.fromkeys(title for title in FILES.values() if title not in loaded)
    names = {title: " or ".join(name for name, one in FILES.items() if one == title) for title in absent}
    return loaded, [f"{title} is left out: {name} not found in --off_the_shelf." for title, name in names.items()]
