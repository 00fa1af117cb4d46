"""Estimation of the blur of slices from their power spectrum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from scipy.signal.windows import blackmanharris
from torch import Tensor

from miar_monai.degradation.axis import AxisDegradation
from miar_monai.degradation.description import Degradation

__all__ = ["estimate_blur", "infer_degradation", "without_overshoot"]

MIN_PATCH, MAX_PATCH = 32, 64  # side in voxels of the patches whose spectra are averaged
MAX_PATCHES = 128
SIGMAS = np.arange(0, 1.41, 0.02)  # LR voxels
MAX_BLUR = 1.25  # LR voxels: the largest blur in training
SPECTRAL_SLOPES = np.arange(1.5, 4.51, 0.25)  # the power of images is about 1 / frequency^2 to 1 / frequency^3
NOISE_FLOORS = np.exp(np.arange(-30, -1.9, 0.5))  # white noise, relative to the lowest frequencies
NOISELESS = 1e-4  # of the intensity range: below the noise of rounding to 11 bits
_MAX_OVERSHOOT = 2.0  # of the intensity range of a slice
_BATCH = 16  # slices whose noise is measured at once
_MAX_SLICES = 4  # in which overshoot is measured


def estimate_blur(lr: Tensor, scale: int = 4) -> float | None:
    """Return the standard deviation, in LR voxels, of the Gaussian blur of LR slices.

    Their power spectrum is fitted by that of images with a power-law spectrum, downsampled as by `Degradation`, blurred
    and with white noise, in a grid search over blur, spectral slope and noise floor. For several slices the estimate is
    accurate to about 0.05 above 0.7; a smaller blur cannot be distinguished from that of the scanner.

    Args:
        lr: slices of one volume, (N, 1, h, w).
        scale: factor of the downsampling.

    Returns:
        The blur, or None if the slices are too small or constant.

    Example:
        >>> import torch
        >>> noise = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3)
        >>> hr = torch.nn.functional.interpolate(noise - noise.mean(), scale_factor=8.0, mode="bilinear")
        >>> 0.9 < estimate_blur(Degradation(sigma=1.2)(hr)) < 1.4
        True
    """
    height, width = (min(size, MAX_PATCH) for size in lr.shape[-2:])
    if min(height, width) < MIN_PATCH:
        return None
    tiles = lr.detach().cpu().unfold(-2, height, height).unfold(-2, width, width)  # a view, (N, 1, ..., height, width)
    varied = (tiles.amax(dim=(-2, -1)) > tiles.amin(dim=(-2, -1))).nonzero()
    if not len(varied):
        return None
    chosen = varied[np.linspace(0, len(varied) - 1, min(len(varied), MAX_PATCHES)).round().astype(int)]
    patches = tiles[tuple(chosen.T)].double().numpy()
    window = _window(height, width)
    mean = (patches * window).sum(axis=(1, 2), keepdims=True) / window.sum()
    power = (np.abs(np.fft.fft2((patches - mean) * window)) ** 2).mean(axis=0)
    spectrum = np.log(_rings(height, width) @ power.ravel()).astype(np.float32)  # (R,)
    models, squares = _models(height, width, scale)
    misfit = squares - 2 * models @ spectrum  # R times the variance of the difference, up to a constant
    return float(SIGMAS[np.unravel_index(misfit.argmin(), misfit.shape)[0]])


def infer_degradation(lr: Tensor, training_degradation: Degradation) -> Degradation:
    """Return the degradation of LR slices, inferred from their spectrum.

    Overestimating the blur is costlier than underestimating it, so the estimate is biased low. A blur close to that of
    the training is replaced by it, one that a sharp scanner may cause by no blur, and any other is reduced a little.
    Slices with noise, including that of rounding, are never assumed to be more blurred than the training data.

    Args:
        lr: slices of one volume, (N, 1, h, w), in about [0, 1].
        training_degradation: degradation of the training data; returned too if the blur cannot be estimated.

    Example:
        >>> import torch
        >>> infer_degradation(torch.zeros(1, 1, 64, 64), Degradation())
        Degradation(scale=4, sigma=1.0, blur_on='lr', profile='bicubic', thickness=1.0)
    """
    measured = estimate_blur(lr, int(training_degradation.scales[0]))
    training_sigma = training_degradation.lr_sigma
    # estimates of real slices are 0.02 to 0.05 too high, of single slices up to 0.15, and of noisy ones arbitrary
    if measured is None or -0.03 < measured - training_sigma < 0.13:
        return training_degradation
    if measured > training_sigma:
        operator = training_degradation.for_lr(lr)
        if torch.cat([operator.noise_level(part) for part in lr.split(_BATCH)]).median() > NOISELESS:
            return training_degradation
    return replace(training_degradation, sigma=0.0 if measured < 0.65 else min(measured - 0.04, MAX_BLUR), blur_on="lr")


def without_overshoot(
    lr: Tensor, assumed: Degradation, restore: Callable[[Tensor, Degradation], Tensor]
) -> Degradation:
    """Reduce the assumed blur of LR slices until its inverse does not overshoot.

    Inverting a blur that is not present causes ringing higher than the edges themselves, for example on phantoms
    without noise or partial volumes. In linear estimates of real slices the intensity range grows by about half, of
    sharpened ones by more.

    Args:
        lr: slices of one volume, (N, 1, h, w).
        assumed: result of `infer_degradation`.
        restore: maps slices and their degradation to linear estimates, (N, 1, H, W).

    Example:
        >>> import torch
        >>> edges = torch.zeros(1, 1, 32, 32)
        >>> edges[..., 8:24, 8:24] = 1
        >>> def restore(lr, degradation):
        ...     return degradation.for_lr(lr).restore(lr, 1e-3)
        >>> without_overshoot(edges, Degradation(), restore).sigma
        0.5
    """
    varied = (lr.amax(dim=(1, 2, 3)) > lr.amin(dim=(1, 2, 3))).nonzero().flatten()
    if not len(varied):
        return assumed
    lr = lr[varied[torch.linspace(0, len(varied) - 1, min(len(varied), _MAX_SLICES)).round().long()]]
    low, high = lr.amin(dim=(1, 2, 3)), lr.amax(dim=(1, 2, 3))
    candidates = (replace(assumed, sigma=sigma, blur_on="lr") for sigma in (0.5, 0.0) if sigma < assumed.lr_sigma)
    for degradation in (assumed, *candidates):
        linear = restore(lr, degradation)
        overshoot = torch.maximum(linear.amax(dim=(1, 2, 3)) - high, low - linear.amin(dim=(1, 2, 3))) / (high - low)
        if overshoot.median() <= _MAX_OVERSHOOT:
            break
    return degradation


@lru_cache(maxsize=8)
def _window(height: int, width: int) -> np.ndarray:
    """Return a window with low side lobes, whose leakage would mask the frequencies that a blur removes."""
    return np.outer(blackmanharris(height), blackmanharris(width))


@lru_cache(maxsize=8)
def _rings(height: int, width: int) -> np.ndarray:
    """Return the matrix (R, height · width) that averages a spectrum over rings of equal frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)).ravel()
    ring = np.digitize(frequency, np.linspace(0.05, 0.7, 41))
    masks = np.stack([ring == i for i in range(1, 41)]).astype(float)
    masks = masks[masks.sum(axis=1) >= 4]
    return masks / masks.sum(axis=1, keepdims=True)


