from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.tiny import CHANNELS, CONTEXT, SCALES, tiny_quantizer, tiny_transformer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miar_monai.acceleration.layers import top_two
from miar_monai.errors import ConfigurationError
from miar_monai.networks import MIARTransformer
from miar_monai.networks.decoding import (
    Decoded,
    Decoding,
    candidate_maps,
    decode_tokens,
    sample_tokens,
    uncertain_positions,
)
from miar_monai.networks.quantizer import MultiScaleQuantizer

NETWORKS = tuple[MIARTransformer, MultiScaleQuantizer]


@pytest.fixture(params=[1, 2], ids=["one codebook", "two codebooks"])
def networks(request: pytest.FixtureRequest) -> NETWORKS:
    transformer, quantizer = (make(num_codebooks=request.param) for make in (tiny_transformer, tiny_quantizer))
    return transformer.requires_grad_(False), quantizer.eval().requires_grad_(False)


def features(batch_size: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, CONTEXT, SCALES[-1], SCALES[-1], generator=generator, dtype=torch.float64)


def decode(networks: NETWORKS, f_lr: Tensor, **settings: Any) -> Decoded:
    return decode_tokens(*networks, networks[0].context(f_lr), Decoding(**settings))


def inputs_of(quantizer: MultiScaleQuantizer, maps: list[Tensor]) -> Tensor:
    """Return the transformer's inputs (1, L - 1, C) of the token maps of the first scales, padded with zeros."""
    schedule = quantizer.schedule
    inputs = torch.zeros(1, schedule.num_tokens - 1, CHANNELS, dtype=torch.float64)
    f_hat = torch.zeros(1, CHANNELS, schedule.latent_side, schedule.latent_side, dtype=torch.float64)
    for k, tokens in enumerate(maps[: schedule.num_scales - 1]):
        f_hat = quantizer.add_scale(f_hat, tokens[None], k)
        first, last = schedule.bounds[k + 1]
        inputs[:, first - 1 : last - 1] = quantizer.to_scale(f_hat, k + 1)
    return inputs


def naive_lookahead(networks: NETWORKS, f_lr: Tensor, decoding: Decoding) -> Tensor:
    """Decode one sample, passing each candidate separately through the whole masked transformer: (L · S,)."""
    transformer, quantizer = networks

    def log_probabilities(maps: list[Tensor]) -> Tensor:
        logits = transformer(inputs_of(quantizer, maps), transformer.context(f_lr))
        return quantizer.split(logits)[len(maps)][0].log_softmax(dim=-1)

    chosen: list[Tensor] = []
    for k in range(len(SCALES) - 1):
        log_p = log_probabilities(chosen)
        order = log_p.argsort(dim=-1, descending=True)
        first, second = (log_p.gather(1, order[:, i : i + 1])[:, 0].exp().tolist() for i in (0, 1))
        confidence = [p + decoding.alpha * (p - q) for p, q in zip(first, second, strict=True)]
        positions = sorted(range(len(confidence)), key=confidence.__getitem__, reverse=decoding.selection == "literal")
        scored = []
        branches = not decoding.lookahead_scales or k < decoding.lookahead_scales
        for flips in itertools.product((0, 1), repeat=min(decoding.lookahead_tokens, len(log_p)) * branches):
            candidate = order[:, 0].clone()
            for position, flip in zip(positions, flips, strict=False):
                candidate[position] = order[position, flip]
            score = log_probabilities([*chosen, candidate]).amax(dim=-1).sum().item()
            if decoding.score == "joint":
                score += log_p.gather(1, candidate[:, None]).sum().item()
            scored.append((score, candidate))
        chosen.append(max(scored, key=lambda pair: pair[0])[1])
    return torch.cat([*chosen, log_probabilities(chosen).argmax(dim=-1)])


@pytest.mark.parametrize("selection", ["uncertain", "literal"])
@pytest.mark.parametrize("score", ["lookahead", "joint"])
@pytest.mark.parametrize("lookahead_tokens", [1, 2, 3])
def test_batched_lookahead_is_algorithm_1(
    networks: NETWORKS, lookahead_tokens: int, score: str, selection: str
) -> None:
    settings = {"strategy": "beam", "lookahead_tokens": lookahead_tokens, "score": score, "selection": selection}
    for scales in (0, 1, len(SCALES)):
        result = decode(networks, features(), **settings, lookahead_scales=scales).tokens
        for tokens, f_lr in zip(result, features(), strict=True):
            expected = naive_lookahead(networks, f_lr[None], Decoding(**settings, lookahead_scales=scales))
            assert torch.equal(tokens, expected)
    if selection == "uncertain" and score == "lookahead":
        assert not torch.equal(result, decode(networks, features()).tokens)


