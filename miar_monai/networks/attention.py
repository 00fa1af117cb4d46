"""Attention for next-scale prediction: scale-aligned 2D rotary positions, explicit cache, the two layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CrossAttention", "KeyValue", "SelfAttention", "rotary_table", "rotate"]


class KeyValue(NamedTuple):
    """Keys (already rotated) and values of one attention layer, each (B, heads, tokens, D / heads)."""

    key: Tensor
    value: Tensor

    def append(self, other: KeyValue) -> KeyValue:
        """Return the cache with the tokens of ``other`` behind its own; nothing is changed in place."""
        return KeyValue(torch.cat([self.key, other.key], dim=2), torch.cat([self.value, other.value], dim=2))

    def repeat(self, times: int) -> KeyValue:
        """Return the cache with each sample ``times`` times in a row."""
        return KeyValue(*(t[:, None].expand(-1, times, -1, -1, -1).flatten(0, 1) for t in self))  # once: no copy

    def select(self, samples: Tensor) -> KeyValue:
        """Return the cache of the given samples (N,), int64."""
        return KeyValue(self.key[samples], self.value[samples])


def rotary_table(positions: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return cosines and sines of the rotary angles: rows turn the first half of the pairs, columns the second.

    Args:
        positions: rows and columns in units of the latent grid, (L, 2); see `ScaleSchedule.positions`. Tokens of
            different scales that lie at the same place get the same angles.
        head_dim: d, a multiple of 4.
        base: the angle of pair j is position · base^(-4j / d).

    Returns:
        (2, L, d / 2), float32: cosines, sines.

    Reference:
        Paper Sec. 3.2 and appendix A (scale-aligned 2D RoPE); Su et al., RoFormer, 2021.

    Example:
        >>> rotary_table(torch.zeros(3, 2), 8).shape
        torch.Size([2, 3, 4])
    """
    frequencies = base ** (-torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim)  # (d / 4,)
    angles = (positions.double()[:, :, None] * frequencies).flatten(1)  # (L, d / 2)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x_2m, x_2m+1) of queries or keys (B, heads, L, d) by the angles of ``table`` (2, L, d / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class _Attention(nn.Module):
    """What both layers share: l2-normalized queries and keys with a learned temperature for each head (VAR)."""

    max_log_temperature = 4.6052  # log 100

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.log_temperature = nn.Parameter(torch.full((num_heads, 1, 1), 1.3863))  # log 4
        self.query = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, d)

    def queries(self, x: Tensor, table: Tensor) -> Tensor:
        temperature = self.log_temperature.clamp(max=self.max_log_temperature).exp()
        return rotate(F.normalize(self.heads(self.query(x)), dim=-1) * temperature, table)

    def attend(self, q: Tensor, kv: KeyValue, mask: Tensor | None = None) -> Tensor:
        kv = KeyValue(*(t.to(q.dtype) for t in kv))
        h = F.scaled_dot_product_attention(q, kv.key, kv.value, attn_mask=mask, scale=1.0)  # (B, heads, L, d)
        return self.out(h.transpose(1, 2).flatten(2))  # (B, L, D)


class SelfAttention(_Attention):
    """Attention of tokens to themselves and to what a cache holds.

    Args:
        dim: D, width.
        num_heads: number of heads; D / num_heads must be a multiple of 4.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)

    def forward(
        self, x: Tensor, table: Tensor, mask: Tensor | None = None, cache: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend; returns the result and the keys and values of ``x`` alone.

        Args:
            x: tokens, (B, L, D).
            table: their rotary angles, (2, L, d / 2).
            mask: True where a query (row) may see a key (column), (L, L); None for everything.
            cache: keys and values of earlier scales, seen by all of ``x``.
        """
        key, value = self.key_value(x).chunk(2, dim=-1)
        own = KeyValue(rotate(F.normalize(self.heads(key), dim=-1), table), self.heads(value))
        seen = own if cache is None else cache.append(own)
        return self.attend(self.queries(x, table), seen, mask), own


class CrossAttention(_Attention):
    """Attention of tokens to the features of the low-resolution image.

    Args:
        dim: D, width.
        num_heads: number of heads.
        context_dim: channels of the features.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__(dim, num_heads)
        self.key_value = nn.Linear(context_dim, 2 * dim, bias=False)

    def context(self, features: Tensor, table: Tensor) -> KeyValue:
        """Return keys and values of features (B, L, context_dim): computed once, used at every scale and candidate."""
        key, value = self.key_value(features).chunk(2, dim=-1)
        return KeyValue(rotate(F.normalize(self.heads(key), dim=-1), table), self.heads(value))

    def forward(self, x: Tensor, table: Tensor, context: KeyValue) -> Tensor:
        """Attend from tokens (B, L, D) to a context; returns (B, L, D)."""
        return self.attend(self.queries(x, table), context)