@lru_cache(maxsize=8)
def _models(height: int, width: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the log of the expected power per ring, (sigmas, slopes, floors, R), and the sum of squares over rings.

    The mean over the rings is subtracted, since the brightness of the images is arbitrary.
    """
    rings, rows, columns = _rings(height, width), np.fft.fftfreq(height), np.fft.fftfreq(width)
    sharp = np.zeros((len(SPECTRAL_SLOPES), height, width))
    for i in range(-scale // 2, scale // 2):  # aliases of a frequency
        for j in range(-scale // 2, scale // 2):
            frequency = np.hypot((rows + i)[:, None], columns + j).clip(min=1e-3)
            gain = np.outer(_response(rows + i, scale, 0), _response(columns + j, scale, 0)) ** 2
            sharp = sharp + frequency ** -SPECTRAL_SLOPES[:, None, None] * gain  # (slopes, height, width)
    sharp[:, 0, 0] = 0  # the mean of a patch is subtracted
    leakage = np.fft.fft2(np.abs(np.fft.fft2(_window(height, width))) ** 2)  # the window convolves the spectrum
    spectra = []
    for sigma in SIGMAS:
        gain = np.outer(_response(rows, 1, sigma), _response(columns, 1, sigma)) ** 2
        windowed = np.fft.ifft2(np.fft.fft2(sharp * gain) * leakage).real  # (slopes, height, width)
        spectra.append(windowed.reshape(len(SPECTRAL_SLOPES), -1) @ rings.T)
    clean = np.stack(spectra)[:, :, None]  # (sigmas, slopes, 1, R)
    models = np.log(clean + NOISE_FLOORS[:, None] * clean[..., :1])
    models -= models.mean(axis=-1, keepdims=True)
    models = models.astype(np.float32)  # reading them takes most of the time of an estimate
    return models, (models**2).sum(axis=-1)


def _response(frequency: np.ndarray, scale: int, sigma: float) -> np.ndarray:
    """Return the gain of a degradation for frequencies in cycles per LR voxel."""
    size = 32 * scale
    weights = AxisDegradation(size, 32, scale, sigma=sigma).matrix()[16].numpy()  # of a voxel far from the border
    return np.abs(np.exp(-2j * np.pi * frequency[:, None] / scale * np.arange(size)) @ weights)
