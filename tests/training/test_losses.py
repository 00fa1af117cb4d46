from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import CODES, SCALES, started, tiny_miar, tiny_slices, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miar_monai.degradation import Degradation, operators, with_blurs
from miar_monai.errors import MissingWeightsError
from miar_monai.training.losses import MIARObjective, ReconstructionLoss, adaptive_weight, corrupt_tokens, token_loss


@given(st.floats(0.01, 50), st.floats(0.01, 50))
def test_adaptive_weight_is_the_ratio_of_gradient_norms(a: float, b: float) -> None:
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = adaptive_weight(a * w.square().sum(), b * w.sum(), w)
    torch.testing.assert_close(weight, (2 * a * w).detach().norm() / (b * 12**0.5 + 1e-4))
    assert not weight.requires_grad


def test_adaptive_weight_is_limited_where_the_adversary_has_no_gradient() -> None:
    w = torch.ones(2, requires_grad=True)
    assert adaptive_weight(1e6 * w.sum(), 0 * w.sum(), w) == 1e4
    assert adaptive_weight(1e6 * w.sum(), 0 * w.sum(), w, limit=7.0) == 7.0


def test_reconstruction_loss_is_its_weighted_parts() -> None:
    a, b = torch.rand(2, 1, 7, 5), torch.rand(2, 1, 7, 5)
    loss = ReconstructionLoss(l1=0.2, l2=3.0, perceptual=0.0)
    torch.testing.assert_close(loss(a, b), 0.2 * (a - b).abs().mean() + 3 * (a - b).square().mean())
    assert loss(a, a) == 0
    assert not list(loss.parameters())


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_missing_weights_of_the_perceptual_loss_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lpips", reason="the extra `train` is not installed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no server
    monkeypatch.setattr("urllib.request._opener", None)  # caches earlier proxies
    with pytest.raises(MissingWeightsError) as caught:
        ReconstructionLoss(perceptual=1.0, network="alex")
    assert str(caught.value) == (
        f"the weights of the perceptual loss 'alex' are not in {tmp_path}/hub/checkpoints and could not be downloaded;"
        " put the file there (or set TORCH_HOME), or train with --perceptual_weight 0."
    )


def test_tokens_are_replaced_by_neighbors_at_the_given_rate() -> None:
    neighbors = torch.stack([(torch.arange(CODES) + shift) % CODES for shift in (1, 3)], dim=1)[None]  # (1, V, 2)
    tokens = torch.randint(CODES, (4000, 20))
    corrupted = corrupt_tokens(tokens, neighbors, max_rate=0.4)
    shift = (corrupted - tokens) % CODES
    assert set(shift.unique().tolist()) == {0, 1, 3}
    fraction = (shift > 0).float().mean(dim=1)
    assert abs(fraction.mean() - 0.2) < 0.01
    # the variance over samples is that of U[0, 0.4] plus that of drawing 20 tokens
    expected = 0.4**2 / 12 + (0.2 - 0.4**2 / 3) / 20
    assert abs(fraction.var() - expected) < 0.002
    assert abs((shift == 1).sum() / (shift > 0).sum() - 0.5) < 0.02
    assert torch.equal(corrupt_tokens(tokens, neighbors, max_rate=0.0), tokens)
    two_books = torch.cat([neighbors, (neighbors + 2) % CODES])  # shifts by 1 and 3, and by 3 and 5
    shift = (corrupt_tokens(tokens, two_books, max_rate=0.4) - tokens) % CODES
    assert set(shift[:, ::2].unique().tolist()) == {0, 1, 3}
    assert set(shift[:, 1::2].unique().tolist()) == {0, 3, 5}


