"""Real networks, small enough to be tested by hand: odd sides, a dozen codes, a few channels, double precision."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from miar_monai.networks import MIAR, MSVQVAE, MIARTransformer
from miar_monai.networks.phi import Phi
from miar_monai.networks.quantizer import MultiScaleQuantizer

Network = TypeVar("Network", bound=nn.Module)

SCALES = (1, 2, 3, 5)
CODES, CHANNELS, CONTEXT = 12, 6, 5
TOKENIZER: dict[str, Any] = {
    "scales": SCALES,
    "channels": (8, 8, 16),
    "num_res_blocks": 1,
    "latent_channels": CHANNELS,
    "num_codes": CODES,
}


def tiny_quantizer(**options: Any) -> MultiScaleQuantizer:
    return started(MultiScaleQuantizer(SCALES, CODES, CHANNELS, **options)).double()


def tiny_transformer(scales: tuple[int, ...] = SCALES, **options: Any) -> MIARTransformer:
    transformer = MIARTransformer(scales, CODES, CHANNELS, CONTEXT, dim=16, depth=2, num_heads=2, **options).double()
    return spread(transformer).eval()


def spread(transformer: MIARTransformer) -> MIARTransformer:
    """Undo the nearly uniform first prediction, so that codes differ clearly in probability."""
    transformer.head.weight.data.mul_(100)
    return transformer


def started(network: Network) -> Network:
    """Let what starts as zero or as the identity say something, as after training; return the network itself."""
    for part in network.modules():
        if isinstance(part, Phi):
            part.conv.reset_parameters()
        elif isinstance(part, nn.Conv2d) and not part.weight.any():
            nn.init.normal_(part.weight, std=0.1)
    return network


def tiny_tokenizer(**options: Any) -> MSVQVAE:
    """Take images of side 40."""
    return MSVQVAE(**TOKENIZER | options)


def tiny_miar(**options: Any) -> MIAR:
    """Map 10 x 10 to 40 x 40."""
    light = {"context_channels": CONTEXT, "lr_channels": (8, 16), "lr_blocks": 1}
    return MIAR(**TOKENIZER | light | {"dim": 16, "depth": 2, "num_heads": 2} | options)


def tiny_slices(count: int = 4, side: int = 40) -> Tensor:
    """Return smooth blobs that differ from slice to slice, (count, 1, side, side), float32 in [0, 1]."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    blobs = []
    for i in range(count):
        body = ((x + 0.1 * i) ** 2 / 0.7 + (y - 0.1 * i) ** 2 / 0.4 < 1).float()
        blobs.append(body * (0.6 + 0.3 * torch.sin((5 + i) * x) * torch.cos((7 - i) * y)))
    return torch.stack(blobs)[:, None]
