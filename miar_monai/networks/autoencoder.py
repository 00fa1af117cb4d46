"""Convolutional encoder and decoder of the latent grid: the VQ network of LDM and VAR, with f = 8.

The finest level works on patches of 2 × 2 pixels as channels: at full resolution, normalization and activation would
take longer than the convolutions, and sub-pixel convolutions lose no information (ESPCN, EDSR).

Both networks have a fixed linear shortcut, as in DC-AE: the lowest frequencies of the cosine transform of f × f
patches, and its transpose. The shortcut alone is a lossy codec; the convolutions learn the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.fft import idct
from torch import Tensor, nn

from miar_monai.acceleration.layers import NormByEight, NormSiLU

__all__ = ["AttentionBlock", "CosineEncoder", "Decoder", "Encoder", "ResidualBlock", "cosine_patches"]


def cosine_patches(count: int, side: int) -> Tensor:
    """Return the ``count`` lowest frequencies of the orthonormal two-dimensional cosine transform (DCT-II) as patches.

    Args:
        count: number of patches; those beyond ``side²`` are zero.
        side: side of the patches.

    Returns:
        (count, side, side), float32, in order of increasing frequency; the first is constant.

    Example:
        >>> cosine_patches(3, 2)[0]
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    basis = torch.from_numpy(idct(torch.eye(side, dtype=torch.float64).numpy(), norm="ortho", axis=1))  # (side, side)
    patches = torch.einsum("ui,vj->uvij", basis, basis).flatten(0, 1)
    frequency = torch.cartesian_prod(torch.arange(side), torch.arange(side)).square().sum(dim=1)
    ordered = patches[frequency.argsort(stable=True)][:count].float()
    return torch.cat([ordered, ordered.new_zeros(count - len(ordered), side, side)])


def patch_gain(side: int) -> float:
    """Return the factor that scales the cosine transform of images in [0, 1] to a standard deviation of about 1."""
    return 4 / side


class ResidualBlock(nn.Module):
    """Two norm-SiLU-conv layers with a shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; if they differ, the shortcut is a 1 × 1 convolution.

    Example:
        >>> import torch
        >>> ResidualBlock(8, 16)(torch.zeros(1, 8, 5, 3)).shape
        torch.Size([1, 16, 5, 3])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map, with a shortcut.

    Example:
        >>> import torch
        >>> AttentionBlock(8)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = NormByEight(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, dim=-1)  # (B, 1, H * W, C)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H * W, C)
        return x + self.out(h.squeeze(1).mT.reshape(x.shape))


def middle(channels: int) -> nn.Sequential:
    """Return the block on the latent grid: residual, attention, residual."""
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


class CosineEncoder(nn.Module):
    """Fixed encoder: the lowest frequencies of the cosine transform of f × f patches.

    Args:
        in_channels: channels of the image, whose average is encoded.
        latent_channels: C, channels of the latent grid.
        stride: f.

    Example:
        >>> CosineEncoder(1, 4, stride=8)(torch.zeros(1, 1, 32, 32)).shape
        torch.Size([1, 4, 4, 4])
    """

    patches: Tensor

    def __init__(self, in_channels: int = 1, latent_channels: int = 32, stride: int = 8) -> None:
        super().__init__()
        patches = patch_gain(stride) * cosine_patches(latent_channels, stride)[:, None] / in_channels
        self.register_buffer("patches", patches.repeat(1, in_channels, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to latents (B, C, H / f, W / f)."""
        return F.conv2d(x, self.patches, stride=self.patches.shape[-1])


