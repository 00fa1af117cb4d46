"""From logits to tokens, scale by scale: greedy, top-k, top-p, and the paper's beam search (Algorithm 1).

All strategies are one loop. At each scale a few candidate token maps are made from the logits; each goes through the
network as input of the next scale, all candidates in one batch over a shared cache; the best is kept, and what the
network computed for it is already the next step. Greedy decoding and sampling are the case of one candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from miar_monai.acceleration.layers import top_two
from miar_monai.errors import SettingError, check_range, check_whole

if TYPE_CHECKING:  # the networks import this module
    from miar_monai.networks.quantizer import MultiScaleQuantizer
    from miar_monai.networks.transformer import Context, MIARTransformer

__all__ = [
    "Decoded",
    "Decoding",
    "candidate_maps",
    "decode_tokens",
    "sample_tokens",
    "token_entropy",
    "uncertain_positions",
]

STRATEGIES = ("greedy", "beam", "top_k", "top_p")


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding.

    Args:
        strategy: ``"greedy"``, ``"beam"`` (paper Algorithm 1: one-step lookahead), ``"top_k"`` or ``"top_p"``.
        lookahead_tokens: the paper's K: tokens of a scale that may take their second choice; 2^K candidates. Beam only.
        lookahead_scales: scales whose tokens may branch, from the coarsest; 0, the paper's, is all but the last, which
            has nothing to look ahead to. The finest of these cost most: where 2^K candidates go through the last
            scale, it takes most of the time. Beam only.
        alpha: weight α of the margin between first and second choice in Eq. 4.
        selection: ``"uncertain"`` lets the least confident tokens vary, as the text of Sec. 3.3 says; ``"literal"`` the
            most confident, as Eq. 4 is printed.
        score: ``"lookahead"`` ranks a candidate by the confidence of the next scale, Eq. 5; ``"joint"`` adds the
            log-probability of the candidate itself.
        top_k: number of codes to sample from. ``"top_k"`` only.
        top_p: probability mass to sample from. ``"top_p"`` only.
        temperature: divides the logits before sampling.
        seed: of sampling; equal seeds give equal images.

    Raises:
        ConfigurationError: if a setting is unknown or out of range.

    Example:
        >>> Decoding("beam", lookahead_tokens=2).num_branching
        2
        >>> Decoding("greedy", lookahead_tokens=2).num_branching
        0
    """

    strategy: str = "greedy"
    lookahead_tokens: int = 1
    alpha: float = 1.0
    selection: str = "uncertain"
    score: str = "lookahead"
    top_k: int = 900
    top_p: float = 0.96
    temperature: float = 1.0
    seed: int = 0
    lookahead_scales: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("strategy", STRATEGIES),
            ("selection", ("uncertain", "literal")),
            ("score", ("lookahead", "joint")),
        ):
            if getattr(self, name) not in allowed:
                raise SettingError(
                    f"{name} is {getattr(self, name)!r}, but it must be one of {', '.join(allowed)};"
                    " correct the setting."
                )
        for name in ("lookahead_tokens", "lookahead_scales", "top_k", "seed"):
            check_whole(name, getattr(self, name))
        for name, low, high in (
            ("lookahead_tokens", 0, 8),
            ("lookahead_scales", 0, float("inf")),
            ("alpha", 0, float("inf")),
            ("top_k", 1, float("inf")),
            ("top_p", 1e-6, 1),
            ("temperature", 1e-6, float("inf")),
        ):
            check_range(name, getattr(self, name), low, high)

    @property
    def num_branching(self) -> int:
        """Number of tokens of a scale that branch."""
        return self.lookahead_tokens if self.strategy == "beam" else 0

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.strategy in ("top_k", "top_p")


GREEDY = Decoding()
"""What is left where nothing is looked ahead to."""


class Decoded(NamedTuple):
    """Result of `decode_tokens`."""

    f_hat: Tensor
    """Latents: (B, C, G, G)."""
    tokens: Tensor
    """(B, L · S), int64."""
    score: Tensor
    """Log-probability of all tokens under the network: (B,)."""
    entropy: Tensor | None = None
    """How undecided the network was, if that was asked for, see `token_entropy`; the mean of the scales on the latent
    grid: (B, 1, G, G)."""


