from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.tiny import TOKENIZER, spread, started, tiny_miar, tiny_slices, tiny_tokenizer
from monai.bundle import ConfigParser
from torch import Tensor

from miar_monai.degradation import Degradation, SeparableOperator, operators
from miar_monai.errors import ConfigurationError
from miar_monai.networks import MIAR
from miar_monai.networks.decoding import Decoding, decode_tokens
from miar_monai.networks.linear import Interpolation, NoConsistency, NoiseModel

MODES = ("initialized", "shared", "light")


def trained(lr_encoder: str = "light") -> MIAR:
    """Return a network whose two output maps and skips differ, as after training."""
    network = started(tiny_miar(lr_encoder=lr_encoder))
    spread(network.transformer)
    return network.double().eval()


def lr_images(batch_size: int = 3) -> Tensor:
    return Degradation()(tiny_slices(batch_size).double())


def corrected(network: MIAR, latents: Tensor, lr: Tensor, operator: SeparableOperator | None = None) -> Tensor:
    """Return both maps of latents, corrected to be consistent with LR images."""
    observed = network.observe(lr, operator)
    maps = network.decode(latents, network.features(observed.linear, observed.condition))
    return network.correct(maps, observed)


@pytest.mark.parametrize("lr_encoder", MODES)
def test_forward_is_greedy_decoding_step_by_step(lr_encoder: str) -> None:
    network, lr = trained(lr_encoder), lr_images()
    with torch.no_grad():
        operator = network.degradation.for_lr(lr)
        linear = operator.restore(lr, 1e-3)
        condition = torch.tensor([[-1.0, 0.0]] * 3).view(3, 2, 1, 1)  # damping 1e-3, blur 1
        f_lr, skip = network.lr_encoder(linear, condition)
        context = network.transformer.context(f_lr)
        decoded = decode_tokens(network.transformer, network.quantizer, context, Decoding("greedy"))
        skips = {0: torch.nn.functional.pixel_unshuffle(linear, 2), 1: skip}
        maps = network.decoder(network.quantizer.decode(decoded.tokens), skips)
        maps = operator.prox(maps, lr, 1e-3)
        maps = operator.bounded(maps, lr.amin(dim=(2, 3), keepdim=True))
    estimate = network.super_resolve(lr)
    assert torch.equal(network(lr), estimate.image)
    torch.testing.assert_close(estimate.image, 0.75 * maps[:, :1] + 0.25 * maps[:, 1:])
    torch.testing.assert_close(torch.cat([estimate.perceptual, estimate.faithful], dim=1), maps)
    assert estimate.image.shape == (3, 1, 40, 40)
    assert estimate.error is None
    assert network.side == 40
    prediction = network.predict(linear, condition)
    assert torch.equal(prediction.tokens, decoded.tokens)
    torch.testing.assert_close(prediction.score, decoded.score)


