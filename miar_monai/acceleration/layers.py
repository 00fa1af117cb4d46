"""Layers of several small operations: one or two kernels each on a GPU at inference, PyTorch's own everywhere else."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from miar_monai.acceleration import triton_kernels as kernels
except ImportError:  # builds of PyTorch for CPUs, and those for other systems than Linux, come without Triton
    kernels = None  # type: ignore[assignment]

__all__ = ["AddNorm", "LinearGELU", "NormByEight", "NormSiLU", "Turn", "join", "rotate", "top_two"]

logger = logging.getLogger(__name__)


def _fused(x: Tensor) -> bool:
    """Return whether the kernels take over: on a GPU, where no gradients are asked for.

    They compute in float32, so not for float64; and what is compiled is fused by the compiler.
    """
    if kernels is None or not x.is_cuda or x.dtype == torch.float64:
        return False
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _kernels_work(x.device)


@lru_cache(maxsize=16)
def _kernels_work(device: torch.device) -> bool:
    """Return whether Triton can compile for a GPU, which takes a C compiler; a warning says it if not."""
    try:
        one = torch.ones(1, 1, 4, device=device)
        kernels.add_norm(one, one, one, 1e-6)
    except Exception as error:  # whatever a compiler that is not there, or does not fit, may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("Triton does not work here, so inference takes longer: %s", reason)
        return False
    return True


def top_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two most probable codes of each row of logits (..., V), and how probable they are.

    Returns:
        Logarithms of the probabilities, (..., 2), float32, and codes, (..., 2), int64.

    Example:
        >>> log_p, codes = top_two(torch.tensor([[0.1, 0.6, 0.3]]).log())
        >>> log_p.exp(), codes
        (tensor([[0.6000, 0.3000]]), tensor([[1, 2]]))
    """
    if _fused(logits):
        return kernels.top_two(logits)
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
    if _fused(key):
        return kernels.join(key, value, rows, new_key, new_value)
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


class Turn(nn.Module):
    """What happens to queries and keys: they get a place, and all the same length."""

    eps = 1e-12

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Give (B, L, heads, d) a root mean square of 1, that is the length √d, and `rotate` it."""
        if _fused(x) and x.shape[-1] & (x.shape[-1] - 1) == 0:
            return kernels.turn(x, table, self.eps)
        return rotate(F.rms_norm(x, x.shape[-1:], eps=self.eps), table)


class AddNorm(nn.RMSNorm):
    """Where one residual branch ends and the next one begins."""

    eps: float

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the sum of the stream and a branch, (B, L, D) both, and its RMS norm."""
        if _fused(x) and x.shape == branch.shape and x.dtype == branch.dtype:
            return kernels.add_norm(x, branch, self.weight, self.eps)
        x = x + branch
        return x, super().forward(x)


class LinearGELU(nn.Linear):
    """A linear layer and GELU, which needs no pass of its own where the product is written anyway."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if x.is_cuda and _fused(x):  # only there is it this GELU
            out = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.mT, use_gelu=True)
            return out.unflatten(0, x.shape[:-1])
        return F.gelu(super().forward(x), approximate="tanh")


class NormByEight(nn.GroupNorm):
    """Group norm with eight channels a group, so that narrow and wide levels are treated alike."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(channels // 8, 1), channels, eps=1e-6)


class NormSiLU(NormByEight):
    """What comes before a convolution: group norm and SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        if _fused(x):
            return kernels.norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(super().forward(x))
