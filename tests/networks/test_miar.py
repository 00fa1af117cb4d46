from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.tiny import spread, started, tiny_miar, tiny_slices, tiny_tokenizer
from torch import Tensor

from miar_monai.degradation import Degradation, Degradations, SeparableDegradation
from miar_monai.errors import ConfigurationError
from miar_monai.networks import MIAR
from miar_monai.networks.decoding import Decoding, decode_tokens

MODES = ("initialized", "shared", "light")


def trained(lr_encoder: str = "light") -> MIAR:
    """Return a network whose two output maps and skips differ, as after training."""
    network = started(tiny_miar(lr_encoder=lr_encoder))
    spread(network.transformer)
    return network.double().eval()


def lr_images(batch_size: int = 3) -> Tensor:
    return Degradation()(tiny_slices(batch_size).double())


def corrected(network: MIAR, latents: Tensor, lr: Tensor, degradation: SeparableDegradation | None = None) -> Tensor:
    """Return both maps of latents, corrected to explain LR images."""
    observed = network.observe(lr, degradation)
    maps = network.decode(latents, network.features(observed.linear, observed.condition))
    return network.estimate(maps, observed)


@pytest.mark.parametrize("lr_encoder", MODES)
def test_forward_is_greedy_decoding_put_together_by_hand(lr_encoder: str) -> None:
    network, lr = trained(lr_encoder), lr_images()
    with torch.no_grad():
        linear = network.degradation.restore(lr, 1e-3)
        condition = torch.tensor([[-1.0, 0.0]] * 3).view(3, 2, 1, 1)  # damping 1e-3, blur 1
        f_lr, skip = network.lr_encoder(linear, condition)
        context = network.transformer.context(f_lr)
        decoded = decode_tokens(network.transformer, network.quantizer, context, Decoding("greedy"))
        skips = {0: torch.nn.functional.pixel_unshuffle(linear, 2), 1: skip}
        maps = network.decoder(network.quantizer.decode(decoded.tokens), skips)
        maps = network.degradation.enforce(maps, lr, 1e-3)
        maps = network.degradation.bounded(maps, lr.amin(dim=(2, 3), keepdim=True))
    result = network.super_resolve(lr)
    assert torch.equal(network(lr), result.sr)
    assert torch.equal(result.tokens, decoded.tokens)
    torch.testing.assert_close(result.sr, 0.75 * maps[:, :1] + 0.25 * maps[:, 1:])
    torch.testing.assert_close(result.score, decoded.score)
    assert result.sr.shape == (3, 1, 40, 40)
    assert network.lr_side == 10


def test_fidelity_mixes_the_two_maps() -> None:
    network, lr = trained(), lr_images()
    perceptual, half, faithful = (network.super_resolve(lr, fidelity=w).sr for w in (0.0, 0.5, 1.0))
    maps = corrected(network, network.quantizer.decode(network.super_resolve(lr).tokens), lr)
    maps = network.bounded(maps, network.observe(lr))
    torch.testing.assert_close(perceptual, maps[:, :1])
    torch.testing.assert_close(faithful, maps[:, 1:])
    torch.testing.assert_close(half, (perceptual + faithful) / 2)
    assert not torch.allclose(perceptual, faithful)


@pytest.mark.parametrize("lr_encoder", MODES)
def test_with_a_fresh_tokenizer_both_maps_are_the_linear_estimate(lr_encoder: str) -> None:
    tokenizer = started(tiny_tokenizer(encoder="cosine" if lr_encoder == "light" else "learned")).eval()
    network, lr = tiny_miar(lr_encoder=lr_encoder).eval(), lr_images().float()
    network.load_tokenizer(tokenizer)
    for latents in (torch.zeros(3, 6, 5, 5), torch.randn(3, 6, 5, 5)):
        maps = corrected(network, latents, lr)
        linear = network.degradation.enforce(torch.zeros_like(maps), lr, network.damping)
        torch.testing.assert_close(maps, linear)
    inner = [name for name in tokenizer.decoder.state_dict() if not name.startswith(("conv_out", "gain"))]
    learned, taken = tokenizer.decoder.state_dict(), network.decoder.state_dict()
    assert inner
    assert all(torch.equal(taken[name], learned[name]) for name in inner)
    codes = network.quantizer.state_dict()  # and φ
    assert all(torch.equal(codes[name], value) for name, value in tokenizer.quantizer.state_dict().items())
    if lr_encoder != "light":
        linear = network.degradation.restore(lr, network.damping)
        torch.testing.assert_close(network.features(linear, torch.zeros(3, 2, 1, 1)).f_lr, tokenizer.encoder(linear))


