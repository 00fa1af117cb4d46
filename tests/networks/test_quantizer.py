from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers.tiny import CHANNELS, CODES, SCALES, started, tiny_quantizer
from torch import Tensor

from miar_monai.errors import ConfigurationError
from miar_monai.networks.phi import nearest_tick
from miar_monai.networks.quantizer import MultiScaleQuantizer


def latents(batch_size: int = 3) -> Tensor:
    return torch.randn(batch_size, CHANNELS, SCALES[-1], SCALES[-1], dtype=torch.float64)


def snapshot(quantizer: MultiScaleQuantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def test_decoding_agrees_with_forward_and_the_last_step() -> None:
    quantizer, f = tiny_quantizer().eval(), latents()
    output, tokens = quantizer(f), quantizer.encode(f)
    steps = list(quantizer.residual_steps(f))
    assert torch.equal(output.tokens, tokens)
    torch.testing.assert_close(output.f_hat, quantizer.decode(tokens))
    for k, step in enumerate(steps, start=1):
        torch.testing.assert_close(step.f_hat, quantizer.decode(tokens, num_scales=k))
    assert len(steps) == len(SCALES)


def test_each_scale_quantizes_the_residual_of_the_coarser_scales() -> None:
    quantizer, f = tiny_quantizer(), latents(2)
    f_hat = torch.zeros_like(f)
    for k, step in enumerate(quantizer.residual_steps(f)):
        residual = F.interpolate(f - f_hat, size=SCALES[k], mode="area").flatten(2).mT  # (B, n, C)
        torch.testing.assert_close(step.residual, residual, rtol=0, atol=1e-6)  # the matrices are float32
        distance = (residual[:, :, None] - quantizer.codebook).square().sum(dim=-1)
        assert torch.equal(step.tokens, distance.argmin(dim=-1))
        codes = quantizer.codebook[step.tokens].mT.unflatten(-1, (SCALES[k], SCALES[k]))
        up = F.interpolate(codes, size=SCALES[-1], mode="bicubic")
        conv = quantizer.phi(k).conv
        f_hat = f_hat + 0.5 * up + 0.5 * F.conv2d(up, conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(step.f_hat, f_hat, rtol=0, atol=1e-5)


def test_the_nearest_code_of_a_code_is_itself() -> None:
    quantizer = tiny_quantizer()
    tokens = torch.randint(CODES, (2, SCALES[-1] ** 2))
    exact = quantizer.codebook[tokens]
    assert torch.equal(quantizer.nearest(exact), tokens)


@pytest.mark.parametrize("training", [False, True])
def test_encoding_changes_neither_buffers_nor_the_random_state(training: bool) -> None:
    quantizer, f = tiny_quantizer(dropout=1.0).train(training), latents()
    before, random_state = snapshot(quantizer), torch.get_rng_state()
    quantizer.decode(quantizer.encode(f))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_codebook_is_updated_in_training_only() -> None:
    quantizer, f = tiny_quantizer(), latents()
    before = snapshot(quantizer)
    quantizer.eval()(f)
    assert torch.equal(quantizer.codebook, before["codebook"])
    quantizer.train()(f)
    assert not torch.equal(quantizer.codebook, before["codebook"])
    assert quantizer.num_updates == 1


def test_each_scale_uses_the_phi_of_the_nearest_tick_as_in_var() -> None:
    ticks = np.linspace(1 / 12, 11 / 12, 4)
    for scales in ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), (1, 2, 3, 5, 8, 13, 20, 32), SCALES, (4,)):
        quantizer = MultiScaleQuantizer(scales, num_codes=8, latent_channels=4)
        used = [list(quantizer.phis).index(quantizer.phi(k)) for k in range(len(scales))]
        distance = np.abs(ticks[None] - np.arange(len(scales))[:, None] / max(len(scales) - 1, 1))
        np.testing.assert_allclose(distance[range(len(scales)), used], distance.min(axis=1), atol=1e-12)
    assert [nearest_tick(k, 10, 4) for k in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]  # two ties
    assert [nearest_tick(k, 4, 1) for k in range(4)] == [0, 0, 0, 0]