def uncertain_positions(probabilities: Tensor, count: int, alpha: float, selection: str) -> Tensor:
    """Choose the tokens that may take their second choice (paper Eq. 4).

    Args:
        probabilities: of the first and the second choice, (B, n, 2).
        count: number of tokens, at most n.
        alpha: weight of the margin.
        selection: see `Decoding`.

    Returns:
        Positions, (B, count), int64.

    Example:
        >>> p = torch.tensor([[[0.9, 0.05], [0.4, 0.39], [0.6, 0.2]]])
        >>> uncertain_positions(p, 1, 1.0, "uncertain"), uncertain_positions(p, 1, 1.0, "literal")
        (tensor([[1]]), tensor([[0]]))
    """
    first, second = probabilities.unbind(-1)
    confidence = first + alpha * (first - second)
    return confidence.topk(count, dim=-1, largest=selection == "literal").indices


def candidate_maps(log_p: Tensor, codes: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Return the candidate token maps of one scale, the greedy one first, and how probable they are.

    Args:
        log_p: log-probabilities of the first and the second choice of each token, (B, n, 2). A scale with fewer than
            ``lookahead_tokens`` tokens branches at all of them.
        codes: the choices, (B, n, 2).
        decoding: settings.

    Returns:
        Maps, (B, 2^count, n), int64, and the sums of their log-probabilities, (B, 2^count).

    Example:
        >>> log_p = torch.tensor([[[0.6, 0.3], [0.8, 0.15]]]).log()
        >>> maps, score = candidate_maps(log_p, torch.tensor([[[0, 1], [0, 2]]]), Decoding("beam", lookahead_tokens=1))
        >>> maps, score.exp()
        (tensor([[[0, 0],
                 [1, 0]]]), tensor([[0.4800, 0.2400]]))
    """
    count = min(decoding.num_branching, log_p.shape[1])
    if count == 0:
        return codes[:, None, :, 0], log_p[:, None, :, 0].sum(dim=-1)
    # as logarithms, no second choice underflows to a tie
    positions = uncertain_positions(log_p.exp(), count, decoding.alpha, decoding.selection)  # (B, count)
    bits = torch.arange(2**count, device=log_p.device)[:, None] >> torch.arange(count, device=log_p.device) & 1
    flips = torch.zeros(len(log_p), len(bits), log_p.shape[1], dtype=torch.bool, device=log_p.device)
    flips.scatter_(2, positions[:, None].expand(-1, len(bits), -1), bits.bool().expand(len(log_p), -1, -1))
    maps, scores = (torch.where(flips, x[:, None, :, 1], x[:, None, :, 0]) for x in (codes, log_p))
    return maps, scores.sum(dim=-1)


def sample_tokens(logits: Tensor, decoding: Decoding, generator: torch.Generator | None = None) -> Tensor:
    """Draw tokens from the ``top_k`` most probable codes, or from the fewest that hold ``top_p`` of the probability.

    Args:
        logits: (B, n, V).
        decoding: settings.
        generator: source of randomness; torch's own by default.

    Returns:
        (B, n), int64.
    """
    logits = logits.float() / decoding.temperature
    ordered, codes = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    if decoding.strategy == "top_k":
        probabilities[..., decoding.top_k :] = 0
    else:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= decoding.top_p] = 0
    drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(*logits.shape[:2], 1)
    return codes.gather(-1, drawn)[..., 0]


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the summed log-probability of token maps (B, M, n) under the logits (B, n, V) they share: (B, M)."""
    return logits.log_softmax(dim=-1, dtype=torch.float32).gather(2, tokens.mT).sum(dim=1)


def token_entropy(log_p: Tensor, num_positions: int) -> Tensor:
    """Return how undecided a network is at the positions of a scale, from 0, certain, to 1, all codes alike.

    Args:
        log_p: logarithms of probabilities, (B, n · S, V), the tokens of all codebooks side by side.
        num_positions: n.

    Returns:
        Entropy over its maximum log V, the mean of the codebooks: (B, n), float32.

    Example:
        >>> token_entropy(torch.tensor([[[0.5, 0.5], [1 - 1e-9, 1e-9]]]).log(), 2).round(decimals=3)
        tensor([[1., 0.]])
    """
    entropy = (log_p.exp() * -log_p).sum(dim=-1) / math.log(log_p.shape[-1])
    return entropy.unflatten(1, (num_positions, -1)).mean(dim=-1)


def decode_tokens(
    transformer: MIARTransformer,
    quantizer: MultiScaleQuantizer,
    context: Context,
    decoding: Decoding,
    with_entropy: bool = False,
) -> Decoded:
    """Predict the tokens of all scales.

    Args:
        transformer: gives the logits of a scale.
        quantizer: turns tokens into the sum of scales.
        context: of the LR images, batch size B.
        decoding: settings.
        with_entropy: return the entropy of the tokens too.

    Returns:
        Latents, tokens, their log-probability, and their entropy if asked for.

    Reference:
        Paper Sec. 3.3, Algorithm 1. Each candidate's pass over the next scale serves its score and, for the winner, the
        next step too: nothing is computed twice.
    """
    batch_size, side = len(context.start), quantizer.schedule.latent_side
    f_hat = quantizer.codebook.new_zeros(batch_size, quantizer.latent_channels, side, side)
    generator = torch.Generator(f_hat.device).manual_seed(decoding.seed) if decoding.samples else None
    logits, cache = transformer.step(None, 0, context, None)
    log_p, codes = top_two(logits)  # (B, n_0, 2)
    branching_scales = quantizer.schedule.num_scales - 1
    if decoding.lookahead_scales:
        branching_scales = min(branching_scales, decoding.lookahead_scales)
    chosen, scores, entropies = [], [], []
    for k, scale_side in enumerate(quantizer.schedule.sides):
        if with_entropy:
            entropy = token_entropy(logits.log_softmax(dim=-1, dtype=torch.float32), scale_side**2)  # (B, n_k)
            entropies.append(quantizer.upsample(entropy[:, None], k))
        is_last = k + 1 == quantizer.schedule.num_scales
        if decoding.samples:
            maps = sample_tokens(logits, decoding, generator)[:, None]  # (B, M, n_k)
            own_score = log_probability(logits, maps)
        else:
            maps, own_score = candidate_maps(log_p, codes, decoding if k < branching_scales else GREEDY)
        num_maps = maps.shape[1]
        own_score, tokens = own_score.flatten(), maps.flatten(0, 1)  # (B · M,), (B · M, n_k)
        if num_maps > 1:
            f_hat = f_hat.repeat_interleave(num_maps, dim=0)
        f_hat = quantizer.add_scale(f_hat, tokens, k)
        if not is_last:
            logits, cache = transformer.step(quantizer.to_scale(f_hat, k + 1), k + 1, context, cache)  # (B · M, …, V)
            log_p, codes = top_two(logits)  # (B · M, n_(k + 1), 2)
        if num_maps > 1:
            ranking = log_p[..., 0].sum(dim=-1)  # confidence of the next scale (paper Eq. 5), (B · M,)
            if decoding.score == "joint":
                ranking = ranking + own_score
            first = torch.arange(0, len(ranking), num_maps, device=ranking.device)
            rows = first + ranking.view(batch_size, num_maps).argmax(dim=1)  # the winners, (B,)
            log_p, codes, own_score, tokens, f_hat = (x[rows] for x in (log_p, codes, own_score, tokens, f_hat))
            cache = [kv.select(rows) for kv in cache]
            if with_entropy:
                logits = logits[rows]
        scores.append(own_score)
        chosen.append(tokens)
    mean_entropy = torch.stack(entropies).mean(dim=0) if with_entropy else None
    return Decoded(f_hat, torch.cat(chosen, dim=1), torch.stack(scores).sum(dim=0), mean_entropy)
