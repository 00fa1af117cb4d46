from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from miar_monai.degradation import Degradation
from miar_monai.degradation.blur_estimation import estimate_blur, infer_degradation, without_overshoot


def natural(count: int = 6, shape: tuple[int, int] = (192, 256), slope: float = 2.4, seed: int = 0) -> Tensor:
    """Return sharp images with a power-law spectrum: (count, 1, *shape)."""
    noise = np.random.default_rng(seed).standard_normal((count, *shape))
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])).clip(min=1 / 256)
    images = np.fft.ifft2(np.fft.fft2(noise) * frequency ** (-slope / 2)).real
    images = (images - images.min()) / np.ptp(images)
    return torch.from_numpy(images)[:, None]


@pytest.mark.parametrize("sigma", [0.7, 0.85, 1.0, 1.2])
@pytest.mark.parametrize("levels", [None, 2**12, 2**8])
def test_blur_is_estimated_from_rounded_images(sigma: float, levels: int | None) -> None:
    lr = Degradation(sigma=sigma)(natural())
    if levels is not None:
        lr = (lr * (levels - 1)).round() / (levels - 1)
    assert estimate_blur(lr) == pytest.approx(sigma, abs=0.06)


@pytest.mark.parametrize("slope", [2.0, 3.0])
def test_blur_is_estimated_with_noise_for_any_spectral_slope_and_unit(slope: float) -> None:
    lr = Degradation()(natural(slope=slope))
    noisy = lr + 0.001 * torch.randn(lr.shape, dtype=lr.dtype, generator=torch.Generator().manual_seed(0))
    assert estimate_blur(noisy) == pytest.approx(1.0, abs=0.1)
    assert estimate_blur(4000 * noisy - 1024) == pytest.approx(estimate_blur(noisy), abs=1e-6)


def test_sharp_images_are_recognized() -> None:
    assert estimate_blur(Degradation(sigma=0)(natural())) < 0.5
    assert infer_degradation(Degradation(sigma=0)(natural()), Degradation()).sigma == 0


@pytest.mark.parametrize("lr", [torch.zeros(3, 1, 64, 64), torch.rand(3, 1, 64, 31), torch.rand(3, 1, 5, 5)])
def test_blur_of_the_training_is_assumed_for_small_and_empty_slices(lr: Tensor) -> None:
    assert estimate_blur(lr) is None
    training = Degradation(sigma=4.0, blur_on="hr")
    assert infer_degradation(lr, training) is training


@pytest.mark.parametrize(
    ("measured", "assumed"),
    [(0.0, 0.0), (0.6, 0.0), (0.7, 0.66), (0.96, 0.92), (0.98, 1.0), (1.12, 1.0), (1.14, 1.1), (1.38, 1.25)],
)
def test_assumed_blur_is_biased_low(measured: float, assumed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miar_monai.degradation.blur_estimation.estimate_blur", lambda lr, scale: measured)
    lr = torch.zeros(2, 1, 32, 32)
    assert infer_degradation(lr, Degradation()).sigma == pytest.approx(assumed)
    noisy = lr + 3e-4 * torch.randn(lr.shape, generator=torch.Generator().manual_seed(0))
    assert infer_degradation(noisy, Degradation()).sigma == pytest.approx(min(assumed, 1.0))  # noise looks like a blur


def test_the_estimate_ignores_empty_slices_and_subsamples_large_volumes() -> None:
    lr = Degradation()(natural())
    padded = torch.cat([torch.zeros_like(lr), lr])
    assert estimate_blur(padded) == estimate_blur(lr)
    many = lr.repeat(40, 1, 1, 1)
    assert estimate_blur(many) == pytest.approx(estimate_blur(lr), abs=0.021)


def linear(lr: Tensor, degradation: Degradation) -> Tensor:
    operator = degradation.for_lr(lr)
    return operator.restore(lr, (operator.noise_level(lr) / 0.2).clamp(min=1e-3))


@pytest.mark.parametrize("size", [(40, 48), (20, 24), (64, 64), (33, 47)])
@pytest.mark.parametrize("shape", ["ellipse", "rectangle"])
def test_sharp_edged_phantoms_are_not_assumed_to_be_blurred(shape: str, size: tuple[int, int]) -> None:
    x, y = (torch.linspace(-1, 1, side) for side in size)
    inside = torch.hypot(x[:, None], y) < 0.8 if shape == "ellipse" else (x.abs() < 0.6)[:, None] & (y.abs() < 0.6)
    phantom = inside.float()[None, None]
    assumed = without_overshoot(phantom, infer_degradation(phantom, Degradation()), linear)
    result = linear(phantom, assumed)
    assert -2 <= result.min() < 0
    assert 1 < result.max() <= 3


def test_overshoot_of_blurred_slices_and_single_bright_voxels_is_tolerated() -> None:
    lr = Degradation()(natural())
    lr[2, 0, 20, 20] = 20  # in one of six slices
    training = Degradation()
    assert without_overshoot(lr, training, linear) is training
    assert without_overshoot(torch.zeros(3, 1, 8, 8), training, linear) is training
