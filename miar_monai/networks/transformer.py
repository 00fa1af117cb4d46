"""The autoregressive transformer, which predicts the tokens of a scale from the sum of the coarser scales."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from miar_monai.acceleration.layers import AddNorm, LinearGELU
from miar_monai.errors import ConfigurationError
from miar_monai.networks.attention import CrossAttention, KeyValue, SelfAttention, rotary_table
from miar_monai.networks.schedule import ScaleSchedule

__all__ = ["Context", "MIARBlock", "MIARTransformer"]


class Context(NamedTuple):
    """Context of the LR images, shared by all scales and candidates."""

    start: Tensor
    """Start token: (B, 1, D)."""
    blocks: list[KeyValue]
    """Keys and values of the cross-attention of each block."""
    rotations: list[Tensor]
    """Rotary table of queries and keys of the self-attention of each block: (2, L, 2 · heads, d).

    The queries of the cross-attention use the table of the queries of the self-attention."""

    def first(self, count: int) -> Context:
        """Return the context of the first ``count`` samples."""
        blocks = [KeyValue(kv.key[:count], kv.value[:count]) for kv in self.blocks]
        return self._replace(start=self.start[:count], blocks=blocks)


class MIARBlock(nn.Module):
    """Pre-norm residual block: self-attention, cross-attention to the LR features, MLP (paper Fig. 1B).

    Args:
        dim: D, width.
        num_heads: number of heads of both attentions.
        context_dim: channels of the LR features.
        mlp_ratio: hidden width of the MLP over D.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.self_attention = SelfAttention(dim, num_heads)
        self.norm2 = AddNorm(dim)
        self.cross_attention = CrossAttention(dim, num_heads, context_dim)
        self.norm3 = AddNorm(dim)
        layers = {"0": LinearGELU(dim, hidden), "2": nn.Linear(hidden, dim)}  # names in the released weights
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        context: KeyValue,
        mask: Tensor | None = None,
        cache: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Map tokens (B, L, D) to (B, L, D), and extend the cache by their keys and values.

        The first half of ``rotation`` (2, L, 2 · heads, d) is the rotary table of all queries.
        """
        attended, cache = self.self_attention(self.norm1(x), rotation, mask, cache)
        x, h = self.norm2(x, attended)
        x, h = self.norm3(x, self.cross_attention(h, rotation.chunk(2, dim=2)[0], context))
        return x + self.mlp(h), cache


class MIARTransformer(nn.Module):
    """Predicts the tokens of each scale from the sum of the coarser scales and the features of the LR image.

    In training, `forward` processes all scales at once with a scale-wise causal mask. At inference, `step` processes
    one scale with a cache and without a mask. Both give the same logits.

    Args:
        scales: sides of the token maps, coarse to fine.
        num_codes: V, size of a codebook.
        latent_channels: C, length of a code.
        context_channels: channels of the LR features.
        dim: D, width.
        depth: number of blocks.
        num_heads: number of heads; dim / num_heads must be a multiple of 4.
        num_codebooks: S; the tokens of a position are predicted independently of each other.
        positions: ``"rotary"`` (the paper's scale-aligned 2D rotary embedding) or ``"learned"`` (an embedding for each
            position of each scale and of the LR features, as in VAR; for the ablation).

    Raises:
        ConfigurationError: if ``positions`` is unknown.

    Reference:
        Paper Sec. 3.2, Fig. 1B and appendix A.

    Example:
        >>> transformer = MIARTransformer(
        ...     (1, 2, 4), num_codes=16, latent_channels=8, context_channels=8, dim=16, num_heads=2)
        >>> context = transformer.context(torch.randn(3, 8, 4, 4))
        >>> transformer(torch.randn(3, 20, 8), context).shape
        torch.Size([3, 21, 16])
    """

    blocks: list[MIARBlock]
    levels: Tensor
    mask: Tensor
    table: Tensor

    def __init__(
        self,
        scales: Sequence[int] = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        num_codes: int = 4096,
        latent_channels: int = 32,
        context_channels: int = 32,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        num_codebooks: int = 1,
        positions: str = "rotary",
    ) -> None:
        super().__init__()
        if positions not in ("rotary", "learned"):
            raise ConfigurationError(
                f"positions is {positions!r}, but it must be 'rotary' or 'learned'; correct the setting."
            )
        self.num_codebooks = num_codebooks
        self.schedule = ScaleSchedule(scales)
        self.context_norm = nn.LayerNorm(context_channels)
        self.start = nn.Linear(context_channels, dim)  # its bias is the learned start token
        self.embed = nn.Linear(latent_channels, dim)
        self.level_embedding = nn.Embedding(self.schedule.num_scales, dim)
        blocks = [MIARBlock(dim, num_heads, context_channels) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]  # ModuleList is not generic
        self.norm_out = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_codes * num_codebooks)
        levels = self.schedule.levels()
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("mask", levels[:, None] >= levels[None, :], persistent=False)
        token_positions = self.schedule.positions()
        self.token_positions = self.context_positions = None
        if positions == "learned":
            token_positions = torch.zeros_like(token_positions)  # no rotation
            self.token_positions = nn.Embedding(len(token_positions), dim)
            self.context_positions = nn.Embedding(self.schedule.latent_side**2, context_channels)
        self.register_buffer("table", rotary_table(token_positions, dim // num_heads), persistent=False)
        self._initialize(dim, depth)

    def _initialize(self, dim: int, depth: int) -> None:
        """VAR's initialization: small weights, even smaller in residual branches, and nearly uniform predictions."""
        std = (1 / dim / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.start.bias, std=std)
        for block in self.blocks:
            for layer in (block.self_attention.out, block.cross_attention.out, block.mlp[-1]):
                layer.get_parameter("weight").data.mul_((2 * depth) ** -0.5)
        self.head.weight.data.mul_(0.02)

    def context(self, f_lr: Tensor) -> Context:
        """Compute the context of LR features (B, context_channels, G, G) on the latent grid."""
        features = self.context_norm(f_lr.flatten(2).mT)  # (B, G², context_channels)
        if self.context_positions is not None:
            features = features + self.context_positions.weight
        first, last = self.schedule.bounds[-1]
        table = self.table[:, first:last]
        return Context(
            start=self.start(features.mean(dim=1, keepdim=True)),
            blocks=[block.cross_attention.context(features, table) for block in self.blocks],
            rotations=[block.self_attention.rotation(self.table) for block in self.blocks],
        )

    def forward(self, inputs: Tensor, context: Context) -> Tensor:
        """Return the logits (B, L · S, V) of all scales, each from the coarser scales.

        Args:
            inputs: for each of scales 1 to K - 1, the sum of the coarser scales averaged down to it: (B, L - 1, C).
            context: context of the LR images.
        """
        x = torch.cat([context.start, self.embed(inputs)], dim=1) + self.level_embedding(self.levels)  # (B, L, D)
        if self.token_positions is not None:
            x = x + self.token_positions.weight
        for block, rotation, key_value in zip(self.blocks, context.rotations, context.blocks, strict=True):
            x, _ = block(x, rotation, key_value, mask=self.mask)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Map the output of the last block (B, n, D) to the logits (B, n · S, V) of the tokens of all codebooks."""
        return self.head(self.norm_out(x)).unflatten(2, (self.num_codebooks, -1)).flatten(1, 2)

    def step(
        self, inputs: Tensor | None, k: int, context: Context, cache: list[KeyValue] | None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Return the logits (B, side_k² · S, V) of scale k, and the cache extended by its keys and values.

        Args:
            inputs: the sum of all coarser scales, averaged down to scale k: (B, side_k², C); None for scale 0. There
                may be M consecutive candidates per sample of context and cache, (B · M, side_k², C).
            k: scale, from 0.
            context: context of the LR images.
            cache: keys and values of scales 0 to k - 1 of each block; None for scale 0. It is not changed.
        """
        first, last = self.schedule.bounds[k]
        x = context.start if inputs is None else self.embed(inputs.to(context.start.dtype))
        x = x + self.level_embedding.weight[k]  # (B, side_k², D)
        if self.token_positions is not None:
            x = x + self.token_positions.weight[first:last]
        new_cache = []
        for i, (block, rotation, key_value) in enumerate(
            zip(self.blocks, context.rotations, context.blocks, strict=True)
        ):
            x, extended = block(x, rotation[:, first:last], key_value, cache=cache[i] if cache else None)
            new_cache.append(extended)
        return self.logits(x), new_cache
