"""From logits to tokens, scale by scale: greedy, top-k, top-p, and the paper's beam search (Algorithm 1).

All strategies share one loop. At each scale, candidate token maps are made from the logits. All candidates pass
through the transformer at the next scale, in one batch over a shared cache; the best is kept, and its logits at the
next scale are reused. Greedy decoding and sampling are the special case of one candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from miar_monai.acceleration.layers import top_two
from miar_monai.errors import check_choice, check_range, check_whole
from miar_monai.networks.attention import KeyValue
from miar_monai.networks.quantizer import MultiScaleQuantizer
from miar_monai.networks.transformer import Context, MIARTransformer

__all__ = [
    "Decoded",
    "Decoding",
    "best_candidates",
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
        lookahead_tokens: the paper's K, the number of tokens of a scale that may take their second choice, which makes
            2^K candidates. Beam only.
        lookahead_scales: number of scales, from the coarsest, whose tokens may branch; 0 (the paper's) for all but the
            last, which has no next scale. The finer ones are the most expensive: passing 2^K candidates through the
            last scale takes most of the time. Beam only.
        alpha: weight α of the margin between first and second choice in Eq. 4.
        selection: ``"uncertain"`` varies the least confident tokens, as in the text of Sec. 3.3; ``"literal"`` the most
            confident, as in the printed Eq. 4.
        score: ``"lookahead"`` ranks candidates by the confidence of the next scale, Eq. 5; ``"joint"`` adds the
            log-probability of the candidate itself.
        top_k: number of codes to sample from. ``"top_k"`` only.
        top_p: probability mass to sample from. ``"top_p"`` only.
        temperature: divides the logits before sampling.
        seed: random seed of sampling.

    Raises:
        SettingError: if a setting is unknown or out of range.

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
            check_choice(name, getattr(self, name), allowed)
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
    def is_stochastic(self) -> bool:
        """Whether tokens are sampled at random."""
        return self.strategy in ("top_k", "top_p")


GREEDY = Decoding()
"""Settings for scales without lookahead."""


class Decoded(NamedTuple):
    """Result of `decode_tokens`."""

    f_hat: Tensor
    """Latents: (B, C, G, G)."""
    tokens: Tensor
    """(B, L · S), int64."""
    score: Tensor
    """Log-probability of all tokens under the network: (B,)."""
    entropy: Tensor | None = None
    """`token_entropy`, averaged over the scales on the latent grid, if requested: (B, 1, G, G)."""


def uncertain_positions(probabilities: Tensor, count: int, alpha: float, selection: str) -> Tensor:
    """Return the positions of the tokens that may take their second choice (paper Eq. 4).

    Args:
        probabilities: probabilities of the first and the second choice, (B, n, 2).
        count: number of tokens, at most n.
        alpha: weight of the margin.
        selection: see `Decoding`.

    Returns:
        (B, count), int64.

    Example:
        >>> p = torch.tensor([[[0.9, 0.05], [0.4, 0.39], [0.6, 0.2]]])
        >>> uncertain_positions(p, 1, 1.0, "uncertain"), uncertain_positions(p, 1, 1.0, "literal")
        (tensor([[1]]), tensor([[0]]))
    """
    first, second = probabilities.unbind(-1)
    confidence = first + alpha * (first - second)
    return confidence.topk(count, dim=-1, largest=selection == "literal").indices


def candidate_maps(log_p: Tensor, codes: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Return the candidate token maps of one scale, the greedy one first, and their log-probabilities.

    Args:
        log_p: log-probabilities of the first and the second choice of each token, (B, n, 2). If there are fewer than
            ``lookahead_tokens`` tokens, all of them branch.
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
    # scores are sums of logarithms, since small probabilities would underflow and tie
    positions = uncertain_positions(log_p.exp(), count, decoding.alpha, decoding.selection)  # (B, count)
    bits = torch.arange(2**count, device=log_p.device)[:, None] >> torch.arange(count, device=log_p.device) & 1
    flips = torch.zeros(len(log_p), len(bits), log_p.shape[1], dtype=torch.bool, device=log_p.device)
    flips.scatter_(2, positions[:, None].expand(-1, len(bits), -1), bits.bool().expand(len(log_p), -1, -1))
    maps, scores = (torch.where(flips, x[:, None, :, 1], x[:, None, :, 0]) for x in (codes, log_p))
    return maps, scores.sum(dim=-1)


def sample_tokens(logits: Tensor, decoding: Decoding, generator: torch.Generator | None = None) -> Tensor:
    """Sample tokens from the ``top_k`` most probable codes, or from the fewest with a total probability of ``top_p``.

    Args:
        logits: (B, n, V).
        decoding: settings.
        generator: random number generator; torch's default one if not given.

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
    sampled = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(*logits.shape[:2], 1)
    return codes.gather(-1, sampled)[..., 0]


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities (B, M) of token maps (B, M, n) under their common logits (B, n, V)."""
    return logits.log_softmax(dim=-1, dtype=torch.float32).gather(2, tokens.mT).sum(dim=1)


def token_entropy(log_p: Tensor, num_positions: int) -> Tensor:
    """Return the normalized entropy at the positions of a scale, from 0 (certain) to 1 (all codes equally probable).

    Args:
        log_p: log-probabilities, (B, n · S, V), the tokens of all codebooks side by side.
        num_positions: n.

    Returns:
        Entropy divided by its maximum log V, averaged over the codebooks: (B, n), float32.

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
        transformer: predicts the logits of a scale.
        quantizer: sums the codes of all scales.
        context: context of the LR images, batch size B.
        decoding: settings.
        with_entropy: also return the entropy of the tokens.

    Returns:
        Latents, tokens, their log-probability, and their entropy if requested.

    Reference:
        Paper Sec. 3.3, Algorithm 1. The logits of the next scale give the scores of the candidates and, for the best
        one, the next tokens, so each scale is computed only once.
    """
    schedule, num_scales = quantizer.schedule, quantizer.schedule.num_scales
    side = schedule.latent_side
    f_hat = quantizer.codebook.new_zeros(len(context.start), quantizer.latent_channels, side, side)
    generator = torch.Generator(f_hat.device).manual_seed(decoding.seed) if decoding.is_stochastic else None
    branching_scales = min(num_scales - 1, decoding.lookahead_scales or num_scales)
    cache: list[KeyValue] | None = None
    chosen: list[Tensor] = []  # of each scale
    scores: list[Tensor] = []
    entropies: list[Tensor] = []
    num_maps = 1  # M, candidates of each sample at the previous scale
    for k in range(num_scales):
        inputs = quantizer.to_scale(f_hat, k) if k > 0 else None
        logits, cache = transformer.step(inputs, k, context, cache)  # (B · M, n_k, V)
        if generator is not None:
            maps = sample_tokens(logits, decoding, generator)[:, None]  # (B, 1, n_k)
            map_scores = log_probability(logits, maps)  # (B, 1)
        else:
            log_p, codes = top_two(logits)  # (B · M, n_k, 2)
            if num_maps > 1:
                best = best_candidates(log_p, scores[-1], num_maps, decoding.score)  # (B,)
                log_p, codes, f_hat = log_p[best], codes[best], f_hat[best]
                chosen[-1], scores[-1] = chosen[-1][best], scores[-1][best]
                cache = [key_value.select(best) for key_value in cache]
                logits = logits[best] if with_entropy else logits
            maps, map_scores = candidate_maps(log_p, codes, decoding if k < branching_scales else GREEDY)
        if with_entropy:
            entropy = token_entropy(logits.log_softmax(dim=-1, dtype=torch.float32), schedule.sides[k] ** 2)  # (B, n_k)
            entropies.append(quantizer.upsample(entropy[:, None], k))
        num_maps = maps.shape[1]
        chosen.append(maps.flatten(0, 1))  # (B · M, n_k)
        scores.append(map_scores.flatten())  # (B · M,)
        if num_maps > 1:
            f_hat = f_hat.repeat_interleave(num_maps, dim=0)
        f_hat = quantizer.add_scale(f_hat, chosen[-1], k)
    mean_entropy = torch.stack(entropies).mean(dim=0) if with_entropy else None
    return Decoded(f_hat, torch.cat(chosen, dim=1), torch.stack(scores).sum(dim=0), mean_entropy)


def best_candidates(log_p: Tensor, scores: Tensor, num_candidates: int, score: str) -> Tensor:
    """Return the row of the best of M candidates of each sample, from the logits of the next scale (paper Eq. 5).

    Args:
        log_p: log-probabilities of the first and the second choice of the next scale, (B · M, n, 2).
        scores: log-probabilities of the candidates, (B · M,).
        num_candidates: M.
        score: see `Decoding`.

    Returns:
        (B,), int64.

    Example:
        >>> log_p = torch.tensor([0.3, 0.4, 0.9, 0.8]).log().view(4, 1, 1).expand(-1, -1, 2)
        >>> best_candidates(log_p, torch.zeros(4), 2, "lookahead")
        tensor([1, 2])
    """
    ranking = log_p[..., 0].sum(dim=-1)  # confidence of the next scale
    if score == "joint":
        ranking = ranking + scores
    first = torch.arange(0, len(ranking), num_candidates, device=ranking.device)
    return first + ranking.view(-1, num_candidates).argmax(dim=1)