def test_fidelity_mixes_the_two_maps() -> None:
    network, lr = trained(), lr_images()
    perceptual, half, faithful = (network.super_resolve(lr, fidelity=w).image for w in (0.0, 0.5, 1.0))
    observed = network.observe(lr)
    tokens = network.predict(observed.linear, observed.condition).tokens
    maps = corrected(network, network.quantizer.decode(tokens), lr)
    maps = observed.operator.bounded(maps, lr.amin(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(perceptual, maps[:, :1])
    torch.testing.assert_close(faithful, maps[:, 1:])
    torch.testing.assert_close(half, (perceptual + faithful) / 2)
    assert not torch.allclose(perceptual, faithful)


@pytest.mark.parametrize("lr_encoder", MODES)
def test_with_a_newly_loaded_tokenizer_both_maps_are_the_linear_estimate(lr_encoder: str) -> None:
    tokenizer = started(tiny_tokenizer(encoder="cosine" if lr_encoder == "light" else "learned")).eval()
    network, lr = tiny_miar(lr_encoder=lr_encoder).eval(), lr_images().float()
    network.load_tokenizer(tokenizer)
    for latents in (torch.zeros(3, 6, 5, 5), torch.randn(3, 6, 5, 5)):
        maps = corrected(network, latents, lr)
        linear = network.degradation.for_lr(lr).A_dagger(lr.expand_as(lr), 1e-3).expand_as(maps)
        torch.testing.assert_close(maps, linear)
    inner = [name for name in tokenizer.decoder.state_dict() if not name.startswith(("conv_out", "gain"))]
    learned, taken = tokenizer.decoder.state_dict(), network.decoder.state_dict()
    assert inner
    assert all(torch.equal(taken[name], learned[name]) for name in inner)
    codes = network.quantizer.state_dict()  # and φ
    assert all(torch.equal(codes[name], value) for name, value in tokenizer.quantizer.state_dict().items())
    if lr_encoder != "light":
        linear = network.degradation.for_lr(lr).restore(lr, 1e-3)
        torch.testing.assert_close(network.features(linear, torch.zeros(3, 2, 1, 1)).f_lr, tokenizer.encoder(linear))


def test_damping_increases_with_the_noise() -> None:
    network, generator = tiny_miar(noise_model=NoiseModel(signal_std=0.2)).eval(), torch.Generator().manual_seed(0)
    hr = torch.rand(2, 1, 5, 5, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    exact = network.degradation(hr)
    noise = 0.02 * torch.randn(exact.shape, generator=generator)
    mixed = torch.stack([exact[0], exact[1] + noise[1]])
    damping = network.observe(mixed).damping
    assert damping[0] < 2e-3
    assert 0.05 < damping[1] < 0.2  # 0.02 / 0.2 = 0.1
    assert network.observe(torch.zeros(1, 1, 10, 10)).damping == network.noise_model.min_damping

    def errors(restored: torch.Tensor) -> torch.Tensor:
        return (restored - hr).square().mean(dim=(1, 2, 3))

    operator = network.degradation.for_lr(mixed)
    estimated, minimum, maximum = (errors(operator.restore(mixed, value)) for value in (damping, 1e-3, 0.1))
    torch.testing.assert_close(errors(network.observe(mixed).linear), estimated)
    assert estimated[0] < maximum[0]
    assert estimated[1] < minimum[1] / 10


@pytest.mark.usefixtures("unbounded")
def test_noise_above_that_of_the_training_moves_the_result_to_the_linear_estimate() -> None:
    network = started(tiny_miar(noise_model=NoiseModel(max_training_noise=0.001))).eval()
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(3, 1, 5, 5, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    exact = network.degradation(hr)
    lr = exact + torch.tensor([0.0, 0.002, 0.1]).view(3, 1, 1, 1) * torch.randn(exact.shape, generator=generator)
    result = network.super_resolve(lr, fidelity=1.0)
    tolerant = started(tiny_miar(noise_model=NoiseModel(max_training_noise=1.0))).eval()
    tolerant.load_state_dict(network.state_dict())
    linear, network_estimate = network.observe(lr).linear, tolerant.super_resolve(lr, fidelity=1.0).image
    weights = result.network_weight.flatten()
    assert weights[0] == 1
    assert 0.05 < weights[1] < 0.9  # (0.001 / 0.002)² = 0.25, estimated from few coefficients
    assert weights[2] < 2e-4
    torch.testing.assert_close(result.image, torch.lerp(linear, network_estimate, result.network_weight))
    assert not torch.allclose(linear, network_estimate, atol=0.01)


def test_each_image_of_a_batch_has_its_own_degradation() -> None:
    network, hr = trained(), tiny_slices(3).double()
    kinds, index = (network.degradation, Degradation(sigma=0.0)), torch.tensor([1, 0, 1])
    mixed = operators(kinds, (40, 40), (10, 10), hr).select(index)
    lr = mixed.A(hr)
    latents = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    batch = corrected(network, latents, lr, mixed)
    for i, kind in enumerate(index.tolist()):
        row = slice(i, i + 1)
        single = corrected(network, latents[row], lr[row], kinds[kind].for_lr(lr))
        torch.testing.assert_close(batch[row], single)
        wrong = corrected(network, latents[row], lr[row], kinds[1 - kind].for_lr(lr))
        assert not torch.allclose(batch[row], wrong, atol=1e-3)


def test_features_depend_on_noise_and_blur() -> None:
    encoder, linear = trained().lr_encoder, tiny_slices(1).double()
    features = [encoder(linear, torch.tensor(c).double().view(1, 2, 1, 1)) for c in ([-1, 0], [0, 0], [-1, -1])]
    for one, other in ((features[0], features[1]), (features[0], features[2])):
        assert all(not torch.allclose(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("lr_encoder", ["initialized", "shared"])
def test_a_tokenizer_without_a_learned_encoder_is_refused(lr_encoder: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tiny_miar(lr_encoder=lr_encoder).load_tokenizer(tiny_tokenizer(encoder="cosine"))
    assert str(caught.value) == (
        "lr_encoder needs a tokenizer with a learned encoder, but this tokenizer has a fixed one; set lr_encoder to"
        " 'light', or train a tokenizer with encoder 'learned'."
    )


def test_loading_a_tokenizer_copies_its_weights() -> None:
    tokenizer, network = tiny_tokenizer(), tiny_miar(lr_encoder="initialized")
    before = copy.deepcopy(tokenizer.state_dict())
    network.load_tokenizer(tokenizer)
    with torch.no_grad():
        for tensor in (*network.parameters(), network.quantizer.codebook):
            tensor.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize(("lr_encoder", "learns"), [("initialized", True), ("shared", False), ("light", True)])
def test_trainable_parts_depend_on_the_encoder(lr_encoder: str, learns: bool) -> None:
    network = tiny_miar(lr_encoder=lr_encoder)
    assert all(p.requires_grad == learns for p in network.lr_encoder.parameters())
    assert all(p.requires_grad for part in (network.transformer, network.decoder) for p in part.parameters())
    assert not any(p.requires_grad for p in network.quantizer.parameters())


def test_unknown_encoder_is_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        tiny_miar(lr_encoder="heavy")
    assert str(caught.value) == (
        "lr_encoder is 'heavy', but it must be 'initialized', 'shared' or 'light'; correct the setting."
    )


@pytest.mark.parametrize("shape", [(2, 1, 10, 9), (2, 2, 10, 10), (1, 10, 10)])
def test_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"have shape \(.*\) on the HR grid, but the network needs \(1, 40, 40\); use .*Infer"
    ):
        tiny_miar()(torch.zeros(shape))


@pytest.mark.parametrize("lr_encoder", MODES)
def test_copies_and_state_dicts_give_the_same_network(lr_encoder: str) -> None:
    network, lr = trained(lr_encoder), lr_images(2)
    fresh = tiny_miar(lr_encoder=lr_encoder).double().eval()
    assert not torch.allclose(fresh(lr), network(lr))
    fresh.load_state_dict(network.state_dict())
    for twin in (fresh, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(lr), network(lr))


def test_calls_do_not_change_the_network() -> None:
    network, lr = trained(), lr_images()
    before = pickle.dumps(network)
    first = network(lr)
    network.super_resolve(lr[:1], Decoding("beam", lookahead_tokens=2), fidelity=1.0)
    assert pickle.dumps(network) == before
    assert torch.equal(network(lr), first)


def test_a_slice_does_not_depend_on_its_batch() -> None:
    network, lr = trained(), lr_images()
    batch = network(lr)
    for i in range(3):
        torch.testing.assert_close(network(lr[i : i + 1])[0], batch[i], rtol=0, atol=1e-10)


def test_inference_in_training_mode_does_not_change_the_network() -> None:
    network, lr = trained().train(), lr_images()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sr = network(lr)
    assert not sr.requires_grad
    assert torch.equal(sr, network.eval()(lr))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("degradation", [Degradation(), Degradation(sigma=0.0), Degradation(sigma=3.0, blur_on="hr")])
def test_both_maps_are_consistent_with_the_lr_images_for_any_latents(degradation: Degradation) -> None:
    network = started(tiny_miar(degradation=degradation, noise_model=NoiseModel(1e-6, 1e9, 1e9))).double()
    lr = degradation(tiny_slices(3).double())
    maps = corrected(network, torch.randn(3, 6, 5, 5, dtype=torch.float64), lr)
    torch.testing.assert_close(degradation(maps), lr.expand(-1, 2, -1, -1), rtol=0, atol=1e-3)
    assert (maps[:, 0] - maps[:, 1]).abs().max() > 0.1


def test_a_patch_size_without_a_matching_level_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="lr_patch_size is 3, but it must be patch_size \\(2\\) times a power of"
    ):
        tiny_miar(lr_patch_size=3)
    with pytest.raises(ConfigurationError, match="lr_patch_size is 16, but it can be 8 at most with 3 levels"):
        tiny_miar(lr_patch_size=16)


SCALES = [(4, 4), (2, 2), (8, 8), (1, 5), (4, 1), (2.5, 1.6)]


@pytest.mark.parametrize("scale", SCALES)
def test_one_network_works_for_any_scale_factor(scale: tuple[float, float]) -> None:
    network, hr = trained(), tiny_slices(2).double()
    operator = Degradation(scale=scale, sigma=0.5).for_hr(hr)
    lr = operator.A(hr)
    assert lr.shape[2:] == tuple(round(40 / factor) for factor in scale)
    estimate = network.super_resolve(lr, operator=operator)
    assert estimate.image.shape == hr.shape
    maps = corrected(network, torch.randn(2, 6, 5, 5, dtype=torch.float64), lr, operator)
    level = (operator.A(maps) - lr).mean(dim=(2, 3)).abs()
    assert level.max() < 2e-3


def paper(**options: Any) -> MIAR:
    """Return the system of the paper: interpolated input, a decoder without skips, and no data consistency."""
    return tiny_miar(
        lr_encoder="initialized",
        front_end=Interpolation(),
        decoder_inputs=(),
        back_end=NoConsistency(),
        **options,
    )


def test_the_system_of_the_paper_is_a_choice_of_components() -> None:
    tokenizer = started(tiny_tokenizer(encoder="learned")).eval()
    network, lr = paper().eval(), lr_images().float()
    network.load_tokenizer(tokenizer)
    observed = network.observe(lr)
    upsampled = torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="bicubic")
    torch.testing.assert_close(observed.linear, upsampled, atol=1e-6, rtol=1e-5)
    features = network.features(observed.linear, observed.condition)
    torch.testing.assert_close(features.f_lr, tokenizer.encoder(upsampled), atol=1e-5, rtol=1e-4)
    prediction = network.predict(observed.linear, observed.condition)
    decoded = tokenizer.decode(prediction.tokens)
    torch.testing.assert_close(prediction.maps, decoded.expand(-1, 2, -1, -1))
    assert torch.equal(network.correct(prediction.maps, observed), prediction.maps)
    assert not any("skips" in name for name in network.state_dict())
    state = network.state_dict()
    again = paper()
    again.load_state_dict(state)
    assert torch.equal(again.eval()(lr), network(lr))


def test_each_component_can_be_replaced_independently() -> None:
    lr = lr_images()
    full = trained()
    without = started(tiny_miar(decoder_inputs=("linear",))).double().eval()
    assert set(without.decoder.skips) == {"0"}
    assert torch.isfinite(without(lr)).all()
    uncorrected = started(tiny_miar(lr_encoder="light", back_end=NoConsistency())).double().eval()
    uncorrected.load_state_dict(full.state_dict())
    image = uncorrected.super_resolve(lr, fidelity=1.0).image
    observed = full.observe(lr)
    corrected_image = full.back_end(image, observed)
    torch.testing.assert_close(observed.operator.A(corrected_image), lr, atol=0.02, rtol=0)
    assert not torch.allclose(observed.operator.A(image), lr, atol=0.02)


def test_unknown_decoder_inputs_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^decoder_inputs has lr, but only linear and features are possible;"):
        tiny_miar(decoder_inputs=("lr",))


def test_a_config_chooses_the_components() -> None:
    components = "miar_monai.networks.linear"
    settings = {name: value for name, value in TOKENIZER.items() if name != "encoder"}
    parser = ConfigParser({
        "network_def": {
            "_target_": "miar_monai.networks.MIAR", **settings, "dim": 16, "depth": 1, "num_heads": 2,
            "front_end": {"_target_": f"{components}.Interpolation"},
            "decoder_inputs": [],
            "back_end": {"_target_": f"{components}.NoConsistency"},
            "noise_model": {"_target_": f"{components}.NoiseModel", "min_damping": 0.01},
        }
    })  # fmt: skip
    network, lr = parser.get_parsed_content("network_def").eval(), lr_images().float()
    network.load_tokenizer(started(tiny_tokenizer(encoder="learned")))
    observed = network.observe(lr)
    torch.testing.assert_close(observed.linear, observed.operator.interpolate(lr))
    assert observed.min_damping == 0.01
    assert network.super_resolve(lr).image.shape == (3, 1, 40, 40)