def test_greedy_decoding_takes_the_most_probable_code_at_every_position(networks: NETWORKS) -> None:
    result = decode(networks, features(2)).tokens
    for tokens, f_lr in zip(result, features(2), strict=True):
        maps = [tokens_k[0] for tokens_k in networks[1].split(tokens[None])]
        logits = networks[0](inputs_of(networks[1], maps), networks[0].context(f_lr[None]))
        assert torch.equal(tokens, logits[0].argmax(dim=-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "beam", "lookahead_tokens": 0},
        {"strategy": "top_k", "top_k": 1},
        {"strategy": "top_p", "top_p": 1e-6},
        {"strategy": "top_k", "temperature": 1e-6},
        {"strategy": "greedy", "lookahead_tokens": 3, "temperature": 7.0, "seed": 5},
    ],
)
def test_limiting_cases_are_greedy_decoding(networks: NETWORKS, settings: dict[str, Any]) -> None:
    greedy, limit = decode(networks, features()), decode(networks, features(), **settings)
    assert torch.equal(limit.tokens, greedy.tokens)
    torch.testing.assert_close(limit.f_hat, greedy.f_hat)
    torch.testing.assert_close(limit.score, greedy.score)


@pytest.mark.parametrize(
    "settings",
    [{}, {"strategy": "beam", "lookahead_tokens": 2}, {"strategy": "top_p"}, {"strategy": "top_k", "top_k": 5}],
)
def test_score_and_latents_match_the_tokens(networks: NETWORKS, settings: dict[str, Any]) -> None:
    transformer, quantizer = networks
    result = decode(networks, features(), **settings)
    torch.testing.assert_close(result.f_hat, quantizer.decode(result.tokens))
    for tokens, score, f_lr in zip(result.tokens, result.score, features(), strict=True):
        maps = [tokens_k[0] for tokens_k in quantizer.split(tokens[None])]
        logits = transformer(inputs_of(quantizer, maps), transformer.context(f_lr[None]))[0]
        expected = logits.log_softmax(dim=-1).gather(1, tokens[:, None]).sum()
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_samples_of_a_batch_are_independent(networks: NETWORKS, strategy: str) -> None:
    batch = decode(networks, features(5), strategy=strategy, lookahead_tokens=2)
    for i in range(5):
        single = decode(networks, features(5)[i : i + 1], strategy=strategy, lookahead_tokens=2)
        assert torch.equal(single.tokens[0], batch.tokens[i])
        torch.testing.assert_close(single.f_hat[0], batch.f_hat[i], rtol=0, atol=1e-12)


def test_sampling_depends_on_its_seed_and_leaves_the_global_random_state(networks: NETWORKS) -> None:
    state = torch.get_rng_state()
    first, again, other = (decode(networks, features(), strategy="top_k", seed=seed).tokens for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("lookahead_tokens", "scales"), [(0, 0), (1, 0), (3, 0), (8, 0), (3, 1), (3, 9)])
def test_each_scale_takes_one_step_of_the_network(
    networks: NETWORKS, monkeypatch: pytest.MonkeyPatch, lookahead_tokens: int, scales: int
) -> None:
    calls, step = [], networks[0].step

    def counted(inputs: Any, k: int, context: Any, cache: Any) -> Any:
        cached = 0 if cache is None else cache[0].key.shape[1]
        calls.append((k, 3 if inputs is None else len(inputs), cached))
        assert len(context.start) == 3  # shared by the candidates
        assert cache is None or len(cache[0].key if cache[0].rows is None else cache[0].rows) == 3
        return step(inputs, k, context, cache)

    monkeypatch.setattr(networks[0], "step", counted)
    decode(networks, features(3), strategy="beam", lookahead_tokens=lookahead_tokens, lookahead_scales=scales)
    books = networks[1].num_codebooks
    branches = [side * side * books * (not scales or k < scales) for k, side in enumerate(SCALES[:-1])]
    sizes = [3, *(3 * 2 ** min(lookahead_tokens, count) for count in branches)]
    assert calls == [(k, sizes[k], networks[0].schedule.bounds[k][0]) for k in range(len(SCALES))]


