"""Triton kernels for memory-bound operations, each of which takes PyTorch three or four launches.

Inference on a slice launches two thousand small kernels, and a launch takes as long as many of them. The kernels have
no gradients. `miar_monai.acceleration.layers` decides when to use them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_norm", "join", "norm_silu", "normalized_rotary", "top_two"]


P = ParamSpec("P")
R = TypeVar("R")


def _on_device_of_first(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Launch on the GPU of the first tensor, which may not be the current one."""

    @wraps(launch)
    def launched(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(x):
            return launch(x, *args, **kwargs)

    return launched


@triton.jit(do_not_specialize=["rows", "rows_per_sample"])
def _normalized_rotary(  # type: ignore[no-untyped-def]
    x, table, out, rows, rows_per_sample, heads, sin_offset, token_stride, head_stride,
    eps: tl.constexpr, d: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = (row < rows)[:, None]
    channel = tl.arange(0, d)[None, :]
    start = row[:, None].to(tl.int64) * d
    value = tl.load(x + start + channel, inside, 0.0).to(tl.float32)
    partner = tl.load(x + start + (channel ^ 1), inside, 0.0).to(tl.float32)  # the other one of the pair
    row_of_sample = row % rows_per_sample
    entry = (row_of_sample // heads * token_stride + row_of_sample % heads * head_stride)[:, None] + channel
    cos = tl.load(table + entry, inside, 0.0).to(tl.float32)
    sin = tl.load(table + sin_offset + entry, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / d + eps)[:, None]
    tl.store(out + start + channel, ((value * cos + partner * sin) * scale).to(out.dtype.element_ty), inside)


@_on_device_of_first
def normalized_rotary(x: Tensor, table: Tensor, eps: float) -> Tensor:
    """Compute `NormalizedRotary` for queries or keys (B, L, heads, d); d must be a power of two."""
    x = x.contiguous()
    out, (_, length, heads, d) = torch.empty_like(x), x.shape
    rows, block, (sin_offset, token_stride, head_stride, _) = x.numel() // d, 16, table.stride()
    head_stride = head_stride if table.shape[2] > 1 else 0
    _normalized_rotary[(triton.cdiv(rows, block),)](
        x, table, out, rows, length * heads, heads, sin_offset, token_stride, head_stride, eps, d, block
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _add_norm(  # type: ignore[no-untyped-def]
    x, branch, weight, total, out, rows, eps: tl.constexpr, d: tl.constexpr, width: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0) * block + tl.arange(0, block)
    channel = tl.arange(0, width)[None, :]
    inside = (row < rows)[:, None] & (channel < d)
    entry = row[:, None].to(tl.int64) * d + channel
    value = tl.load(x + entry, inside, 0.0).to(tl.float32) + tl.load(branch + entry, inside, 0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty)
    tl.store(total + entry, value, inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / d + eps)[:, None]
    weights = tl.load(weight + channel, channel < d, 0.0).to(tl.float32)
    tl.store(out + entry, (value * scale * weights).to(out.dtype.element_ty), inside)


@_on_device_of_first
def add_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `AddNorm`: the sum of two tensors (B, L, D), and its RMS norm."""
    x, branch = x.contiguous(), branch.contiguous()
    d = x.shape[-1]
    (rows, block), total, out = (x.numel() // d, 4), torch.empty_like(x), torch.empty_like(x)
    width = triton.next_power_of_2(d)
    _add_norm[(triton.cdiv(rows, block),)](x, branch, weight, total, out, rows, eps, d, width, block)
    return total, out


@triton.jit
def _moments(x, sums, size, parts, part_size: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    group, part = tl.program_id(0), tl.program_id(1)
    pivot = tl.load(x + group.to(tl.int64) * size).to(tl.float32)  # avoids cancellation if the mean is large
    first, second = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    for start in range(0, part_size, block):
        i = start + tl.arange(0, block)
        entry = part * part_size + i
        inside = (i < part_size) & (entry < size)
        value = tl.load(x + group.to(tl.int64) * size + entry, inside, 0.0).to(tl.float32)
        value = tl.where(inside, value - pivot, 0.0)
        first += value
        second += value * value
    target = sums + (group * parts + part) * 2
    tl.store(target, tl.sum(first, 0))
    tl.store(target + 1, tl.sum(second, 0))


@triton.jit
def _norm_silu(  # type: ignore[no-untyped-def]
    x, sums, weight, bias, out, size, pixels, width, groups, eps: tl.constexpr, parts: tl.constexpr, block: tl.constexpr
):
    group = tl.program_id(0)
    source = sums + (group * parts + tl.arange(0, parts)) * 2
    offset = tl.sum(tl.load(source), 0) / size
    variance = tl.sum(tl.load(source + 1), 0) / size - offset * offset
    mean = tl.load(x + group.to(tl.int64) * size).to(tl.float32) + offset
    scale = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    i = tl.program_id(1) * block + tl.arange(0, block)
    channel = group % groups * width + i // pixels
    value = tl.load(x + group.to(tl.int64) * size + i, i < size, 0.0).to(tl.float32)
    weights = tl.load(weight + channel, i < size, 0.0).to(tl.float32)
    value = (value - mean) * scale * weights + tl.load(bias + channel, i < size, 0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + group.to(tl.int64) * size + i, value.to(out.dtype.element_ty), i < size)


@_on_device_of_first
def norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute `NormSiLU` for a feature map (B, C, H, W).

    The groups are large and few, so the sums of each group are computed in eight parallel parts.
    """
    x = x.contiguous()
    pixels, width, parts, block = x.shape[2] * x.shape[3], x.shape[1] // groups, 8, 2048
    count, size, out = len(x) * groups, width * pixels, torch.empty_like(x)
    sums = torch.empty(count, parts, 2, dtype=torch.float32, device=x.device)
    _moments[(count, parts)](x, sums, size, parts, triton.cdiv(size, parts), 1024)
    _norm_silu[(count, triton.cdiv(size, block))](
        x, sums, weight, bias, out, size, pixels, width, groups, eps, parts, block
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _top_two(logits, log_p, codes, rows, size, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * block + tl.arange(0, block)
    code = tl.arange(0, width)[None, :]
    inside = (row < rows)[:, None] & (code < size)
    value = tl.load(logits + row[:, None].to(tl.int64) * size + code, inside, float("-inf")).to(tl.float32)
    first, first_code = tl.max(value, 1), tl.argmax(value, 1)
    total = first + tl.log(tl.sum(tl.exp(value - first[:, None]), 1))  # log-sum-exp
    rest = tl.where(code == first_code[:, None], float("-inf"), value)
    target = 2 * row
    tl.store(log_p + target, first - total, row < rows)
    tl.store(log_p + target + 1, tl.max(rest, 1) - total, row < rows)
    tl.store(codes + target, first_code.to(tl.int64), row < rows)
    tl.store(codes + target + 1, tl.argmax(rest, 1).to(tl.int64), row < rows)


@_on_device_of_first
def top_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `miar_monai.acceleration.layers.top_two`; of equally probable codes, the first is returned."""
    logits = logits.contiguous()
    shape = (*logits.shape[:-1], 2)
    log_p = torch.empty(shape, dtype=torch.float32, device=logits.device)
    codes = torch.empty(shape, dtype=torch.int64, device=logits.device)
    rows, size, block = log_p.numel() // 2, logits.shape[-1], 8
    _top_two[(triton.cdiv(rows, block),)](logits, log_p, codes, rows, size, triton.next_power_of_2(size), block)
    return log_p, codes


@triton.jit(do_not_specialize=["before", "after", "candidates"])
def _join(  # type: ignore[no-untyped-def]
    old_key, old_value, rows, new_key, new_value, key, value, before, after, candidates,
    key_batch, key_token, value_batch, value_token, d,
    selects: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * block + tl.arange(0, block))[:, None]
    channel = tl.arange(0, width)[None, :]
    row = item // candidates
    if selects:
        row = tl.load(rows + row)
    is_old = (token < before) & (channel < d)
    is_new = (token >= before) & (token < before + after) & (channel < d)
    source = (row * before + token) * d + channel
    new_token = token - before
    target = (item * (before + after) + token) * d + channel
    keys = tl.load(old_key + source, is_old, 0.0)
    keys += tl.load(new_key + item * key_batch + new_token * key_token + channel, is_new, 0.0)
    values = tl.load(old_value + source, is_old, 0.0)
    values += tl.load(new_value + item * value_batch + new_token * value_token + channel, is_new, 0.0)
    tl.store(key + target, keys, is_old | is_new)
    tl.store(value + target, values, is_old | is_new)


@_on_device_of_first
def join(key: Tensor, value: Tensor, rows: Tensor | None, new_key: Tensor, new_value: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `layers.join`: select rows, copy them for each candidate, and append keys and values."""
    key, value = key.contiguous(), value.contiguous()
    new_key, new_value = _with_contiguous_heads(new_key), _with_contiguous_heads(new_value)
    (before, heads, head_dim), (items, after) = key.shape[1:], new_key.shape[:2]
    shape, d = (items, before + after, heads, head_dim), heads * head_dim
    keys, values = new_key.new_empty(shape), new_value.new_empty(shape)
    candidates, block = items // len(key if rows is None else rows), 8
    _join[(triton.cdiv(before + after, block), items)](
        key, value, key if rows is None else rows, new_key, new_value, keys, values, before, after, candidates,
        *new_key.stride()[:2], *new_value.stride()[:2], d, rows is not None, triton.next_power_of_2(d), block,
    )  # fmt: skip
    return keys, values


def _with_contiguous_heads(x: Tensor) -> Tensor:
    """Make the last two axes of keys or values (B, L, heads, d) contiguous."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()
