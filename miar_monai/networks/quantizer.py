"""Multi-scale residual quantization of a latent grid into token maps, coarse to fine (paper Eq. 1 and 2, VAR).

Encoding, decoding, teacher forcing and inference all sum the scales by `MultiScaleQuantizer.add_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.degradation.resampling import interpolation_matrix
from miar_monai.errors import ConfigurationError
from miar_monai.networks.phi import Phi, nearest_tick
from miar_monai.networks.schedule import ScaleSchedule

__all__ = ["MultiScaleQuantizer", "QuantizerOutput"]


P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(method: Callable[P, R]) -> Callable[P, R]:
    """Disable autocast in a method: a sum over ten scales must not be rounded to bfloat16."""

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
    """The residual, averaged down to this scale: (B, side_k², C)."""
    tokens: Tensor
    """Indices of the nearest codes: (B, side_k² · S), int64."""
    f_hat: Tensor
    """Sum of all scales so far: (B, C, G, G)."""


class QuantizerOutput(NamedTuple):
    """Result of a training pass."""

    f_hat: Tensor
    """Quantized latents with a straight-through gradient: (B, C, G, G)."""
    loss: Tensor
    """Commitment loss plus the loss of the φ convolutions: scalar."""
    tokens: Tensor
    """Tokens of all scales: (B, L · S), int64."""


class MultiScaleQuantizer(nn.Module):
    """Codebooks shared by all scales, learned by moving averages, with φ convolutions and prefix dropout.

    With S codebooks (product quantization), each encodes a part of the channels, and each position has S tokens side
    by side. The paper's single codebook of 4096 codes gives 12 bits per position; twelve codebooks of 256 codes give 96
    bits with three quarters of the logits. Channel c belongs to codebook c mod S, which distributes channels of high
    and of low variance evenly: the encoder's cosine transform sorts them by frequency.

    Codes are initialized with residuals of the first batch, track the mean of the vectors assigned to them, and are
    reset to residuals of the current batch if unused. The released quantizer of VAR, learned by gradient descent,
    collapses to 2 % of its codes on brain MRI.

    Args:
        scales: sides of the token maps, coarse to fine; the last is the latent grid's.
        num_codes: V, size of a codebook.
        latent_channels: C, channels of the latent grid, a multiple of S.
        num_phi: number of φ convolutions, shared by neighboring scales.
        commitment: weight β of the commitment loss of the encoder.
        decay: decay of the moving averages, reached after a warm-up of about ``10 / (1 - decay)`` steps.
        restart_below: codes whose moving average of uses per step is below this are reset.
        dropout: probability that a training sample keeps only its first n scales ("scale-aware dropout").
        dropout_start: minimum of n.
        num_codebooks: S.

    Raises:
        ConfigurationError: if ``latent_channels`` is not a multiple of ``num_codebooks``.

    Reference:
        Paper Eq. 1-2 and Sec. 4.4.2; Tian et al., Visual Autoregressive Modeling, 2024, Algorithms 1-2; Jégou et al.,
        Product Quantization for Nearest Neighbor Search, 2011.

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
        num_codebooks: int = 1,
    ) -> None:
        super().__init__()
        if num_codebooks < 1 or latent_channels % num_codebooks:
            raise ConfigurationError(
                f"num_codebooks is {num_codebooks}, but it must divide the {latent_channels} latent_channels; correct"
                " the settings."
            )
        self.num_codebooks = num_codebooks
        self.schedule = ScaleSchedule(scales)
        self.num_codes = num_codes
        self.latent_channels = latent_channels
        self.commitment = commitment
        self.decay = decay
        self.restart_below = restart_below
        self.dropout = dropout
        self.dropout_start = min(dropout_start, self.schedule.num_scales)
        self.register_buffer(
            "codebook", torch.randn(num_codes, latent_channels)
        )  # row v: code v of all codebooks, interleaved
        self.register_buffer("ema_count", torch.ones(num_codes * num_codebooks))
        self.register_buffer("ema_sum", self.codebook.clone())
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.phis = nn.ModuleList(Phi(latent_channels) for _ in range(num_phi))
        num_scales = self.schedule.num_scales
        self.phi_of_scale = [nearest_tick(k, num_scales, num_phi) for k in range(num_scales)]
        side = self.schedule.latent_side
        for k, p in enumerate(self.schedule.sides):
            down, up = interpolation_matrix(side, p, "area"), interpolation_matrix(p, side, "bicubic")
            self.register_buffer(f"down_{k}", torch.kron(down, down).float(), persistent=False)  # (p², G²)
            self.register_buffer(f"up_{k}", torch.kron(up, up).float(), persistent=False)  # (G², p²)

    def codes(self) -> Tensor:
        """Return the codes of each codebook: (S, V, C / S)."""
        return self.codebook.unflatten(1, (-1, self.num_codebooks)).permute(2, 0, 1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes (B, C, n) of tokens (B, n · S)."""
        books = torch.arange(self.num_codebooks, device=tokens.device)
        codes = self.codes()[books, tokens.unflatten(1, (-1, self.num_codebooks))]  # (B, n, S, C / S)
        return codes.permute(0, 3, 2, 1).flatten(1, 2)

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Split tokens (B, L · S) by scale, (B, side_k² · S) each."""
        return tokens.split([side * side * self.num_codebooks for side in self.schedule.sides], dim=1)

    def usage(self, tokens: Tensor) -> Tensor:
        """Count the occurrences of each code, by scale and codebook, in tokens (B, L · S): (K, S, V), int64."""
        index = tokens.unflatten(1, (-1, self.num_codebooks))  # (B, L, S)
        levels = self.schedule.levels().to(tokens.device)[:, None]  # (L, 1)
        books = torch.arange(self.num_codebooks, device=tokens.device)
        index = (levels * self.num_codebooks + books) * self.num_codes + index
        shape = (self.schedule.num_scales, self.num_codebooks, self.num_codes)
        size = self.schedule.num_scales * self.num_codebooks * self.num_codes
        return index.flatten().bincount(minlength=size).view(shape)

    def phi(self, k: int) -> nn.Module:
        """Return the φ convolution of scale k."""
        return self.phis[self.phi_of_scale[k]]

    @without_autocast
    def upsample(self, x: Tensor, k: int) -> Tensor:
        """Upsample a flattened map of scale k, (B, C, side_k²), to the latent grid: (B, C, G, G)."""
        up, side = self.get_buffer(f"up_{k}"), self.schedule.latent_side
        return F.linear(x.to(up.dtype), up).unflatten(2, (side, side))

    @without_autocast
    def add_scale(self, f_hat: Tensor, tokens: Tensor, k: int) -> Tensor:
        """Add one scale to the sum of the coarser ones: ``f_hat + φ_k(upsample(codebook[tokens]))``.

        Args:
            f_hat: sum of the scales before k, (B, C, G, G).
            tokens: tokens of scale k, (B, side_k² · S).
            k: scale, from 0.

        Returns:
            Sum of the scales up to k, (B, C, G, G).
        """
        return f_hat + self.phi(k)(self.upsample(self.lookup(tokens), k))

    @without_autocast
    def to_scale(self, f: Tensor, k: int) -> Tensor:
        """Average a latent grid (B, C, G, G) down to scale k, flattened: (B, side_k², C)."""
        return F.linear(f.flatten(2), self.get_buffer(f"down_{k}")).mT

    @without_autocast
    def nearest(self, z: Tensor) -> Tensor:
        """Return the indices of the nearest codes of vectors (B, n, C): (B, n · S), int64 (paper Eq. 2)."""
        codes, parts = self.codes(), z.unflatten(2, (-1, self.num_codebooks)).movedim(3, 0)  # (S, B, n, C / S)
        norms = codes.square().sum(2)[:, None]  # (S, 1, V)
        distance = torch.baddbmm(norms, parts.flatten(1, 2), codes.mT, alpha=-2)  # (S, B · n, V)
        return distance.argmin(2).view(parts.shape[:-1]).movedim(0, 2).flatten(1)

    def residual_steps(self, f: Tensor, corrupt: Callable[[Tensor], Tensor] | None = None) -> Iterator[ScaleStep]:
        """Yield the scales, each of which quantizes the residual of the coarser ones (paper Eq. 1).

        Args:
            f: latents, (B, C, G, G), float32.
            corrupt: replaces the tokens in the sum, so that the next scales learn to correct errors (Infinity's bitwise
                self-correction, for indices).
        """
        f_hat = torch.zeros_like(f)
        for k in range(self.schedule.num_scales):
            with torch.no_grad():
                residual = self.to_scale(f - f_hat, k)  # (B, side_k², C)
                tokens = self.nearest(residual)  # (B, side_k² · S)
                summed = tokens if corrupt is None else corrupt(tokens)
            f_hat = self.add_scale(f_hat, summed, k)
            yield ScaleStep(residual, tokens, f_hat)

    @torch.no_grad()
    def encode(self, f: Tensor) -> Tensor:
        """Encode latents (B, C, G, G) as tokens (B, L · S), without updating the codebook."""
        return torch.cat([step.tokens for step in self.residual_steps(f.to(self.codebook.dtype))], dim=1)

    def decode(self, tokens: Tensor, num_scales: int | None = None) -> Tensor:
        """Decode tokens (B, L · S), or only those of the first ``num_scales`` scales, to latents (B, C, G, G)."""
        side = self.schedule.latent_side
        f_hat = self.codebook.new_zeros(len(tokens), self.latent_channels, side, side)
        for k, tokens_k in enumerate(self.split(tokens)[:num_scales]):
            f_hat = self.add_scale(f_hat, tokens_k, k)
        return f_hat

    @torch.no_grad()
    def neighbors(self, count: int) -> Tensor:
        """Return the ``count`` nearest other codes of each code, nearest first: (S, V, count), int64."""
        codes = self.codes()
        distance = torch.cdist(codes, codes)  # (S, V, V)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        return distance.topk(min(count, self.num_codes - 1), largest=False).indices

    def forward(self, f: Tensor) -> QuantizerOutput:
        """Quantize latents (B, C, G, G); in training mode also update the codebook and drop scales."""
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
    @without_autocast
    def initialize_codebook(self, f: Tensor) -> None:
        """Initialize the codes with residuals of latents (B, C, G, G), equally many from each scale.

        The residuals are those of an unquantized pyramid. The trainer calls this once, with the first batch.
        """
        f = f.to(self.codebook.dtype)
        f_hat, residuals = torch.zeros_like(f), []
        for k in range(self.schedule.num_scales):
            z = self.to_scale(f - f_hat, k)  # (B, side_k², C)
            f_hat = f_hat + self.phi(k)(self.upsample(z.mT, k))
            residuals.append(z.flatten(0, 1))
        count = -(-self.num_codes // len(residuals))  # per scale, rounded up
        samples = [z[torch.randint(len(z), (count,), device=z.device)] for z in residuals]
        codes = torch.cat(samples)[: self.num_codes]
        self._broadcast(codes)
        self.codebook.copy_(codes)
        self.ema_sum.copy_(codes)

    @torch.no_grad()
    def _update_codebook(self, z: Tensor, tokens: Tensor) -> None:
        """Move codes towards the mean of their vectors (N, C), given the tokens (N · S,); reset rarely used codes."""
        rows = tokens.view(len(z), -1) * self.num_codebooks + torch.arange(self.num_codebooks, device=z.device)
        rows = rows.flatten()  # row v · S + s: code v of codebook s
        parts = z.unflatten(1, (-1, self.num_codebooks)).mT.reshape(rows.numel(), -1)  # (N · S, C / S)
        count = torch.zeros_like(self.ema_count).index_add_(0, rows, torch.ones_like(parts[:, 0]))
        total = parts.new_zeros(len(count), parts.shape[1]).index_add_(0, rows, parts)
        total = total.unflatten(0, (-1, self.num_codebooks)).mT.flatten(1)  # (V, C)
        replacements = z[torch.randint(len(z), (self.num_codes,), device=z.device)]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
            self._broadcast(replacements)
        self.num_updates += 1
        decay = torch.clamp((1 + self.num_updates) / (10 + self.num_updates), max=self.decay)
        self.ema_count.lerp_(count, 1 - decay)
        self.ema_sum.lerp_(total, 1 - decay)
        unused = self.ema_count < self.restart_below
        self.ema_count.copy_(torch.where(unused, torch.ones_like(self.ema_count), self.ema_count))
        length = self.latent_channels // self.num_codebooks
        unused, count = (x.view(self.num_codes, -1).repeat(1, length) for x in (unused, self.ema_count))  # (V, C)
        self.ema_sum.copy_(torch.where(unused, replacements, self.ema_sum))  # (V, C)
        self.codebook.copy_(self.ema_sum / count)

    @staticmethod
    def _broadcast(x: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(x, src=0)
