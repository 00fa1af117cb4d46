"""Multi-scale residual quantization: a latent grid as token maps, coarse to fine (paper Eq. 1 and 2, VAR's algorithm).

`MultiScaleQuantizer.add_scale` is the one place where residuals add up; encoding, decoding, teacher forcing and
inference all go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miar_monai.networks.schedule import ScaleSchedule
from miar_monai.resampling import interpolation_matrix, resample

__all__ = ["MultiScaleQuantizer", "QuantizerOutput"]


P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(method: Callable[P, R]) -> Callable[P, R]:
    """Keep a method of a module out of mixed precision: a sum over ten scales must not be rounded to bfloat16."""

    @wraps(method)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = args[1]
        assert isinstance(tensor, Tensor)
        with torch.autocast(tensor.device.type, enabled=False):
            return method(*args, **kwargs)

    return exact


class ScaleStep(NamedTuple):
    """One scale of the residual recursion."""

    residual: Tensor
    """What is left to explain, seen at this scale: (B, side_k², C)."""
    tokens: Tensor
    """The nearest codes: (B, side_k²), int64."""
    f_hat: Tensor
    """Sum of all scales so far: (B, C, G, G)."""


class QuantizerOutput(NamedTuple):
    """Result of a training pass."""

    f_hat: Tensor
    """Quantized latents with a straight-through gradient: (B, C, G, G)."""
    loss: Tensor
    """Commitment loss plus the loss of the φ convolutions: scalar."""
    tokens: Tensor
    """Tokens of all scales: (B, L), int64."""


class Phi(nn.Module):
    """Blend of a map with its 3 × 3 convolution, which repairs what upsampling a token map leaves out (VAR)."""

    def __init__(self, channels: int, ratio: float = 0.5) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return torch.lerp(h, self.conv(h), self.ratio)


def nearest_tick(k: int, num_scales: int, num_ticks: int) -> int:
    """Return which tick is nearest to k / (K - 1), of ticks from 1 / 3n to 1 - 1 / 3n on [0, 1]; the first of two.

    VAR's rule in exact numbers: with K = 10 and n = 4 two scales lie right between two ticks, and rounding must not
    decide which convolution a trained tokenizer uses.

    Example:
        >>> [nearest_tick(k, 10, 4) for k in range(10)]
        [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    """
    place = Fraction(k, max(num_scales - 1, 1))
    first, spacing = Fraction(1, 3 * num_ticks), Fraction(3 * num_ticks - 2, 3 * num_ticks * max(num_ticks - 1, 1))
    return min(range(num_ticks), key=lambda tick: abs(first + tick * spacing - place))


class MultiScaleQuantizer(nn.Module):
    """Shared codebook over all scales, learned by moving averages, with φ convolutions and prefix dropout.

    The codebook starts from residuals of the first batch, follows the mean of what is assigned to each code, and gives
    codes that nobody uses to residuals of the current batch. VAR's released quantizer, learned by gradient, collapses
    to 2 % of its codes on brain MRI.

    Args:
        scales: sides of the token maps, coarse to fine; the last is the latent grid's.
        num_codes: V, size of the codebook.
        latent_channels: C, length of a code.
        num_phi: number of φ convolutions, shared by neighboring scales.
        commitment: weight β of the loss that pulls the encoder to the codes.
        decay: decay of the moving averages, reached after a warm-up of about ``10 / (1 - decay)`` steps.
        restart_below: a code whose moving average of uses per step falls below this is restarted.
        dropout: probability p that a training sample keeps only its first n scales ("scale-aware dropout").
        dropout_start: smallest n.

    Reference:
        Paper Eq. 1-2 and Sec. 4.4.2; Tian et al., Visual Autoregressive Modeling, 2024, Algorithms 1-2.

    Example:
        >>> quantizer = MultiScaleQuantizer((1, 2, 4), num_codes=16, latent_channels=8)
        >>> f = torch.randn(3, 8, 4, 4)
        >>> tokens = quantizer.encode(f)
        >>> tokens.shape, quantizer.decode(tokens).shape
        (torch.Size([3, 21]), torch.Size([3, 8, 4, 4]))
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    num_updates: Tensor

    def __init__(
        self,
        scales: Sequence[int],
        num_codes: int = 4096,
        latent_channels: int = 32,
        num_phi: int = 4,
        commitment: float = 0.25,
        decay: float = 0.99,
        restart_below: float = 0.03,
        dropout: float = 0.1,
        dropout_start: int = 3,
    ) -> None:
        super().__init__()
        self.schedule = ScaleSchedule(scales)
        self.num_codes = num_codes
        self.latent_channels = latent_channels
        self.commitment = commitment
        self.decay = decay
        self.restart_below = restart_below
        self.dropout = dropout
        self.dropout_start = min(dropout_start, self.schedule.num_scales)
        self.register_buffer("codebook", torch.randn(num_codes, latent_channels))
        self.register_buffer("ema_count", torch.ones(num_codes))
        self.register_buffer("ema_sum", self.codebook.clone())
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.phis = nn.ModuleList(Phi(latent_channels) for _ in range(num_phi))
        num_scales = self.schedule.num_scales
        self.phi_of_scale = [nearest_tick(k, num_scales, num_phi) for k in range(num_scales)]
        side = self.schedule.latent_side
        for k, p in enumerate(self.schedule.sides):
            self.register_buffer(f"down_{k}", interpolation_matrix(side, p, "area").float(), persistent=False)
            self.register_buffer(f"up_{k}", interpolation_matrix(p, side, "bicubic").float(), persistent=False)

    def phi(self, k: int) -> nn.Module:
        """Return the φ convolution of scale k."""
        return self.phis[self.phi_of_scale[k]]

    @without_autocast
    def add_scale(self, f_hat: Tensor, tokens: Tensor, k: int) -> Tensor:
        """Add the codes of one scale to the sum of the coarser ones: ``f_hat + φ_k(upsample(codebook[tokens]))``.

        Args:
            f_hat: sum of the scales before k, (B, C, G, G).
            tokens: tokens of scale k, (B, side_k²).
            k: scale, from 0.

        Returns:
            Sum of the scales up to k, (B, C, G, G).
        """
        side = self.schedule.sides[k]
        codes = self.codebook[tokens].mT.unflatten(-1, (side, side))  # (B, C, side, side)
        up = self.get_buffer(f"up_{k}")
        return f_hat + self.phi(k)(resample(codes, up, up))

    @without_autocast
    def to_scale(self, f: Tensor, k: int) -> Tensor:
        """Average a latent grid (B, C, G, G) down to scale k, as a row of positions (B, side_k², C)."""
        down = self.get_buffer(f"down_{k}")
        return resample(f, down, down).flatten(2).mT

    @without_autocast
    def nearest(self, z: Tensor) -> Tensor:
        """Return the nearest code of each vector (..., C), in float32: (...), int64 (paper Eq. 2)."""
        flat = z.reshape(-1, z.shape[-1])
        distance = torch.addmm(self.codebook.square().sum(1), flat, self.codebook.mT, alpha=-2)  # (N, V)
        return distance.argmin(1).view(z.shape[:-1])

    def residual_steps(self, f: Tensor, corrupt: Callable[[Tensor], Tensor] | None = None) -> Iterator[ScaleStep]:
        """Walk through the scales: quantize what is left, add it, go on with the rest (paper Eq. 1).

        Args:
            f: latents, (B, C, G, G), float32.
            corrupt: if given, its result takes the place of the tokens in the sum, so that the tokens of the next scale
                repair the damage (self-correction; Infinity's bitwise self-correction for indices).
        """
        f_hat = torch.zeros_like(f)
        for k in range(self.schedule.num_scales):
            with torch.no_grad():
                residual = self.to_scale(f - f_hat, k)  # (B, side_k², C)
                tokens = self.nearest(residual)  # (B, side_k²)
                summed = tokens if corrupt is None else corrupt(tokens)
            f_hat = self.add_scale(f_hat, summed, k)
            yield ScaleStep(residual, tokens, f_hat)

    @torch.no_grad()
    def encode(self, f: Tensor) -> Tensor:
        """Return the tokens (B, L) of latents (B, C, G, G). A read: it changes no buffer, in training mode either."""
        return torch.cat([step.tokens for step in self.residual_steps(f.to(self.codebook.dtype))], dim=1)

    def decode(self, tokens: Tensor, num_scales: int | None = None) -> Tensor:
        """Sum the codes of tokens (B, L), of the first ``num_scales`` scales only if given: (B, C, G, G)."""
        side = self.schedule.latent_side
        f_hat = self.codebook.new_zeros(len(tokens), self.latent_channels, side, side)
        for k, tokens_k in enumerate(self.schedule.split(tokens)[:num_scales]):
            f_hat = self.add_scale(f_hat, tokens_k, k)
        return f_hat

    @torch.no_grad()
    def neighbors(self, count: int) -> Tensor:
        """Return the ``count`` codes nearest to each code, itself left out, nearest first: (V, count), int64."""
        distance = torch.cdist(self.codebook, self.codebook).fill_diagonal_(torch.inf)
        return distance.topk(min(count, self.num_codes - 1), largest=False).indices

    def forward(self, f: Tensor) -> QuantizerOutput:
        """Quantize latents (B, C, G, G); in training mode also learn the codebook and drop scales."""
        f = f.to(self.codebook.dtype)
        kept = self._sample_prefix_lengths(len(f), f.device)  # (B,)
        quantized, loss = torch.zeros_like(f), f.new_zeros(())
        steps = []
        for k, step in enumerate(self.residual_steps(f.detach())):
            keep = (k < kept).view(-1, 1, 1, 1)
            quantized = torch.where(keep, step.f_hat, quantized)
            error = (step.f_hat - f.detach()).square() + self.commitment * (step.f_hat.detach() - f).square()
            loss = loss + (keep * error).mean()
            steps.append(step)
        loss = loss * len(f) / kept.sum()
        tokens = torch.cat([step.tokens for step in steps], dim=1)
        if self.training:
            self._update_codebook(torch.cat([step.residual for step in steps], dim=1).flatten(0, 1), tokens.flatten())
        return QuantizerOutput(f + (quantized - f).detach(), loss, tokens)

    def _sample_prefix_lengths(self, batch_size: int, device: torch.device) -> Tensor:
        num_scales = self.schedule.num_scales
        full = torch.full((batch_size,), num_scales, device=device)
        if not self.training or self.dropout == 0:
            return full
        prefix = torch.randint(self.dropout_start, num_scales + 1, (batch_size,), device=device)
        return torch.where(torch.rand(batch_size, device=device) < self.dropout, prefix, full)

    @torch.no_grad()
    def initialize_codebook(self, f: Tensor) -> None:
        """Draw the first codes from latents (B, C, G, G): residuals of an unquantized pyramid, all scales alike.

        The trainer calls this once, with the first batch.
        """
        f = f.to(self.codebook.dtype)
        f_hat, residuals = torch.zeros_like(f), []
        for k in range(self.schedule.num_scales):
            side = self.schedule.sides[k]
            z = self.to_scale(f - f_hat, k)  # (B, side_k², C)
            up = self.get_buffer(f"up_{k}")
            f_hat = f_hat + self.phi(k)(resample(z.mT.unflatten(-1, (side, side)), up, up))
            residuals.append(z.flatten(0, 1))
        share = -(-self.num_codes // len(residuals))
        drawn = [z[torch.randint(len(z), (share,), device=z.device)] for z in residuals]
        codes = torch.cat(drawn)[: self.num_codes]
        self._broadcast(codes)
        self.codebook.copy_(codes)
        self.ema_sum.copy_(codes)

    @torch.no_grad()
    def _update_codebook(self, z: Tensor, tokens: Tensor) -> None:
        """Move each code to the mean of its vectors (N, C), given their tokens (N,); restart what is hardly used."""
        count = torch.zeros_like(self.ema_count).index_add_(0, tokens, torch.ones_like(z[:, 0]))
        total = torch.zeros_like(self.ema_sum).index_add_(0, tokens, z)
        fresh = z[torch.randint(len(z), (self.num_codes,), device=z.device)]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
            self._broadcast(fresh)
        self.num_updates += 1
        decay = torch.clamp((1 + self.num_updates) / (10 + self.num_updates), max=self.decay)
        self.ema_count.lerp_(count, 1 - decay)
        self.ema_sum.lerp_(total, 1 - decay)
        dead = self.ema_count < self.restart_below
        self.ema_count.copy_(torch.where(dead, torch.ones_like(self.ema_count), self.ema_count))
        self.ema_sum.copy_(torch.where(dead[:, None], fresh, self.ema_sum))
        self.codebook.copy_(self.ema_sum / self.ema_count[:, None])

    @staticmethod
    def _broadcast(x: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(x, src=0)