def test_phi_is_initialized_as_the_identity() -> None:
    quantizer, h = MultiScaleQuantizer(SCALES, CODES, CHANNELS), latents().float()
    assert all(torch.equal(phi(h), h) for phi in quantizer.phis)
    assert not any(torch.allclose(phi(h), h, atol=0.1) for phi in started(quantizer).phis)


def test_gradient_is_straight_through_and_reaches_the_convolutions() -> None:
    quantizer = tiny_quantizer(dropout=0.0, commitment=0.25)
    f = latents().requires_grad_()
    output = quantizer(f)
    (through,) = torch.autograd.grad((output.f_hat * torch.arange(5.0)).sum(), f, retain_graph=True)
    assert torch.equal(through, torch.arange(5.0, dtype=torch.float64).expand_as(f))
    phis = torch.autograd.grad(output.loss, [*quantizer.phis.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in phis)


def test_commitment_gradient_points_to_every_prefix() -> None:
    quantizer = tiny_quantizer(commitment=0.25).eval()
    f = latents().requires_grad_()
    steps = [step.f_hat.detach() for step in quantizer.residual_steps(f.detach())]
    (gradient,) = torch.autograd.grad(quantizer(f).loss, f)
    expected = sum(0.25 * 2 * (f.detach() - f_hat) / f.numel() for f_hat in steps) / len(steps)
    torch.testing.assert_close(gradient, expected)


def naive_prefixes(quantizer: MultiScaleQuantizer, f: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([step.f_hat for step in quantizer.residual_steps(f)])  # (K, B, C, G, G)


def kept_lengths(f_hat: Tensor, prefixes: Tensor) -> Tensor:
    """Return the lengths of the prefixes that samples are equal to: (B,), from 1."""
    same = (f_hat - prefixes).abs().amax(dim=(2, 3, 4)) < 1e-9  # (K, B)
    assert (same.sum(dim=0) == 1).all()
    return same.double().argmax(dim=0) + 1


@pytest.mark.parametrize(
    ("dropout", "start", "expected"),
    [(1.0, 1, [0.25, 0.25, 0.25, 0.25]), (0.5, 3, [0, 0, 0.25, 0.75]), (0.0, 1, [0, 0, 0, 1]), (1.0, 9, [0, 0, 0, 1])],
)
def test_dropout_keeps_a_prefix_of_scales(dropout: float, start: int, expected: list[float]) -> None:
    quantizer, f = tiny_quantizer(dropout=dropout, dropout_start=start), latents(600)
    prefixes = naive_prefixes(quantizer, f)
    kept = kept_lengths(quantizer(f).f_hat, prefixes)
    fraction = torch.bincount(kept - 1, minlength=4) / len(f)
    assert torch.equal(fraction > 0, torch.tensor(expected, dtype=torch.float32) > 0)
    torch.testing.assert_close(fraction, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.07)
    assert torch.equal(kept_lengths(quantizer.eval()(f).f_hat, naive_prefixes(quantizer, f)), torch.full((600,), 4))


def test_loss_is_the_mean_over_the_kept_scales() -> None:
    quantizer, f = tiny_quantizer(dropout=1.0, dropout_start=1), latents(16)
    prefixes = naive_prefixes(quantizer, f)
    output = quantizer(f)
    kept = kept_lengths(output.f_hat, prefixes)
    assert len(kept.unique()) > 1
    error = (prefixes - f).square().mean(dim=(2, 3, 4))  # (K, B)
    summed = sum(1.25 * error[k, b] for b in range(16) for k in range(kept[b]))
    torch.testing.assert_close(output.loss, summed / kept.sum())


def test_codes_are_moving_averages_of_their_vectors() -> None:
    quantizer, f = tiny_quantizer(restart_below=0.0, dropout=1.0, dropout_start=1), latents(4)
    steps = list(quantizer.residual_steps(f))
    z = torch.cat([step.residual for step in steps], dim=1).flatten(0, 1)
    tokens = torch.cat([step.tokens for step in steps], dim=1).flatten()
    old, decay = quantizer.codebook.clone(), 2 / 11  # the first step of the warm-up
    quantizer(f)
    for code in range(CODES):
        assigned = [z[i] for i in range(len(z)) if tokens[i] == code]
        count = decay + (1 - decay) * len(assigned)
        total = decay * old[code] + (1 - decay) * sum(assigned, torch.zeros(CHANNELS, dtype=torch.float64))
        torch.testing.assert_close(quantizer.codebook[code], total / count, rtol=0, atol=1e-6)
        torch.testing.assert_close(quantizer.ema_count[code].item(), count, rtol=0, atol=1e-6)


def test_decay_of_the_moving_averages_is_warmed_up() -> None:
    quantizer = tiny_quantizer(restart_below=0.0, decay=0.5)
    for step in range(1, 13):
        before, f = quantizer.ema_count.clone(), latents(1)
        uses = torch.bincount(quantizer.encode(f).flatten(), minlength=CODES)
        quantizer(f)
        decay = min((1 + step) / (10 + step), 0.5)
        torch.testing.assert_close(quantizer.ema_count, decay * before + (1 - decay) * uses)


def test_unused_codes_are_reset_to_residuals_of_the_batch() -> None:
    quantizer, f = tiny_quantizer(restart_below=0.5, decay=0.3), latents()
    quantizer.codebook[3:7] = 1e3  # far from all latents
    quantizer.ema_sum[3:7] = 1e3
    z = torch.cat([step.residual for step in quantizer.residual_steps(f)], dim=1).flatten(0, 1)
    quantizer(f)
    for code in range(3, 7):
        assert (quantizer.codebook[code] - z).abs().amax(dim=1).min() < 1e-6
        assert quantizer.ema_count[code] == 1


def test_codebook_is_initialized_from_the_data() -> None:
    quantizer, f = tiny_quantizer().eval(), 40 + 5 * latents(6)

    def error() -> float:
        return (quantizer(f).f_hat - f).square().mean().item()

    random = error()
    quantizer.initialize_codebook(f)
    assert error() < random / 10
    assert torch.equal(quantizer.ema_sum, quantizer.codebook)
    # the first codes are residuals of scale 0, means of samples
    means = f.mean(dim=(2, 3))
    assert (quantizer.codebook[0] - means).abs().amax(dim=1).min() < 1e-4


def test_neighbors_are_sorted_by_distance() -> None:
    quantizer = tiny_quantizer()
    for count in (1, 5, CODES, 100):
        (neighbors,) = quantizer.neighbors(count)
        for code, near in enumerate(neighbors):
            distance = (quantizer.codebook - quantizer.codebook[code]).square().sum(dim=1)
            others = [c for c in distance.argsort().tolist() if c != code]
            assert near.tolist() == others[: min(count, CODES - 1)]


def test_autocast_does_not_change_the_quantizer() -> None:
    quantizer, f = tiny_quantizer().float().eval(), latents(8).float()
    with torch.autocast("cpu", torch.bfloat16):
        output, tokens = quantizer(f), quantizer.encode(f)
    assert torch.equal(tokens, quantizer.encode(f))
    assert torch.equal(output.f_hat, quantizer(f).f_hat)


def _update_on(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in ("plain", "restarting"):
        quantizer, f = torch.load(folder / f"{name}.pt", weights_only=False)
        torch.manual_seed(rank)
        quantizer.initialize_codebook(f[rank::2])
        torch.save(quantizer.codebook.clone(), folder / f"{name}_start_{rank}.pt")
        quantizer(f[rank::2])
        torch.save(quantizer.state_dict(), folder / f"{name}_{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_the_same_codebook_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    f = latents(4)
    plain = tiny_quantizer(restart_below=0.0, dropout=0.0)
    torch.save((plain, f), tmp_path / "plain.pt")
    torch.save((tiny_quantizer(restart_below=1.0), f), tmp_path / "restarting.pt")
    mp.spawn(_update_on, (tmp_path,), nprocs=2)
    for name in ("plain", "restarting"):
        first, second = (torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in ("codebook", "ema_count", "ema_sum"))
    whole = copy.deepcopy(plain)
    whole.codebook.copy_(torch.load(tmp_path / "plain_start_0.pt"))
    whole.ema_sum.copy_(whole.codebook)
    whole(f)
    torch.testing.assert_close(torch.load(tmp_path / "plain_0.pt")["codebook"], whole.codebook, rtol=0, atol=1e-12)


def test_codebooks_encode_interleaved_channels() -> None:
    """Nearest codes and lookup of each codebook depend on its channels channels only."""
    quantizer = tiny_quantizer(num_codebooks=3).eval()
    z = torch.randn(2, 7, CHANNELS, dtype=torch.float64)
    tokens = quantizer.nearest(z)
    assert tokens.shape == (2, 21)
    for book, codes in enumerate(quantizer.codes()):
        channels = slice(book, None, 3)
        assert torch.equal(codes, quantizer.codebook[:, channels])
        distance = (z[..., None, channels] - codes).square().sum(dim=-1)
        assert torch.equal(tokens[:, book::3], distance.argmin(dim=-1))
        assert torch.equal(quantizer.lookup(tokens).mT[..., channels], codes[tokens[:, book::3]])
    f = latents()
    assert quantizer.encode(f).shape == (3, 3 * quantizer.schedule.num_tokens)
    torch.testing.assert_close(quantizer(f).f_hat, quantizer.decode(quantizer.encode(f)))


def test_several_codebooks_are_updated_independently() -> None:
    quantizer, f = tiny_quantizer(restart_below=0.0, dropout=0.0, num_codebooks=2), latents(4)
    steps = list(quantizer.residual_steps(f))
    z = torch.cat([step.residual for step in steps], dim=1).flatten(0, 1)
    tokens = torch.cat([step.tokens for step in steps], dim=1).view(-1, 2)
    old, decay = quantizer.codes().clone(), 2 / 11
    quantizer(f)
    for book, channels in enumerate((slice(0, None, 2), slice(1, None, 2))):
        for code in range(CODES):
            assigned = z[tokens[:, book] == code][:, channels]
            count = decay + (1 - decay) * len(assigned)
            expected = (decay * old[book, code] + (1 - decay) * assigned.sum(dim=0)) / count
            torch.testing.assert_close(quantizer.codes()[book, code], expected, rtol=0, atol=1e-6)


def test_more_codebooks_reduce_the_quantization_error() -> None:
    f = latents(32)
    errors = []
    for books in (1, 2, 6):
        torch.manual_seed(0)
        quantizer = tiny_quantizer(num_codebooks=books, dropout=0.0)
        quantizer.initialize_codebook(f)
        for _ in range(20):
            quantizer(f)
        errors.append((quantizer.eval()(f).f_hat - f).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_usage_counts_codes_by_scale_and_codebook() -> None:
    quantizer = tiny_quantizer(num_codebooks=2)
    tokens = quantizer.encode(latents())
    usage = quantizer.usage(tokens)
    for k, tokens_k in enumerate(quantizer.split(tokens)):
        for book in range(2):
            assert torch.equal(usage[k, book], tokens_k[:, book::2].flatten().bincount(minlength=CODES))


def test_channels_that_are_not_a_multiple_of_the_codebooks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_codebooks is 4, but it must divide the 6 latent_channels"):
        tiny_quantizer(num_codebooks=4)
