"""The limit of posterior samples, and the patches of noise that it removes from those of the shipped brain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.phantoms import head
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.noise_patches import Slices, drawn
from miar_monai.data.io import read_volume
from miar_monai.degradation import Degradation
from miar_monai.inference.resolver import SuperResolver
from miar_monai.networks.sample_limit import LIMIT, excess


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def local_rms(deviations: Tensor) -> Tensor:
    return F.avg_pool2d(deviations.square(), 9, stride=1, padding=4, count_include_pad=False).sqrt()


@given(size=st.tuples(st.integers(1, 21), st.integers(1, 21)), expected=st.floats(0.0, 0.2), seed=st.integers(0, 99))
def test_deviations_lose_only_what_is_beyond_the_limit(size: tuple[int, int], expected: float, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    deviations = torch.randn(2, 3, *size, generator=source) * torch.rand(2, 3, 1, 1, generator=source)
    lost = excess(deviations, torch.full((2, 1, *size), expected))
    limit, rms = LIMIT * (expected + 0.005), local_rms(deviations)
    remains = torch.where(rms > limit, (limit / rms).square(), 1.0) * deviations
    torch.testing.assert_close(deviations - lost, remains, atol=1e-5, rtol=1e-4)


def test_a_patch_of_noise_does_not_change_what_is_far_from_it() -> None:
    deviations = 0.02 * torch.randn(1, 2, 47, 51, generator=generator())
    deviations[:, 1, 20:27, 30:37] = torch.randn(7, 7, generator=generator())
    lost = excess(deviations, torch.full((1, 1, 47, 51), 0.02))
    assert (lost[:, 1, 20:27, 30:37].abs() > 0.5 * deviations[:, 1, 20:27, 30:37].abs()).all()
    lost[:, 1, 16:31, 26:41] = 0
    assert not lost.any()


@pytest.fixture(scope="module")
def brain_mri() -> SuperResolver:
    return SuperResolver("brain_mri", "cpu")


def test_samples_of_a_noisy_image_have_no_patches_of_noise(brain_mri: SuperResolver) -> None:
    """One sample in a place should not deviate from the others by many times their spread in the neighborhood."""
    lr = torch.from_numpy(head((64, 59, 1), seed=3)).float().movedim(-1, 0)[:, None]
    lr = lr + 0.02 * torch.randn(lr.shape, generator=generator())
    assumed = Degradation(2, 0.0)
    slices = Slices("head", "0.02", lr, assumed)
    free, limited = (drawn(brain_mri, slices, limited, samples=8, seed=0)[0] for limited in (False, True))
    before, after = (local_rms((x - x.median(dim=0).values)[None]).amax() for x in (free, limited))
    assert before > 2 * after
    operator = assumed.for_lr(lr)
    inside = (slice(None), slice(3, -3), slice(3, -3))
    mismatch = [(operator.A(x[:, None]) - lr)[:, 0][inside].square().mean().sqrt() for x in (free, limited)]
    assert mismatch[1] < 1.1 * mismatch[0]  # both explain the image up to its noise


def test_samples_of_a_brain_without_noise_hardly_change(brain_mri: SuperResolver, real_data: Path) -> None:
    name = "TCGA-DU-7294"
    volume = next((real_data / "brain" / name).glob("*t1*.nii.gz"))
    hr = torch.from_numpy(read_volume(volume).array[:, :, 77:78]).float().movedim(-1, 0)[:, None]
    hr = hr / hr.quantile(0.995)
    degradation = Degradation()
    slices = Slices(name, "0", degradation(hr), degradation)
    free, limited = (drawn(brain_mri, slices, limited, samples=4, seed=0)[0] for limited in (False, True))
    errors = [(x - hr[0]).square().mean().log10() * 10 for x in (free, limited)]
    assert abs(errors[0] - errors[1]) < 0.03  # dB
    assert (free - limited).abs().mean() < 1e-4
