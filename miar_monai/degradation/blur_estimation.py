"""How blurred the slices of an input are, measured in their spectrum."""

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

SMALLEST, LARGEST = 32, 64  # voxels along an axis of the patches whose spectra are averaged
MOST = 128  # patches that are looked at
SIGMAS = np.arange(0, 1.41, 0.02)
MOST_BLUR = 1.25  # voxels: the networks have met no more in training
FALLS = np.arange(1.5, 4.51, 0.25)  # the power of images falls with a power of the frequency of about 2 to 3
NOISELESS = 1e-4  # of the range: less than that of rounding to 11 bits
_MOST_OVERSHOOT, _LOOKED_AT = 2.0, 4  # of the range of a slice; slices
FLOORS = np.exp(np.arange(-30, -1.9, 0.5))  # white noise, relative to the lowest frequencies


def estimate_blur(lr: Tensor, scale: int = 4) -> float | None:
    """Return the standard deviation, in voxels, of the Gaussian blur of low-resolution slices.

    Their power spectrum is compared with that of images whose power falls with a power of the frequency, downsampled
    as `Degradation` does it, blurred, with white noise: the blur, the fall and the noise that fit best, on a grid.
    Accurate to about 0.05 from 0.7 on in several slices; below, a blur is not to be told from a scanner that is not
    quite sharp.

    Args:
        lr: slices of one volume, (N, 1, h, w).
        scale: of the downsampling.

    Returns:
        The blur, or None where slices are too small or empty.

    Example:
        >>> import torch
        >>> noise = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3)
        >>> hr = torch.nn.functional.interpolate(noise - noise.mean(), scale_factor=8.0, mode="bilinear")
        >>> 0.9 < estimate_blur(Degradation(sigma=1.2)(hr)) < 1.4
        True
    """
    height, width = (min(size, LARGEST) for size in lr.shape[-2:])
    if min(height, width) < SMALLEST:
        return None
    cut = lr.detach().cpu().double().unfold(-2, height, height).unfold(-2, width, width)
    patches = cut.reshape(-1, height, width).numpy()
    patches = patches[np.ptp(patches, axis=(1, 2)) > 0]
    if not len(patches):
        return None
    patches = patches[np.linspace(0, len(patches) - 1, min(len(patches), MOST)).round().astype(int)]
    window = _window(height, width)
    level = (patches * window).sum(axis=(1, 2), keepdims=True) / window.sum()
    power = (np.abs(np.fft.fft2((patches - level) * window)) ** 2).mean(axis=0)
    found = np.log(_rings(height, width) @ power.ravel()).astype(np.float32)  # (R,)
    models, squares = _models(height, width, scale)
    misfit = squares - 2 * models @ found  # R times the variance of the difference, but for what all have in common
    return float(SIGMAS[np.unravel_index(misfit.argmin(), misfit.shape)[0]])


def infer_degradation(lr: Tensor, own: Degradation) -> Degradation:
    """Return how low-resolution slices came about, as far as their spectrum says.

    A blur that was not there costs more than one that goes unnoticed: what is close to ``own`` is taken for it, what a
    sharp scanner may have made is taken for unblurred, and anything else for a little sharper than it looks. What holds
    noise, be it of rounding, is never taken for more blurred than ``own``.

    Args:
        lr: slices of one volume, (N, 1, h, w), in about [0, 1].
        own: what the network was built for; also the answer where the slices say nothing.

    Example:
        >>> import torch
        >>> infer_degradation(torch.zeros(1, 1, 64, 64), Degradation())
        Degradation(scale=4, sigma=1.0, blur_on='lr', profile='bicubic', thickness=1.0)
    """
    measured = estimate_blur(lr, int(own.scales[0]))
    # real slices read 0.02 to 0.05 too high, single ones up to 0.15, and with noise any number
    if measured is None or -0.03 < measured - own.lr_sigma < 0.13:
        return own
    if measured > own.lr_sigma and own.for_lr(lr).noise_level(lr).median() > NOISELESS:
        return own
    return replace(own, sigma=0.0 if measured < 0.65 else min(measured - 0.04, MOST_BLUR), blur_on="lr")


