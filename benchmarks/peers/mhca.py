"""MHCA and MMHCA: EDSR with multi-head convolutional attention, for one LR slice or for those of two contrasts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from miar_monai.degradation import Degradation

__all__ = ["MHCA", "MMHCA", "ConvolutionalAttention", "edsr_tail"]


class ConvolutionalAttention(nn.Module):
    """Multi-head convolutional attention: features are multiplied by a map that sums heads of several kernel sizes.

    A head reduces and restores the size of the features by a convolution without padding and a transposed one.

    Args:
        channels: of the features.
        kernel_sizes: of the heads; the paper takes 1 and 3 for a scale of 4.
        expansion: channels inside a head, relative to ``channels``. The paper's "ratio" of 0.5 is an expansion of 2.
    """

    def __init__(self, channels: int, kernel_sizes: Sequence[int] = (1, 3), expansion: int = 2) -> None:
        super().__init__()
        inner = channels * expansion
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, inner, size), nn.ReLU(), nn.ConvTranspose2d(inner, channels, size))
            for size in kernel_sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weight features (B, C, h, w)."""
        return x * torch.sigmoid(sum(head(x) for head in self.heads))


class _ResidualBlock(nn.Module):
    """EDSR's block of two convolutions, whose residual is scaled by 0.1, optionally followed by attention."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.attention = ConvolutionalAttention(channels) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x + 0.1 * self.body(x))


class _Features(nn.Module):
    """Head and body of EDSR: images (B, 1, h, w) to features (B, C, h, w)."""

    def __init__(self, channels: int, num_blocks: int, attention: bool) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, channels, 3, padding=1)
        blocks = (_ResidualBlock(channels, attention) for _ in range(num_blocks))
        self.body = nn.Sequential(*blocks, nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x + self.body(x)


def edsr_tail(channels: int) -> nn.Sequential:
    """Return EDSR's upsampling by 4: two pixel shuffles, and a convolution to one channel."""
    shuffles = [
        layer for _ in range(2) for layer in (nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))
    ]
    return nn.Sequential(*shuffles, nn.Conv2d(channels, 1, 3, padding=1))


class MHCA(nn.Module):
    """EDSR-baseline with convolutional attention in each block and before the upsampling, for one contrast.

    Written from the paper; the released code allocates a third head of 5 × 5 that it does not use at a scale of 4.

    Args:
        channels: width.
        num_blocks: residual blocks.

    Reference:
        Georgescu et al., Multimodal Multi-Head Convolutional Attention with Various Kernel Sizes for Medical Image
        Super-Resolution, WACV 2023.

    Example:
        >>> MHCA(channels=8, num_blocks=1)(torch.rand(2, 1, 9, 7)).shape
        torch.Size([2, 1, 36, 28])
    """

    def __init__(self, channels: int = 64, num_blocks: int = 16) -> None:
        super().__init__()
        self.features = _Features(channels, num_blocks, attention=True)
        self.attention = ConvolutionalAttention(channels)
        self.tail = edsr_tail(channels)

    def forward(self, lr: Tensor) -> Tensor:
        """Return SR slices (B, 1, 4h, 4w) for LR slices (B, 1, h, w)."""
        return self.tail(self.attention(self.features(lr)))


class MMHCA(nn.Module):
    """MHCA for two contrasts: the features of two EDSR branches are concatenated before attention and upsampling.

    As in the paper, the second contrast is a low-resolution image too: the guide is degraded as the image was.

    Args:
        degradation: of the images; the guide gets it too.
        channels: width of a branch.
        num_blocks: residual blocks of a branch.

    Reference:
        As of `MHCA`, the multi-input network.

    Example:
        >>> network = MMHCA(channels=8, num_blocks=1)
        >>> network(torch.rand(2, 1, 9, 7), torch.rand(2, 1, 36, 28)).shape
        torch.Size([2, 1, 36, 28])
    """

    def __init__(self, degradation: Degradation | None = None, channels: int = 64, num_blocks: int = 16) -> None:
        super().__init__()
        self.degradation = degradation or Degradation()
        self.branches = nn.ModuleList(_Features(channels, num_blocks, attention=False) for _ in range(2))
        self.attention = ConvolutionalAttention(2 * channels)
        self.tail = edsr_tail(2 * channels)

    def forward(self, lr: Tensor, guide: Tensor) -> Tensor:
        """Return SR slices (B, 1, 4h, 4w) for LR slices (B, 1, h, w) and guides (B, 1, 4h, 4w)."""
        images = (lr, self.degradation(guide))
        features = [branch(image) for branch, image in zip(self.branches, images, strict=True)]
        return self.tail(self.attention(torch.cat(features, dim=1)))
