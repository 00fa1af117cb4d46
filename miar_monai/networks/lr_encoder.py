"""Encoders of the LR image: context for the transformer and a skip for the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.acceleration.layers import NormSiLU
from miar_monai.errors import ConfigurationError
from miar_monai.networks.autoencoder import Encoder, ResidualBlock, middle, zero_conv

__all__ = ["LightLREncoder", "TokenizerLREncoder", "level_of_patches"]


def level_of_patches(size: int, patch_size: int, num_levels: int) -> int:
    """Return the level of an encoder or a decoder (0 is the finest) with patches of a given size.

    Raises:
        ConfigurationError: if there is no such level.
    """
    level = (size // patch_size).bit_length() - 1
    if level < 0 or patch_size * 2**level != size:
        raise ConfigurationError(
            f"lr_patch_size is {size}, but it must be patch_size ({patch_size}) times a power of two; correct the"
            " settings."
        )
    if level >= num_levels:
        raise ConfigurationError(
            f"lr_patch_size is {size}, but it can be {patch_size * 2 ** (num_levels - 1)} at most with {num_levels}"
            " levels of channels; add levels or reduce lr_patch_size."
        )
    return level


class TokenizerLREncoder(nn.Module):
    """The tokenizer's encoder, applied to the linear estimate (in paper Sec. 3.2 to the upsampled LR image).

    Args:
        encoder: the tokenizer's encoder ("shared") or a copy of it ("initialized").
        skip_level: level of the encoder (0 is the finest) whose features are the skip.

    Example:
        >>> encoder = TokenizerLREncoder(Encoder(1, 8, channels=(8, 16, 16), num_res_blocks=1), skip_level=1)
        >>> [tuple(x.shape) for x in encoder(torch.zeros(1, 1, 32, 32), torch.zeros(1, 2, 1, 1))]
        [(1, 8, 4, 4), (1, 16, 8, 8)]
    """

    def __init__(self, encoder: Encoder, skip_level: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        self.skip_level = skip_level
        self.skip_channels = encoder.channels[skip_level]

    def forward(self, linear: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Map linear estimates (B, 1, H, W) to f_LR on the latent grid and the skip on the grid of its level.

        The condition (B, 2, 1, 1) is ignored: only `LightLREncoder` has an input for it.
        """
        maps = self.encoder.features(linear)
        return self.encoder.latent(linear, maps[-1]), maps[self.skip_level]


class PlainBlock(nn.Module):
    """Two convolutions with a shortcut and without normalization (EDSR); the second is initialized to zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zero_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class LightLREncoder(nn.Module):
    """A residual network on patches of the linear estimate, with a tenth of the operations of `TokenizerLREncoder`.

    Args:
        context_channels: channels of ``f_lr``.
        channels: width on the grid of the patches and on the latent grid, which is coarser by 2.
        num_blocks: residual blocks on the grid of the patches.
        patch_size: side of the pixel patches that are the input channels.

    Example:
        >>> encoder = LightLREncoder(8, channels=(8, 16), num_blocks=1)
        >>> [tuple(x.shape) for x in encoder(torch.zeros(1, 1, 32, 32), torch.zeros(1, 2, 1, 1))]
        [(1, 8, 4, 4), (1, 8, 8, 8)]
    """

    def __init__(
        self,
        context_channels: int = 32,
        channels: Sequence[int] = (128, 192),
        num_blocks: int = 12,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        self.skip_channels = channels[0]
        self.to_patches = nn.PixelUnshuffle(patch_size)
        self.conv_in = nn.Conv2d(patch_size**2 + 2, channels[0], 3, padding=1)
        self.body = nn.Sequential(*(PlainBlock(channels[0]) for _ in range(num_blocks)))
        self.down = nn.Conv2d(channels[0], channels[1], 3, stride=2, padding=1)
        self.middle = nn.Sequential(ResidualBlock(channels[1], channels[1]), middle(channels[1]))
        self.norm_out = NormSiLU(channels[1])
        self.conv_out = nn.Conv2d(channels[1], context_channels, 3, padding=1)
        # the native layout of convolutions on a GPU, without which each one transposes its data twice
        self.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs

    def forward(self, linear: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Map linear estimates to f_LR on the latent grid and the skip on the grid of the patches.

        Args:
            linear: (B, 1, H, W).
            condition: (B, 2, 1, 1); see `Observation`.

        Returns:
            (B, context_channels, G, G) and (B, channels[0], H / patch_size, W / patch_size).
        """
        patches = self.to_patches(linear)  # (B, patch_size², h, w)
        x = torch.cat([patches, condition.to(patches).expand(-1, -1, *patches.shape[2:])], dim=1)
        x = self.conv_in(x).contiguous(memory_format=torch.channels_last)
        skip = self.body(x)  # (B, channels[0], h, w)
        f_lr = self.conv_out(self.norm_out(self.middle(self.down(skip))))  # (B, context_channels, G, G)
        return f_lr, skip
