"""DiffMSR: a transformer with large windows, guided by another contrast and by a prior that is diffused in 4 steps."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.mhca import edsr_tail
from benchmarks.peers.noise import equal_noise

__all__ = ["DiffMSR", "PriorDenoiser", "PriorEncoder"]

PRIOR = 256
"""Size of the prior vector."""


class PriorEncoder(nn.Module):
    """Summarize images on the LR grid, (B, C, h, w), in a vector (B, `PRIOR`).

    Args:
        in_channels: C.
        channels: width.
        num_blocks: residual blocks.
    """

    def __init__(self, in_channels: int, channels: int = 64, num_blocks: int = 9) -> None:
        super().__init__()
        self.head = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.LeakyReLU(0.1),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(num_blocks)
        )
        widths = (channels, 2 * channels, 2 * channels, PRIOR)
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.tail = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.LeakyReLU(0.1))))
        self.mlp = nn.Sequential(nn.Linear(PRIOR, PRIOR), nn.LeakyReLU(0.1), nn.Linear(PRIOR, PRIOR), nn.LeakyReLU(0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the vectors."""
        x = F.leaky_relu(self.head(x), 0.1)
        for block in self.blocks:
            x = x + block(x)
        return self.mlp(self.tail(x).mean(dim=(2, 3)))


class PriorDenoiser(nn.Module):
    """Diffuse a prior in few steps: the reverse process, without noise, from a noisy prior and a condition.

    Args:
        steps: T, as in the paper.
        beta: noise of the first and of the last step; its square root is linear in the step.
    """

    def __init__(self, steps: int = 4, beta: tuple[float, float] = (0.1, 0.99)) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(2 * PRIOR + 1, PRIOR), nn.LeakyReLU(0.1), nn.Linear(PRIOR, PRIOR), nn.LeakyReLU(0.1)
        )
        self.beta = (torch.linspace(beta[0] ** 0.5, beta[1] ** 0.5, steps) ** 2).tolist()
        self.cumulative = [math.prod(1 - b for b in self.beta[: t + 1]) for t in range(steps)]

    def noisy(self, prior: Tensor) -> Tensor:
        """Return a prior (B, `PRIOR`) after all steps of the forward process."""
        signal = self.cumulative[-1]
        return signal**0.5 * prior + (1 - signal) ** 0.5 * torch.randn_like(prior)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the prior at the end of the reverse process: each step takes the mean of the posterior.

        Args:
            x: noisy prior, (B, `PRIOR`).
            condition: (B, `PRIOR`).
        """
        for t in reversed(range(len(self.beta))):
            time = torch.full_like(x[:, :1], t / len(self.beta))
            prior = self.network(torch.cat([condition, time, x], dim=1))
            now, before = self.cumulative[t], self.cumulative[t - 1] if t else 1.0
            of_prior = before**0.5 * self.beta[t] / (1 - now)
            of_x = (1 - self.beta[t]) ** 0.5 * (1 - before) / (1 - now)
            x = of_prior * prior + of_x * x
        return x


def windows(x: Tensor, side: int) -> Tensor:
    """Cut features (B, C, h, w) into windows of rows and columns, (B · n, side², C); h and w are multiples of ``side``.

    Example:
        >>> x = torch.rand(2, 3, 8, 12)
        >>> torch.equal(from_windows(windows(x, 4), 4, x.shape), x)
        True
    """
    b, c, h, w = x.shape
    tiles = x.view(b, c, h // side, side, w // side, side).permute(0, 2, 4, 3, 5, 1)
    return tiles.reshape(-1, side * side, c)


def from_windows(x: Tensor, side: int, shape: torch.Size) -> Tensor:
    """Return the features (B, C, h, w) of ``shape`` that `windows` has cut."""
    b, c, h, w = shape
    tiles = x.view(b, h // side, w // side, side, side, c).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(b, c, h, w)


class _PermutedAttention(nn.Module):
    """SRFormer's attention in large windows: keys and values have a quarter of the channels and of the positions.

    A block of 2 × 2 positions of a window becomes one key with its channels one after the other.

    Args:
        channels: C.
        side: of a window.
        num_heads: of the attention.
    """

    positions: Tensor

    def __init__(self, channels: int, side: int, num_heads: int) -> None:
        super().__init__()
        self.side, self.num_heads = side, num_heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * (channels // 4))
        self.out = nn.Linear(channels, channels)
        half = side // 2
        self.bias = nn.Parameter(0.02 * torch.randn((2 * half - 1) ** 2, num_heads))
        keys = torch.cartesian_prod(torch.arange(half), torch.arange(half))
        queries = torch.cartesian_prod(torch.arange(side), torch.arange(side)) // 2
        offset = queries[:, None] - keys + half - 1  # (side², half², 2)
        self.register_buffer("positions", offset[..., 0] * (2 * half - 1) + offset[..., 1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return attended features (B, C, h, w)."""
        shape, heads = x.shape, self.num_heads
        tokens = windows(x, self.side)  # (N, side², C)
        n, length, channels = tokens.shape
        half = self.side // 2
        folded = self.key_value(tokens).view(n, half, 2, half, 2, 2, channels // 4).permute(5, 0, 1, 3, 2, 4, 6)
        key, value = folded.reshape(2, n, half * half, heads, -1).transpose(2, 3)
        query = self.query(tokens).view(n, length, heads, -1).transpose(1, 2)
        bias = self.bias[self.positions].permute(2, 0, 1).to(query)  # (heads, side², half²)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return from_windows(self.out(attended.transpose(1, 2).reshape(n, length, channels)), self.side, shape)


class _CrossAttention(nn.Module):
    """Attention in windows: queries of one image, keys and values of another on the same grid."""

    def __init__(self, channels: int, side: int, num_heads: int) -> None:
        super().__init__()
        self.side, self.num_heads = side, num_heads
        self.query, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Return attended features (B, C, h, w)."""
        tokens, others = windows(x, self.side), windows(other, self.side)
        parts = (self.query(tokens), *self.key_value(others).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return from_windows(self.out(attended), self.side, x.shape)


class _GatedFeedForward(nn.Module):
    """Point-wise convolutions around a depth-wise one, half of whose channels gate the others."""

    def __init__(self, channels: int, expansion: float = 2.2) -> None:
        super().__init__()
        inner = int(channels * expansion)
        self.enter = nn.Conv2d(channels, 2 * inner, 1)
        self.depthwise = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.leave = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.depthwise(self.enter(x)).chunk(2, dim=1)
        return self.leave(F.gelu(gate) * value)


class _ChannelNorm(nn.LayerNorm):
    """Layer normalization of the channels of features (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _PriorBlock(nn.Module):
    """Permuted attention and a feed-forward network, each on features that the prior has scaled and shifted."""

    def __init__(self, channels: int, side: int, num_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_ChannelNorm(channels) for _ in range(2))
        self.modulations = nn.ModuleList(nn.Linear(PRIOR, 2 * channels) for _ in range(2))
        self.layers = nn.ModuleList([_PermutedAttention(channels, side, num_heads), _GatedFeedForward(channels)])

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        for norm, modulation, layer in zip(self.norms, self.modulations, self.layers, strict=True):
            scale, shift = modulation(prior)[:, :, None, None].chunk(2, dim=1)
            x = x + layer(norm(x) * (1 + scale) + shift)
        return x


class _GuideBlock(nn.Module):
    """Cross-attention to the guide and a feed-forward network."""

    def __init__(self, channels: int, side: int, num_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_ChannelNorm(channels) for _ in range(3))
        self.attention = _CrossAttention(channels, side, num_heads)
        self.feed_forward = _GatedFeedForward(channels)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), self.norms[1](guide))
        return x + self.feed_forward(self.norms[2](x))


