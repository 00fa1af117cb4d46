"""Attention for next-scale prediction: scale-aligned 2D rotary positions, explicit cache, the two layers."""

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
    """Which samples are meant, (N,), int64; None for all. They are picked by `append`, which copies anyway."""

    def append(self, other: KeyValue) -> KeyValue:
        """Return a cache with the tokens of ``other`` behind its own; nothing is changed in place.

        ``other`` may have M candidates in a row for each sample, (B · M, ...): each continues its sample's cache.
        """
        return KeyValue(*join(self.key, self.value, self.rows, other.key, other.value))

    def select(self, samples: Tensor) -> KeyValue:
        """Return the cache of the given samples (N,), int64, to be appended to."""
        return self._replace(rows=samples if self.rows is None else self.rows[samples])


def rotary_table(positions: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return cosines and sines of the rotary angles: rows turn the first half of the pairs, columns the second.

    Args:
        positions: rows and columns in units of the latent grid, (L, 2); see `ScaleSchedule.positions`. Tokens of
            different scales that lie at the same place get the same angles.
        head_dim: d, a multiple of 4.
        base: the angle of pair j is position · base^(-4j / d).

    Returns:
        (2, L, 1, d), float32: the cosine of each pair, twice; its sine, negative and positive.

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
    """What both layers share: l2-normalized queries and keys with a learned temperature for each head (VAR)."""

    max_log_temperature = 4.6052  # log 100

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.log_temperature = nn.Parameter(torch.full((num_heads, 1, 1), 1.3863))  # log 4
        self.out = nn.Linear(dim, dim)
        self.turn = NormalizedRotary()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, L, heads, d)

    def key_table(self, table: Tensor) -> Tensor:
        """Return the table (2, L, heads, d) of the keys, which carry the temperature of their head.

        Each key is made once and meets many queries: its product with one is the cosine between them times the
        temperature.
        """
        temperature = self.log_temperature.clamp(max=self.max_log_temperature).exp()[..., 0]  # (heads, 1)
        return table * (temperature / self.head_dim)

    def attend(self, q: Tensor, kv: KeyValue, mask: Tensor | None = None) -> Tensor:
        """Attend from queries (B · M, L, heads, d) to keys and values of B samples, those of M candidates in a row."""
        folded = q.to(kv.key.dtype).unflatten(0, (len(kv.key), -1)).flatten(1, 2)  # (B, M · L, heads, d)
        q_, k_, v_ = (x.transpose(1, 2) for x in (folded, kv.key, kv.value))  # (B, heads, ..., d)
        h = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=1.0)  # (B, heads, M · L, d)
        return self.out(h.transpose(1, 2).reshape(*q.shape[:2], -1))  # (B · M, L, D)


class SelfAttention(_Attention):
    """Attention of tokens to themselves and to what a cache holds.

    Args:
        dim: D, width.
        num_heads: number of heads; D / num_heads must be a multiple of 4.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.query_key = nn.Linear(dim, 2 * dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)

    def rotation(self, table: Tensor) -> Tensor:
        """Return the tables of queries and keys side by side, (2, L, 2 · heads, d), of a rotary table (2, L, 1, d)."""
        keys = self.key_table(table)
        return torch.cat([table.expand_as(keys), keys], dim=2)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None = None, cache: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend; returns the result, and the cache with the keys and values of ``x`` behind it.

        Args:
            x: tokens, (B, L, D); with a cache perhaps of M candidates in a row for each of its samples, (B · M, L, D).
            rotation: of their queries and keys, (2, L, 2 · heads, d).
            mask: True where a query (row) may see a key (column), (L, L); None for everything.
            cache: keys and values of earlier scales, seen by all of ``x``; it is not changed.
        """
        turned = self.turn(self.heads(self.query_key(x)), rotation)  # (B, L, 2 · heads, d)
        query, key = turned.chunk(2, dim=2)
        value = self.heads(self.value(x))
        own = KeyValue(key.to(value.dtype), value)
        seen = own if cache is None else cache.append(own)
        return self.attend(query, seen, mask), seen


class CrossAttention(_Attention):
    """Attention of tokens to the features of the low-resolution image.

    Args:
        dim: D, width.
        num_heads: number of heads.
        context_dim: channels of the features.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__(dim, num_heads)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(context_dim, 2 * dim, bias=False)

    def context(self, features: Tensor, table: Tensor) -> KeyValue:
        """Return keys and values of features (B, L, context_dim): computed once, used at every scale and candidate."""
        key, value = map(self.heads, self.key_value(features).chunk(2, dim=-1))
        return KeyValue(self.turn(key, self.key_table(table)).to(value.dtype), value)

    def forward(self, x: Tensor, table: Tensor, context: KeyValue) -> Tensor:
        """Attend from tokens (B · M, L, D) to the context of B samples, which M candidates in a row share."""
        return self.attend(self.turn(self.heads(self.query(x)), table), context)
