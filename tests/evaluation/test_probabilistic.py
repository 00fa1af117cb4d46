from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from miar_monai.evaluation.probabilistic import (
    fair_crps,
    laplace_crps,
    radial_power,
    sparsification_error,
    spread_over_skill,
)
from miar_monai.training.scores import fair_energy_score


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_spread_over_skill_tells_too_little_from_too_much() -> None:
    truth = drawn((4096, 1, 3), seed=2)
    ratios = [spread_over_skill(std * drawn((4096, 5, 3), seed=3) - truth).item() for std in (0.5, 1.0, 2.0)]
    assert ratios == pytest.approx([0.54, 1.0, 1.66], abs=0.05)


@settings(deadline=None)
@given(arrays(np.float64, (3, 5), elements=st.floats(-10, 10)), arrays(np.float64, 3, elements=st.floats(-10, 10)))
def test_the_crps_is_that_of_all_pairs(samples: np.ndarray, truth: np.ndarray) -> None:
    pairs = np.abs(samples[:, :, None] - samples[:, None]).sum(axis=(1, 2)) / (5 * 4)
    expected = np.abs(samples - truth[:, None]).mean(axis=1) - pairs / 2
    assert fair_crps(torch.from_numpy(samples), torch.from_numpy(truth)).numpy() == pytest.approx(expected, abs=1e-9)


def test_the_loss_of_two_samples_is_their_crps() -> None:
    samples, truth = drawn((7, 2), seed=0), drawn((7,), seed=1)
    found = fair_energy_score(samples - truth[:, None]).item()
    assert found == pytest.approx(fair_crps(samples, truth).mean().item(), abs=1e-6)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_crps_of_a_laplace_distribution_is_that_of_its_samples(scale: float) -> None:
    uniform = torch.rand(4, 20000, generator=torch.Generator().manual_seed(0)) - 0.5
    samples = 1.0 - scale * uniform.sign() * torch.log1p(-2 * uniform.abs())
    truth = torch.tensor([-3.0, 0.9, 1.0, 2.0])
    found = laplace_crps(torch.ones(4), torch.full((4,), scale), truth)
    assert found.tolist() == pytest.approx(fair_crps(samples, truth).tolist(), rel=0.05)


def test_an_order_by_chance_lies_between_the_best_and_the_worst() -> None:
    error = drawn((5000,), seed=0).abs()
    best, chance, worst = (sparsification_error(x, error) for x in (3 * error, drawn((5000,), seed=1), -error))
    assert best == 0 < chance < worst


def test_the_power_of_white_noise_is_the_same_in_all_bands_and_grows_with_the_square() -> None:
    noise = drawn((20, 48, 64), seed=0)
    power = radial_power(noise, (0.2, 0.4, 0.6, 0.8)).mean(dim=0)
    assert (power / power.mean()).tolist() == pytest.approx([1.0] * 3, abs=0.1)
    torch.testing.assert_close(radial_power(3 * noise, (0.2, 0.4)), 9 * radial_power(noise, (0.2, 0.4)))


def test_a_wave_lies_in_its_band() -> None:
    wave = torch.sin(torch.pi * 0.3 * torch.arange(64.0))  # 0.3 times the Nyquist frequency
    for image in (wave.expand(64, 64), wave.expand(64, 64).T):
        power = radial_power(image[None], (0.1, 0.2, 0.25, 0.35, 0.4, 1.0))[0]
        assert power.argmax() == 2
        assert power[2] > 100 * power[0]