class DiffMSR(nn.Module):
    """DiffMSR, both stages, for one real channel: written from the paper, not from its code.

    The released code views features (B, C, h, w) as (B, h, w, C) without permuting them, so that its "windows" run over
    channels and rows; it accepts LR slices of 64 × 64 only. Here the windows are those of rows and columns that the
    paper describes, and slices of any size are padded to whole windows. Stage 1 takes the prior from the truth, stage 2
    from the diffusion. There is no term in k-space, since the LR slices are magnitude images.

    Args:
        channels: width.
        num_groups: groups of blocks, with a convolution and a skip connection each.
        num_blocks: blocks of a group.
        num_heads: attention heads.
        side: of the windows, even.
        num_prior_blocks: residual blocks of the encoders of the prior.
        seed: of the initial noise of `forward`, the same for all slices.

    Reference:
        Li et al., Rethinking Diffusion Model for Multi-Contrast MRI Super-Resolution, CVPR 2024.
    """

    def __init__(
        self,
        channels: int = 64,
        num_groups: int = 5,
        num_blocks: int = 6,
        num_heads: int = 4,
        side: int = 16,
        num_prior_blocks: int = 9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.side, self.seed = side, seed
        self.true_prior = PriorEncoder(1 + 16, num_blocks=num_prior_blocks)
        self.condition = PriorEncoder(1, num_blocks=num_prior_blocks)
        self.denoiser = PriorDenoiser()
        self.head = nn.Conv2d(1, channels, 3, padding=1)
        self.guide_head = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        )
        self.guide_blocks = nn.ModuleList(_GuideBlock(channels, side, num_heads) for _ in range(2))
        self.groups = nn.ModuleList(
            nn.ModuleList(_PriorBlock(channels, side, num_heads) for _ in range(num_blocks)) for _ in range(num_groups)
        )
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_groups))
        self.tail = edsr_tail(channels)

    def prior_of(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Return the prior (B, `PRIOR`) of true slices (B, 1, 4h, 4w) with their LR slices (B, 1, h, w)."""
        return self.true_prior(torch.cat([lr, F.pixel_unshuffle(hr, 4)], dim=1))

    def restore(self, lr: Tensor, guide: Tensor, prior: Tensor) -> Tensor:
        """Return SR slices (B, 1, 4h, 4w) for LR slices (B, 1, h, w), guides (B, 1, 4h, 4w) and priors."""
        height, width = lr.shape[-2:]
        down, right = -height % self.side, -width % self.side
        x = self.head(F.pad(lr, (0, right, 0, down), mode="replicate"))
        reference = self.guide_head(F.pad(guide, (0, 4 * right, 0, 4 * down), mode="replicate"))
        for block in self.guide_blocks:
            x = block(x, reference)
        start = x
        for group, convolution in zip(self.groups, self.convolutions, strict=True):
            features = x
            for block in group:
                features = block(features, prior)
            x = x + convolution(features)
        sr = self.tail(x + start)[..., : 4 * height, : 4 * width]
        return sr + F.interpolate(lr, scale_factor=4, mode="nearest")

    def forward(self, lr: Tensor, guide: Tensor) -> Tensor:
        """Return SR slices (B, 1, 4h, 4w) for LR slices (B, 1, h, w) and guides (B, 1, 4h, 4w): stage 2."""
        noise = equal_noise(lr, (PRIOR,), self.seed)
        return self.restore(lr, guide, self.denoiser(noise, self.condition(lr)))