def test_token_loss_is_the_weighted_mean_of_log_probabilities() -> None:
    logits, tokens = torch.randn(2, 5, CODES, dtype=torch.float64), torch.randint(CODES, (2, 5))
    weight = torch.tensor([5.0, 1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    minus_log = torch.tensor([[-logits[b, i].log_softmax(0)[tokens[b, i]] for i in range(5)] for b in range(2)])
    torch.testing.assert_close(token_loss(logits, tokens), minus_log.mean(), check_dtype=False)
    expected = sum(weight[i] * minus_log[b, i] for b in range(2) for i in range(5)) / (2 * weight.sum())
    torch.testing.assert_close(token_loss(logits, tokens, weight), expected, check_dtype=False)


def objective(**options: Any) -> MIARObjective:
    """Return the losses of a network whose two output maps differ, as in training."""
    tokenizer = started(tiny_tokenizer()).eval()
    tokenizer.quantizer.initialize_codebook(tokenizer.encoder(tiny_slices()))
    network = tiny_miar()
    network.load_tokenizer(tokenizer)
    started(network.decoder)
    reconstruction = ReconstructionLoss(perceptual=0.0)
    return MIARObjective(network, tokenizer, reconstruction, **{"num_neighbors": 4} | options)


def lr_slices(count: int = 4) -> Tensor:
    return Degradation()(tiny_slices(count))


def targets_by_hand(loss: MIARObjective, hr: Tensor) -> tuple[Tensor, Tensor]:
    """Compute target tokens and inputs step by step, as in decoding."""
    quantizer = loss.network.quantizer
    tokens = loss.tokenizer.encode(hr)
    f_hat, inputs = torch.zeros_like(loss.tokenizer.encoder(hr)), []
    for k, tokens_k in enumerate(quantizer.schedule.split(tokens)[:-1]):
        f_hat = quantizer.add_scale(f_hat, tokens_k, k)
        inputs.append(quantizer.to_scale(f_hat, k + 1))
    return tokens, torch.cat(inputs, dim=1)


def test_targets_without_corruption_agree_with_decoding() -> None:
    for loss in (objective(self_correction=0.0).train(), objective(self_correction=0.3).eval()):
        tokens, inputs, latents = loss.teacher_targets(tiny_slices())
        expected_tokens, expected_inputs = targets_by_hand(loss, tiny_slices())
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(inputs, expected_inputs)
        torch.testing.assert_close(latents, loss.tokenizer.quantizer.decode(tokens))
        assert len(inputs[0]) == sum(side**2 for side in SCALES[1:])


def test_targets_correct_replaced_tokens() -> None:
    loss = objective(self_correction=1.0).train()
    quantizer, hr = loss.network.quantizer, tiny_slices()
    tokens, inputs, _ = loss.teacher_targets(hr)
    clean_tokens, clean_inputs = targets_by_hand(loss, hr)
    f = loss.tokenizer.encoder(hr)
    schedule = quantizer.schedule
    assert torch.equal(tokens[:, :1], clean_tokens[:, :1])  # no token is replaced before the first scale
    for k in range(1, len(SCALES)):
        first, last = schedule.bounds[k]
        scale_inputs = inputs[:, first - 1 : last - 1]  # averaging is linear
        assert torch.equal(tokens[:, first:last], quantizer.nearest(quantizer.to_scale(f, k) - scale_inputs))
        assert not torch.allclose(scale_inputs, clean_inputs[:, first - 1 : last - 1])
    assert not torch.equal(tokens, clean_tokens)


@pytest.mark.usefixtures("unbounded")
def test_losses_are_named_and_add_up() -> None:
    loss = objective(self_correction=0.0, image_weight=3.0).eval()
    network, lr, hr = loss.network, lr_slices(), tiny_slices()
    parts = loss(lr, hr)
    tokens, inputs = targets_by_hand(loss, hr)
    observed = network.observe(lr)
    features = network.features(observed.linear, observed.condition)
    logits = network.transformer(inputs, network.transformer.context(features.f_lr))
    torch.testing.assert_close(parts["token_loss"], F.cross_entropy(logits.mT, tokens))
    torch.testing.assert_close(parts["token_accuracy"], (logits.argmax(dim=-1) == tokens).float().mean())
    perceptual, faithful = (network.super_resolve(lr, fidelity=w).image for w in (0.0, 1.0))
    torch.testing.assert_close(parts["faithful_loss"], (faithful - hr).abs().mean())
    torch.testing.assert_close(parts["perceptual_loss"], loss.reconstruction(perceptual, hr))
    assert not torch.allclose(perceptual, faithful)
    expected = parts["token_loss"] + 3 * (parts["faithful_loss"] + parts["perceptual_loss"])
    torch.testing.assert_close(parts["loss"], expected)


def test_without_image_losses_only_tokens_are_learned_and_the_decoder_is_kept() -> None:
    torch.manual_seed(0)
    loss = objective(self_correction=0.0, image_weight=0.0).train()
    lr, hr = lr_slices(), tiny_slices()
    parts = loss(lr, hr)
    assert set(parts) == {"token_loss", "token_accuracy", "loss"}
    assert torch.equal(parts["loss"], parts["token_loss"])
    torch.manual_seed(0)
    torch.testing.assert_close(parts["loss"], objective(self_correction=0.0).train()(lr, hr)["token_loss"])
    parts["loss"].backward()
    assert all(p.grad is None for p in loss.network.decoder.parameters())
    assert any(p.grad is not None for p in loss.network.lr_encoder.parameters())
    assert all(p.grad is not None for p in loss.network.transformer.parameters())


def test_each_image_has_its_own_degradation() -> None:
    kinds, index = with_blurs(Degradation(), [0.0]), torch.tensor([0, 1, 1, 0])
    loss, hr = objective(degradations=kinds).eval(), tiny_slices()
    lr = operators(kinds, (40, 40), (10, 10), hr).select(index).A(hr)
    batch = loss(lr, hr, index)
    single = [loss(lr[i : i + 1], hr[i : i + 1], index[i : i + 1]) for i in range(4)]
    for name in ("token_loss", "faithful_loss", "perceptual_loss"):
        torch.testing.assert_close(batch[name], torch.stack([parts[name] for parts in single]).mean())
    assert not torch.isclose(batch["loss"], loss(lr, hr)["loss"])


@pytest.mark.usefixtures("unbounded")
def test_with_teacher_forcing_only_the_perceptual_map_is_trained_on_target_tokens() -> None:
    loss = objective(self_correction=0.0, teacher_forcing=1.0).train()
    network, lr, hr = loss.network, lr_slices(), tiny_slices()
    parts, observed = loss(lr, hr), network.observe(lr)
    latents = network.quantizer.decode(loss.tokenizer.encode(hr))
    maps = network.decode(latents, network.features(observed.linear, observed.condition))
    maps = network.correct(maps, observed)
    torch.testing.assert_close(parts["perceptual_loss"], loss.reconstruction(maps[:, :1], hr))
    assert parts["faithful_loss"] == 0
    free = loss.eval()(lr, hr)
    perceptual, faithful = (network.super_resolve(lr, fidelity=w).image for w in (0.0, 1.0))
    torch.testing.assert_close(free["perceptual_loss"], loss.reconstruction(perceptual, hr))
    torch.testing.assert_close(free["faithful_loss"], (faithful - hr).abs().mean())


def test_scale_weight_power_increases_the_weights_of_coarse_scales() -> None:
    weight = objective(scale_weight_power=0.5).scale_weight
    expected = [5.0] * 1 + [5 / 2] * 4 + [5 / 3] * 9 + [1.0] * 25
    torch.testing.assert_close(weight, torch.tensor(expected))
    assert (objective().scale_weight == 1).all()


def test_only_the_network_gets_gradients_not_tokenizer_and_codebook() -> None:
    loss = objective().train()
    assert loss.network.training
    assert not any(module.training for part in (loss.tokenizer, loss.network.quantizer) for module in part.modules())
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss(lr_slices(), tiny_slices())["loss"].backward()
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    frozen = (loss.tokenizer, loss.network.quantizer)
    assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())
    learning = {name: p for name, p in loss.network.named_parameters() if p.requires_grad}
    assert not [name for name, p in learning.items() if p.grad is None or not p.grad.abs().sum() > 0]
    loss.eval()
    assert not loss.network.training


def test_tokens_are_replaced_in_training_only() -> None:
    loss = objective(self_correction=1.0)
    hr = tiny_slices()
    assert torch.equal(loss.eval().teacher_targets(hr)[1], loss.teacher_targets(hr)[1])
    assert not torch.equal(loss.train().teacher_targets(hr)[1], loss.teacher_targets(hr)[1])


def test_a_perceptual_loss_stays_in_evaluation_mode() -> None:
    class Dropping(ReconstructionLoss):
        def __init__(self) -> None:
            super().__init__(perceptual=0.0)
            self.dropout = torch.nn.Dropout()

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return super().forward(self.dropout(prediction), target)

    loss = objective(self_correction=0.0)
    loss.reconstruction = Dropping()
    trained = [loss.train()(lr_slices(), tiny_slices())["perceptual_loss"] for _ in range(2)]
    assert trained[0] == trained[1]
    assert loss.network.training