@given(st.integers(1, 6), st.integers(0, 4), st.sampled_from(["uncertain", "literal"]))
def test_candidates_are_all_combinations_of_second_choices(n: int, count: int, selection: str) -> None:
    logits = (30 * torch.randn(2, n, 5)).log_softmax(dim=-1)  # many probabilities of second choices underflow
    two = top_two(logits)
    maps, scores = candidate_maps(*two, Decoding("beam", lookahead_tokens=count, selection=selection))
    torch.testing.assert_close(scores, logits.gather(2, maps.mT).sum(dim=1))
    ranked = logits.argsort(dim=-1, descending=True)
    for sample, order in zip(maps, ranked, strict=True):
        assert torch.equal(sample[0], order[:, 0])
        assert len(sample.unique(dim=0)) == len(sample) == 2 ** min(n, count)
        second = sample != order[:, 0]
        assert torch.equal(sample[second], order[:, 1].expand_as(sample)[second])
        assert second.any(dim=0).sum() == min(n, count)


def test_alpha_weights_the_margin() -> None:
    p = torch.tensor([[[0.5, 0.49], [0.4, 0.1]]])  # the first is more probable, but has a small margin
    assert uncertain_positions(p, 1, alpha=0.0, selection="uncertain").item() == 1
    assert uncertain_positions(p, 1, alpha=1.0, selection="uncertain").item() == 0
    assert uncertain_positions(p, 1, alpha=1.0, selection="literal").item() == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"strategy": "top_k", "top_k": 2}, [0, 0.4, 0, 0.3]),
        ({"strategy": "top_p", "top_p": 0.5}, [0, 0.4, 0, 0.3]),
        ({"strategy": "top_p", "top_p": 0.39}, [0, 0.4, 0, 0]),
        ({"strategy": "top_p", "top_p": 1.0}, [0.2, 0.4, 0.1, 0.3]),
        ({"strategy": "top_k"}, [0.2, 0.4, 0.1, 0.3]),
        ({"strategy": "top_k", "temperature": 0.5}, [0.04, 0.16, 0.01, 0.09]),
    ],
)
def test_samples_have_the_probabilities_of_the_allowed_codes(settings: dict[str, Any], expected: list[float]) -> None:
    logits = torch.tensor([0.2, 0.4, 0.1, 0.3]).log().expand(2, 4000, 4)
    tokens = sample_tokens(logits, Decoding(**settings), torch.Generator().manual_seed(0))
    fraction = torch.bincount(tokens.flatten(), minlength=4) / tokens.numel()
    wanted = torch.tensor(expected) / sum(expected)
    assert torch.equal(fraction > 0, wanted > 0)
    torch.testing.assert_close(fraction, wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy": "x"}, "strategy is 'x', but it must be one of greedy, beam, top_k, top_p; correct the setting."),
        ({"selection": "x"}, "selection is 'x', but it must be one of uncertain, literal; correct the setting."),
        ({"score": "x"}, "score is 'x', but it must be one of lookahead, joint; correct the setting."),
        ({"lookahead_tokens": -1}, "lookahead_tokens is -1, but it must lie between 0 and 8; correct the setting."),
        ({"lookahead_tokens": 9}, "lookahead_tokens is 9, but it must lie between 0 and 8; correct the setting."),
        ({"lookahead_scales": -1}, "lookahead_scales is -1, but it must lie between 0 and inf; correct the setting."),
        ({"alpha": -0.5}, "alpha is -0.5, but it must lie between 0 and inf; correct the setting."),
        ({"alpha": float("nan")}, "alpha is nan, but it must lie between 0 and inf; correct the setting."),
        ({"top_k": 0}, "top_k is 0, but it must lie between 1 and inf; correct the setting."),
        ({"top_p": 1.5}, "top_p is 1.5, but it must lie between 1e-06 and 1; correct the setting."),
        ({"temperature": 0.0}, "temperature is 0.0, but it must lie between 1e-06 and inf; correct the setting."),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Decoding(**settings)
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["lookahead_tokens", "lookahead_scales", "top_k", "seed"])
def test_counts_must_be_whole_numbers(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name} is 1\.5, but it must be a whole number; correct"):
        Decoding(**{name: 1.5})  # type: ignore[arg-type]