def without_overshoot(
    lr: Tensor, assumed: Degradation, restore: Callable[[Tensor, Degradation], Tensor]
) -> Degradation:
    """Return a degradation whose inverse fits low-resolution slices: less blur than assumed, if that overshoots.

    The inverse of a blur that was not there makes waves of an edge that are higher than the edge itself, as on
    phantoms without noise or partial volumes. Real slices gain about half of their range, sharpened ones more.

    Args:
        lr: slices of one volume, (N, 1, h, w).
        assumed: of `infer_degradation`.
        restore: gives linear estimates of slices and their degradation, (N, 1, H, W).

    Example:
        >>> import torch
        >>> edges = torch.zeros(1, 1, 32, 32)
        >>> edges[..., 8:24, 8:24] = 1
        >>> def restore(lr, degradation):
        ...     return degradation.for_lr(lr).restore(lr, 1e-3)
        >>> without_overshoot(edges, Degradation(), restore).sigma
        0.5
    """
    lr = lr[lr.amax(dim=(1, 2, 3)) > lr.amin(dim=(1, 2, 3))]
    if not len(lr):
        return assumed
    lr = lr[torch.linspace(0, len(lr) - 1, min(len(lr), _LOOKED_AT)).round().long()]
    low, high = lr.amin(dim=(1, 2, 3)), lr.amax(dim=(1, 2, 3))
    less = (replace(assumed, sigma=sigma, blur_on="lr") for sigma in (0.5, 0.0) if sigma < assumed.lr_sigma)
    for degradation in (assumed, *less):
        linear = restore(lr, degradation)
        beyond = torch.maximum(linear.amax(dim=(1, 2, 3)) - high, low - linear.amin(dim=(1, 2, 3))) / (high - low)
        if beyond.median() <= _MOST_OVERSHOOT:
            break
    return degradation


@lru_cache(maxsize=8)
def _window(height: int, width: int) -> np.ndarray:
    """Return a window without side lobes, which would fill what a blur leaves empty."""
    return np.outer(blackmanharris(height), blackmanharris(width))


@lru_cache(maxsize=8)
def _rings(height: int, width: int) -> np.ndarray:
    """Return the matrix (R, height · width) that averages a spectrum over rings of like frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)).ravel()
    ring = np.digitize(frequency, np.linspace(0.05, 0.7, 41))
    masks = np.stack([ring == i for i in range(1, 41)]).astype(float)
    masks = masks[masks.sum(axis=1) >= 4]
    return masks / masks.sum(axis=1, keepdims=True)


@lru_cache(maxsize=8)
def _models(height: int, width: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithm of the expected power in each ring, and the sum of its squares over the rings.

    Their mean over the rings is taken off, since the brightness of the images is free: (sigmas, falls, floors, R).
    """
    rings, rows, columns = _rings(height, width), np.fft.fftfreq(height), np.fft.fftfreq(width)
    sharp = np.zeros((len(FALLS), height, width))
    for i in range(-scale // 2, scale // 2):  # what downsampling folds into a frequency
        for j in range(-scale // 2, scale // 2):
            frequency = np.hypot((rows + i)[:, None], columns + j).clip(min=1e-3)
            passed = np.outer(_response(rows + i, scale, 0), _response(columns + j, scale, 0)) ** 2
            sharp = sharp + frequency ** -FALLS[:, None, None] * passed  # (falls, height, width)
    sharp[:, 0, 0] = 0  # the mean is taken off
    spread = np.fft.fft2(np.abs(np.fft.fft2(_window(height, width))) ** 2)  # which the window does to a spectrum
    spectra = []
    for sigma in SIGMAS:
        passed = np.outer(_response(rows, 1, sigma), _response(columns, 1, sigma)) ** 2
        seen = np.fft.ifft2(np.fft.fft2(sharp * passed) * spread).real  # (falls, height, width)
        spectra.append(seen.reshape(len(FALLS), -1) @ rings.T)
    clean = np.stack(spectra)[:, :, None]  # (sigmas, falls, 1, R)
    models = np.log(clean + FLOORS[:, None] * clean[..., :1])
    models -= models.mean(axis=-1, keepdims=True)
    models = models.astype(np.float32)  # they are read once for each input, which takes most of the time
    return models, (models**2).sum(axis=-1)


def _response(frequency: np.ndarray, scale: int, sigma: float) -> np.ndarray:
    """Return what a degradation leaves of waves, their frequency in cycles for each of its LR voxels."""
    size = 32 * scale
    weights = AxisDegradation(size, 32, scale, sigma=sigma).matrix()[16].numpy()  # of a voxel far from the border
    return np.abs(np.exp(-2j * np.pi * frequency[:, None] / scale * np.arange(size)) @ weights)
