"""Layers of several small operations: one or two kernels each on a GPU at inference, PyTorch's own everywhere else."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai import acceleration

try:
    from miar_monai.acceleration import triton_kernels
except ImportError:  # builds of PyTorch for CPUs, and those for other systems than Linux, come without Triton
    triton_kernels = None  # type: ignore[assignment]

__all__ = ["AddNorm", "LinearGELU", "NormByEight", "NormSiLU", "NormalizedRotary", "join", "rotate", "top_two"]

logger = logging.getLogger(__name__)


def _use_kernels(x: Tensor) -> bool:
    """Return whether to use the Triton kernels: on a GPU, without gradients, unless they are switched off.

    They compute in float32, so not for float64; and what is compiled is fused by the compiler.
    """
    if triton_kernels is None or not x.is_cuda or x.dtype == torch.float64:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not acceleration.kernels():
        return False
    return _kernels_work(x.device)


@lru_cache(maxsize=16)
def _kernels_work(device: torch.device) -> bool:
    """Return whether Triton can compile for a GPU, which takes a C compiler; a warning says it if not."""
    try:
        one = torch.ones(1, 1, 4, device=device)
        triton_kernels.add_norm(one, one, one, 1e-6)
    except Exception as error:  # whatever a compiler that is not there, or does not fit, may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("Triton does not work here, so inference takes longer: %s", reason)
        return False
    return True


def top_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two most probable codes of each row of logits (..., V), and their log-probabilities.

    Returns:
        Logarithms of the probabilities, (..., 2), float32, and codes, (..., 2), int64.

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
    """Put the keys and values of new tokens behind those of earlier ones.

    Args:
        key: of earlier tokens, (N, T, heads, d).
        value: likewise.
        rows: which of the N are meant, (B,), int64; None for all of them.
        new_key: (B · M, n, heads, d): of M candidates in a row for each, which go on from the same tokens.
        new_value: likewise.

    Returns:
        Keys and values, (B · M, T + n, heads, d) both.
    """
    if _use_kernels(key):
        return triton_kernels.join(key, value, rows, new_key, new_value)
    if rows is not None:
        key, value = key[rows], value[rows]
    return _join(key, new_key), _join(value, new_value)


def _join(old: Tensor, new: Tensor) -> Tensor:
    # with heads and channels as one axis: a GPU joins tensors of more than four axes one by one
    candidates = new.flatten(2).unflatten(0, (len(old), -1))  # (B, M, n, D)
    shared = old.flatten(2)[:, None].expand(-1, candidates.shape[1], -1, -1)  # (B, M, T, D)
    return torch.cat([shared, candidates], dim=2).flatten(0, 1).unflatten(-1, old.shape[2:])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x_2m, x_2m+1) of queries or keys (B, L, heads, d) by the angles of ``table`` (2, L, 1, d).

    Each head may have a table of its own, (2, L, heads, d). The result has the precision of ``x``.
    """
    cos, sin = table.to(x.dtype)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class NormalizedRotary(nn.Module):
    """Normalization of queries and keys, followed by their rotary position embedding."""

    eps = 1e-12

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Give (B, L, heads, d) a root mean square of 1, that is the length √d, and `rotate` it."""
        if _use_kernels(x) and x.shape[-1] & (x.shape[-1] - 1) == 0:
            return triton_kernels.normalized_rotary(x, table, self.eps)
        return rotate(F.rms_norm(x, x.shape[-1:], eps=self.eps), table)


class AddNorm(nn.RMSNorm):
    """The sum of a residual branch and the stream, and its norm for the next branch."""

    eps: float

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the sum of the stream and a branch, (B, L, D) both, and its RMS norm."""
        if _use_kernels(x) and x.shape == branch.shape and x.dtype == branch.dtype:
            return triton_kernels.add_norm(x, branch, self.weight, self.eps)
        x = x + branch
        return x, super().forward(x)


class LinearGELU(nn.Linear):
    """A linear layer and GELU, in one pass over the product."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if x.is_cuda and _use_kernels(x):  # only there is it this GELU
            out = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.mT, use_gelu=True)
            return out.unflatten(0, x.shape[:-1])
        return F.gelu(super().forward(x), approximate="tanh")


class NormByEight(nn.GroupNorm):
    """Group norm with eight channels a group, so that narrow and wide levels are treated alike."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(channels // 8, 1), channels, eps=1e-6)


class NormSiLU(NormByEight):
    """Group norm and SiLU, as before a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        if _use_kernels(x):
            return triton_kernels.norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(super().forward(x))
