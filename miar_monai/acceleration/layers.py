"""Fused layers: one or two Triton kernels each at inference on a GPU, PyTorch operations otherwise."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai import acceleration

try:
    from miar_monai.acceleration import triton_kernels
except ImportError:  # PyTorch for CPUs or other systems than Linux does not include Triton
    triton_kernels = None  # type: ignore[assignment]

__all__ = ["AddNorm", "LinearGELU", "NormByEight", "NormSiLU", "NormalizedRotary", "join", "rotate", "top_two"]

logger = logging.getLogger(__name__)


def _use_kernels(x: Tensor) -> bool:
    """Return whether to use the Triton kernels: on a GPU, without gradients, if they are enabled.

    They compute in float32, so they are not used for float64; nor under `torch.compile`, which fuses by itself.
    """
    if triton_kernels is None or not x.is_cuda or x.dtype == torch.float64:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not acceleration.kernels():
        return False
    return _kernels_work(x.device)


@lru_cache(maxsize=16)
def _kernels_work(device: torch.device) -> bool:
    """Return whether Triton can compile for a GPU, which requires a C compiler; log a warning if not."""
    try:
        one = torch.ones(1, 1, 4, device=device)
        triton_kernels.add_norm(one, one, one, 1e-6)
    except Exception as error:  # a missing or unsuitable compiler may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("Triton is not available, so inference is slower: %s", reason)
        return False
    return True


def top_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and the indices of the two most probable codes of logits (..., V).

    Returns:
        Log-probabilities, (..., 2), float32, and codes, (..., 2), int64.

    Example:
        >>> log_p, codes = top_two(torch.tensor([[0.1, 0.6, 0.3]]).log())
        >>> log_p.exp(), codes
        (tensor([[0.6000, 0.3000]]), tensor([[1, 2]]))
    """
    if _use_kernels(logits):
        return triton_kernels.top_two(logits)
    log_p, codes = logits.log_softmax(dim=-1, dtype=torch.float32).topk(2, dim=-1)
    return log_p, codes


def join(key: Tensor, value: Tensor, rows: Tensor | None, new_key: Tensor, new_value: Tensor) -> tuple[Tensor, Tensor]:
    """Append the keys and values of new tokens to those of earlier tokens.

    Args:
        key: keys of earlier tokens, (N, T, heads, d).
        value: their values.
        rows: indices of the samples to extend, (B,), int64; None for all N.
        new_key: keys of M consecutive candidates per sample, (B · M, n, heads, d).
        new_value: their values.

    Returns:
        Keys and values, (B · M, T + n, heads, d) both.
    """
    if _use_kernels(key):
        return triton_kernels.join(key, value, rows, new_key, new_value)
    if rows is not None:
        key, value = key[rows], value[rows]
    return _join(key, new_key), _join(value, new_value)


def _join(old: Tensor, new: Tensor) -> Tensor:
    # heads and channels are merged: torch.cat on a GPU is slow for tensors of more than four axes
    candidates = new.flatten(2).unflatten(0, (len(old), -1))  # (B, M, n, D)
    shared = old.flatten(2)[:, None].expand(-1, candidates.shape[1], -1, -1)  # (B, M, T, D)
    return torch.cat([shared, candidates], dim=2).flatten(0, 1).unflatten(-1, old.shape[2:])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (x_2m, x_2m+1) of queries or keys (B, L, heads, d) by a rotary table (2, L, 1 or heads, d).

    The result has the precision of ``x``.
    """
    cos, sin = table.to(x.dtype)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class NormalizedRotary(nn.Module):
    """Normalization of queries and keys, followed by their rotary position embedding."""

    eps = 1e-12

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Normalize (B, L, heads, d) to a root mean square of 1, that is, length √d, and `rotate` it."""
        if _use_kernels(x) and x.shape[-1] & (x.shape[-1] - 1) == 0:
            return triton_kernels.normalized_rotary(x, table, self.eps)
        return rotate(F.rms_norm(x, x.shape[-1:], eps=self.eps), table)


class AddNorm(nn.RMSNorm):
    """Residual addition followed by RMS norm."""

    eps: float

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the sum of the residual stream and a branch, (B, L, D) both, and its RMS norm."""
        if _use_kernels(x) and x.shape == branch.shape and x.dtype == branch.dtype:
            return triton_kernels.add_norm(x, branch, self.weight, self.eps)
        x = x + branch
        return x, super().forward(x)


class LinearGELU(nn.Linear):
    """A linear layer followed by GELU (tanh approximation), fused on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if x.is_cuda and _use_kernels(x):  # on a CPU, _addmm_activation is another GELU
            out = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.mT, use_gelu=True)
            return out.unflatten(0, x.shape[:-1])
        return F.gelu(super().forward(x), approximate="tanh")


class NormByEight(nn.GroupNorm):
    """Group norm with eight channels per group at every width."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(channels // 8, 1), channels, eps=1e-6)


class NormSiLU(NormByEight):
    """Group norm followed by SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        if _use_kernels(x):
            return triton_kernels.norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(super().forward(x))
