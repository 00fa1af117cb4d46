"""Self- and cross-attention for next-scale prediction, with scale-aligned 2D rotary positions and a key-value cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.acceleration.layers import NormalizedRotary, join

__all__ = ["CrossAttention", "KeyValue", "SelfAttention", "rotary_table"]


class KeyValue(NamedTuple):
    """Keys (rotated, times the temperature) and values of one attention layer, each (B, tokens, heads, D / heads)."""

    key: Tensor
    value: Tensor
    rows: Tensor | None = None
    """Indices of the samples in use, (N,), int64; None for all. Selection is deferred to `append`, which copies."""

    def append(self, other: KeyValue) -> KeyValue:
        """Return a new cache with the tokens of ``other`` appended.

        ``other`` may have M consecutive candidates per sample, (B · M, ...), each of which extends its sample's cache.
        """
        return KeyValue(*join(self.key, self.value, self.rows, other.key, other.value))

    def select(self, samples: Tensor) -> KeyValue:
        """Return the cache of some samples, given by their indices (N,), int64."""
        return self._replace(rows=samples if self.rows is None else self.rows[samples])


def rotary_table(positions: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return cosines and sines of the rotary angles, which encode rows in the first half of the pairs, then columns.

    Args:
        positions: rows and columns in units of the latent grid, (L, 2); see `ScaleSchedule.positions`. Tokens of
            different scales at the same position have the same angles.
        head_dim: d, a multiple of 4.
        base: the angle of pair j is position · base^(-4j / d).

    Returns:
        (2, L, 1, d), float32: the cosine of each pair, twice; its sine, negated and as it is.

    Reference:
        Paper Sec. 3.2 and appendix A (scale-aligned 2D RoPE); Su et al., RoFormer, 2021.

    Example:
        >>> rotary_table(torch.zeros(3, 2), 8).shape
        torch.Size([2, 3, 1, 8])
    """
    frequencies = base ** (-torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim)  # (d / 4,)
    angles = (positions.double()[:, :, None] * frequencies).flatten(1)  # (L, d / 2)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(head_dim // 2)
    angles = angles.repeat_interleave(2, dim=1)  # (L, d)
    return torch.stack([angles.cos(), angles.sin() * signs]).float()[:, :, None]


class _Attention(nn.Module):
    """Base class: l2-normalized queries and keys with a learned temperature per head (VAR)."""

    max_log_temperature = 4.6052  # log 100

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.log_temperature = nn.Parameter(torch.full((num_heads, 1, 1), 1.3863))  # log 4
        self.out = nn.Linear(dim, dim)
        self.rotary = NormalizedRotary()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, L, heads, d)

    def key_table(self, table: Tensor) -> Tensor:
        """Return the rotary table of the keys times the temperature of each head, (2, L, heads, d).

        The product of a query and such a key is the cosine between them times the temperature. Keys are scaled because
        each is computed once and used by many queries.
        """
        temperature = self.log_temperature.clamp(max=self.max_log_temperature).exp()[..., 0]  # (heads, 1)
        return table * (temperature / self.head_dim)

    def attend(self, q: Tensor, kv: KeyValue, mask: Tensor | None = None) -> Tensor:
        """Attend from queries (B · M, L, heads, d), M consecutive candidates per sample, to the keys of B samples."""
        folded = q.to(kv.key.dtype).unflatten(0, (len(kv.key), -1)).flatten(1, 2)  # (B, M · L, heads, d)
        q_, k_, v_ = (x.transpose(1, 2) for x in (folded, kv.key, kv.value))  # (B, heads, ..., d)
        h = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=1.0)  # (B, heads, M · L, d)
        return self.out(h.transpose(1, 2).reshape(*q.shape[:2], -1))  # (B · M, L, D)


class SelfAttention(_Attention):
    """Self-attention of tokens, also to the tokens in a cache.

    Args:
        dim: D, width.
        num_heads: number of heads; D / num_heads must be a multiple of 4.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.query_key = nn.Linear(dim, 2 * dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)

    def rotation(self, table: Tensor) -> Tensor:
        """Return the table of queries and keys, (2, L, 2 · heads, d), from a rotary table (2, L, 1, d)."""
        keys = self.key_table(table)
        return torch.cat([table.expand_as(keys), keys], dim=2)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None = None, cache: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Return the attention output, and the cache extended by the keys and values of ``x``.

        Args:
            x: tokens, (B, L, D); with a cache optionally of M consecutive candidates per sample, (B · M, L, D).
            rotation: rotary table of queries and keys, (2, L, 2 · heads, d).
            mask: True where a query (row) may attend to a key (column), (L, L); None for everywhere.
            cache: keys and values of earlier scales, which all of ``x`` attends to; it is not changed.
        """
        rotated = self.rotary(self.heads(self.query_key(x)), rotation)  # (B, L, 2 · heads, d)
        query, key = rotated.chunk(2, dim=2)
        value = self.heads(self.value(x))
        new = KeyValue(key.to(value.dtype), value)
        extended = new if cache is None else cache.append(new)
        return self.attend(query, extended, mask), extended


class CrossAttention(_Attention):
    """Cross-attention of tokens to the features of the LR image.

    Args:
        dim: D, width.
        num_heads: number of heads.
        context_dim: number of channels of the features.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__(dim, num_heads)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(context_dim, 2 * dim, bias=False)

    def context(self, features: Tensor, table: Tensor) -> KeyValue:
        """Return keys and values of features (B, L, context_dim), which all scales and candidates use."""
        key, value = map(self.heads, self.key_value(features).chunk(2, dim=-1))
        return KeyValue(self.rotary(key, self.key_table(table)).to(value.dtype), value)

    def forward(self, x: Tensor, table: Tensor, context: KeyValue) -> Tensor:
        """Attend from tokens (B · M, L, D) of M consecutive candidates per sample to the context of B samples."""
        return self.attend(self.rotary(self.heads(self.query(x)), table), context)