class Encoder(nn.Module):
    """Encoder from images to the latent grid: patches as channels, then downsampling by 2 at each level but the first.

    Args:
        in_channels: channels of the image.
        latent_channels: C, channels of the latent grid.
        channels: width of each level, fine to coarse.
        num_res_blocks: residual blocks per level.
        patch_size: side of the patches; the stride of the latent grid is f = patch_size · 2^(levels - 1).

    Reference:
        Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022; Chen et al., Deep
        Compression Autoencoder, 2024 (shortcut).

    Example:
        >>> import torch
        >>> encoder = Encoder(1, 4, channels=(8, 8, 16), num_res_blocks=1)
        >>> encoder(torch.zeros(1, 1, 32, 32)).shape
        torch.Size([1, 4, 4, 4])
        >>> [tuple(h.shape[1:]) for h in encoder.features(torch.zeros(1, 1, 32, 32))]
        [(8, 16, 16), (8, 8, 8), (16, 4, 4)]
    """

    def __init__(
        self,
        in_channels: int = 1,
        latent_channels: int = 32,
        channels: Sequence[int] = (64, 128, 256),
        num_res_blocks: int = 2,
        patch_size: int = 2,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.to_patches = nn.PixelUnshuffle(patch_size)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels[0], 3, padding=1)
        self.levels = nn.ModuleList()
        width = channels[0]
        for level, level_channels in enumerate(channels):
            blocks: list[nn.Module] = []
            if level > 0:
                blocks.append(nn.Conv2d(width, level_channels, 3, stride=2, padding=1))
                width = level_channels
            for _ in range(num_res_blocks):
                blocks.append(ResidualBlock(width, level_channels))
                width = level_channels
            self.levels.append(nn.Sequential(*blocks))
        self.middle = middle(width)
        self.norm_out = NormSiLU(width)
        self.conv_out = zero_conv(width, latent_channels)
        self.shortcut = CosineEncoder(in_channels, latent_channels, patch_size * 2 ** (len(channels) - 1))

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the feature map of each level, fine to coarse: (B, channels[i], H / (patch_size · 2^i), …)."""
        maps = []
        h = self.conv_in(self.to_patches(x))  # (B, channels[0], H / patch_size, W / patch_size)
        for level in self.levels:
            h = level(h)
            maps.append(h)
        return maps

    def latent(self, x: Tensor, coarsest: Tensor) -> Tensor:
        """Return the latent grid of images (B, in_channels, H, W) and their coarsest features."""
        return self.shortcut(x) + self.conv_out(self.norm_out(self.middle(coarsest)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to latents (B, C, H / f, W / f)."""
        return self.latent(x, self.features(x)[-1])


class Decoder(nn.Module):
    """Decoder from the latent grid to images, optionally with skips from the LR image.

    A skip is added to its level through a convolution initialized to zero, so adding skips to a trained decoder does
    not change its output at first.

    Args:
        out_channels: channels of the image.
        latent_channels: C, channels of the latent grid.
        channels: width of each level, fine to coarse, as for the encoder.
        num_res_blocks: residual blocks per level.
        patch_size: side of the pixel patches of the finest level.
        skip_channels: channels of the skip of each level, fine to coarse; 0 for none.

    Example:
        >>> import torch
        >>> decoder = Decoder(1, 4, channels=(8, 8, 16), num_res_blocks=1, skip_channels=(1, 0, 0))
        >>> decoder(torch.zeros(1, 4, 4, 4), {0: torch.zeros(1, 1, 16, 16)}).shape
        torch.Size([1, 1, 32, 32])
    """

    patches: Tensor

    def __init__(
        self,
        out_channels: int = 1,
        latent_channels: int = 32,
        channels: Sequence[int] = (64, 128, 256),
        num_res_blocks: int = 2,
        patch_size: int = 2,
        skip_channels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        width = channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.middle = middle(width)
        self.upsamplers, self.levels = nn.ModuleList([nn.Identity()]), nn.ModuleList()  # coarse to fine
        for level_channels in reversed(channels):
            if self.levels:
                self.upsamplers.append(
                    nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(width, level_channels, 3, padding=1))
                )
            width = level_channels
            self.levels.append(nn.Sequential(*(ResidualBlock(width, width) for _ in range(num_res_blocks))))
        self.skips = nn.ModuleDict()
        for level, level_skip in enumerate(skip_channels):
            if level_skip > 0:
                self.skips[str(level)] = zero_conv(level_skip, channels[level])
        self.norm_out = NormSiLU(width)
        self.conv_out = zero_conv(width, out_channels * patch_size**2)
        self.to_pixels = nn.PixelShuffle(patch_size)
        self.stride = patch_size * 2 ** (len(channels) - 1)
        patches = cosine_patches(latent_channels, self.stride)[:, None] / patch_gain(self.stride)
        self.register_buffer("patches", patches, persistent=False)
        self.gain = nn.Parameter(torch.ones(latent_channels, out_channels))  # of the shortcut

    def forward(self, f: Tensor, skips: dict[int, Tensor] | None = None) -> Tensor:
        """Map latents (B, C, H / f, W / f) to images (B, out_channels, H, W).

        Args:
            f: latents.
            skips: features for each level i with a skip (0 is the finest), (B, skip_channels[i], h_i, w_i) with
                h_i = H / (patch_size · 2^i).
        """
        h = self.middle(self.conv_in(f))
        finest_last = reversed(range(len(self.levels)))
        for level, upsample, blocks in zip(finest_last, self.upsamplers, self.levels, strict=True):
            h = upsample(h)  # (B, channels[level], h_level, w_level)
            if skips is not None and level in skips:
                h = h + self.skips[str(level)](skips[level])
            h = blocks(h)
        patches = self.gain[:, :, None, None] * self.patches  # (C, out_channels, f, f)
        transformed = F.conv_transpose2d(f, patches, stride=self.stride)  # (B, out_channels, H, W)
        return transformed + self.to_pixels(self.conv_out(self.norm_out(h)))


def zero_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3 × 3 convolution initialized to zero."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