def test_the_noisier_an_image_the_more_its_inverse_is_damped() -> None:
    network, generator = tiny_miar(detail=0.2).eval(), torch.Generator().manual_seed(0)
    hr = torch.rand(2, 1, 5, 5, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    exact = network.degradation(hr)
    noise = 0.02 * torch.randn(exact.shape, generator=generator)
    mixed = torch.stack([exact[0], exact[1] + noise[1]])
    damping = network.observe(mixed).damping
    assert damping[0] < 2e-3
    assert 0.05 < damping[1] < 0.2  # 0.02 / 0.2 = 0.1
    assert network.observe(torch.zeros(1, 1, 10, 10)).damping == network.damping

    def errors(restored: torch.Tensor) -> torch.Tensor:
        return (restored - hr).square().mean(dim=(1, 2, 3))

    measured, least, most = (
        errors(network.degradation.restore(mixed, value)) for value in (damping, network.damping, 0.1)
    )
    torch.testing.assert_close(errors(network.observe(mixed).linear), measured)
    assert measured[0] < most[0]
    assert measured[1] < least[1] / 10


@pytest.mark.usefixtures("unbounded")
def test_what_the_weights_do_not_know_moves_the_result_to_the_linear_estimate() -> None:
    network, generator = started(tiny_miar(known_noise=0.001)).eval(), torch.Generator().manual_seed(0)
    hr = torch.rand(3, 1, 5, 5, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    exact = network.degradation(hr)
    lr = exact + torch.tensor([0.0, 0.002, 0.1]).view(3, 1, 1, 1) * torch.randn(exact.shape, generator=generator)
    result, learned = network.super_resolve(lr, fidelity=1.0), started(tiny_miar(known_noise=1.0)).eval()
    learned.load_state_dict(network.state_dict())
    linear, alone = network.observe(lr).linear, learned.super_resolve(lr, fidelity=1.0).sr
    assert result.trust[0] == 1
    assert 0.05 < result.trust[1] < 0.9  # (0.001 / 0.002)² = 0.25, measured on few coefficients
    assert result.trust[2] < 2e-4
    torch.testing.assert_close(result.sr, torch.lerp(linear, alone, result.trust[:, None, None, None]))
    assert not torch.allclose(linear, alone, atol=0.01)


def test_features_of_another_degradation_are_told_by_image() -> None:
    network, hr = trained(), tiny_slices(3).double()
    kinds, index = (network.degradation, Degradation(sigma=0.0)), torch.tensor([1, 0, 1])
    mixed = Degradations(kinds, index)
    lr = mixed(hr)
    latents = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    together = corrected(network, latents, lr, mixed)
    for i, kind in enumerate(index.tolist()):
        one = slice(i, i + 1)
        alone = corrected(network, latents[one], lr[one], kinds[kind])
        torch.testing.assert_close(together[one], alone)
        wrong = corrected(network, latents[one], lr[one], kinds[1 - kind])
        assert not torch.allclose(together[one], wrong, atol=1e-3)


def test_the_network_hears_of_the_noise_and_the_blur() -> None:
    encoder, linear = trained().lr_encoder, tiny_slices(1).double()
    said = [encoder(linear, torch.tensor(c).double().view(1, 2, 1, 1)) for c in ([-1, 0], [0, 0], [-1, -1])]
    for one, other in ((said[0], said[1]), (said[0], said[2])):
        assert all(not torch.allclose(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("lr_encoder", ["initialized", "shared"])
def test_an_encoder_that_is_not_learned_cannot_be_taken_over(lr_encoder: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tiny_miar(lr_encoder=lr_encoder).load_tokenizer(tiny_tokenizer(encoder="cosine"))
    assert str(caught.value) == (
        "lr_encoder takes over the tokenizer's encoder, but this tokenizer has none that is learned; set lr_encoder to"
        " 'light', or train a tokenizer with encoder 'learned'."
    )


def test_loading_copies_and_leaves_the_tokenizer_alone() -> None:
    tokenizer, network = tiny_tokenizer(), tiny_miar(lr_encoder="initialized")
    before = copy.deepcopy(tokenizer.state_dict())
    network.load_tokenizer(tokenizer)
    with torch.no_grad():
        for tensor in (*network.parameters(), network.quantizer.codebook):
            tensor.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize(("lr_encoder", "learns"), [("initialized", True), ("shared", False), ("light", True)])
def test_what_learns_depends_on_the_encoder(lr_encoder: str, learns: bool) -> None:
    network = tiny_miar(lr_encoder=lr_encoder)
    assert all(p.requires_grad == learns for p in network.lr_encoder.parameters())
    assert all(p.requires_grad for part in (network.transformer, network.decoder) for p in part.parameters())
    assert not any(p.requires_grad for p in network.quantizer.parameters())


def test_unknown_encoder_is_named() -> None:
    with pytest.raises(ConfigurationError) as caught:
        tiny_miar(lr_encoder="heavy")
    assert str(caught.value) == (
        "lr_encoder is 'heavy', but it must be 'initialized', 'shared' or 'light'; correct the setting."
    )


@pytest.mark.parametrize("shape", [(2, 1, 10, 9), (2, 2, 10, 10), (1, 10, 10)])
def test_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"shape \(.*, but it takes \(1, 10, 10\); call it through .*Infer"):
        tiny_miar()(torch.zeros(shape))


@pytest.mark.parametrize("lr_encoder", MODES)
def test_copies_and_state_dicts_are_the_same_network(lr_encoder: str) -> None:
    network, lr = trained(lr_encoder), lr_images(2)
    fresh = tiny_miar(lr_encoder=lr_encoder).double().eval()
    assert not torch.allclose(fresh(lr), network(lr))
    fresh.load_state_dict(network.state_dict())
    for twin in (fresh, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(lr), network(lr))


def test_nothing_is_kept_between_calls() -> None:
    network, lr = trained(), lr_images()
    before = pickle.dumps(network)
    first = network(lr)
    network.super_resolve(lr[:1], Decoding("beam", lookahead_tokens=2), fidelity=1.0)
    assert pickle.dumps(network) == before
    assert torch.equal(network(lr), first)


def test_a_slice_does_not_depend_on_its_batch() -> None:
    network, lr = trained(), lr_images()
    together = network(lr)
    for i in range(3):
        torch.testing.assert_close(network(lr[i : i + 1])[0], together[i], rtol=0, atol=1e-10)


def test_training_mode_does_not_train_when_only_used() -> None:
    network, lr = trained().train(), lr_images()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sr = network(lr)
    assert not sr.requires_grad
    assert torch.equal(sr, network.eval()(lr))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("degradation", [Degradation(), Degradation(sigma=0.0), Degradation(sigma=3.0, blur_on="hr")])
def test_both_maps_explain_the_lr_images_whatever_the_networks_say(degradation: Degradation) -> None:
    network = started(tiny_miar(degradation=degradation, damping=1e-6, detail=1e9, known_noise=1e9)).double()
    lr = degradation(tiny_slices(3).double())
    maps = corrected(network, torch.randn(3, 6, 5, 5, dtype=torch.float64), lr)
    torch.testing.assert_close(degradation(maps), lr.expand(-1, 2, -1, -1), rtol=0, atol=1e-3)
    assert (maps[:, 0] - maps[:, 1]).abs().max() > 0.1  # they say different things


def test_a_scale_without_a_level_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="scale is 3, but it must be patch_size = 2 times a power of two"):
        tiny_miar(degradation=Degradation(scale=3))
    with pytest.raises(ConfigurationError, match="scale is 16, but 3 levels of channels reach 8 at most"):
        tiny_miar(degradation=Degradation(scale=16))
