"""Images as a scanner makes them: anatomy, complex noise, and interpolation by zero-filling."""

from __future__ import annotations

import numpy as np
from helpers.phantoms import head


def anatomy(shape: tuple[int, int, int] = (150, 140, 4), seed: int = 0) -> np.ndarray:
    """Return a head with folds in [0, 1]: its power falls with the square of the frequency, as in MR images."""
    generator = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]).clip(0.02)
    spectrum = np.fft.rfft2(generator.standard_normal(shape), axes=(0, 1)) / frequencies[..., None]
    folds = np.fft.irfft2(spectrum, shape[:2], axes=(0, 1))
    outline = head(shape, seed)
    return np.where(outline > 0, (outline + 0.1 * folds / folds.std()).clip(0.15, 1.5), 0) / 1.5


def noisy(image: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    """Return a complex image with noise in both parts, as a scanner measures it."""
    generator = np.random.default_rng(seed)
    return image + noise * (generator.standard_normal(image.shape) + 1j * generator.standard_normal(image.shape))


def zero_filled(image: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Return the magnitude on a finer grid, by zeros around k-space."""
    before = [side // 2 - old // 2 for side, old in zip(sides, image.shape, strict=False)]
    width = [(b, side - old - b) for b, side, old in zip(before, sides, image.shape, strict=False)]
    k_space = np.pad(np.fft.fftshift(np.fft.fft2(image, axes=(0, 1)), (0, 1)), [*width, (0, 0)])
    scale = np.prod(sides) / np.prod(image.shape[:2])
    return scale * np.abs(np.fft.ifft2(np.fft.ifftshift(k_space, (0, 1)), axes=(0, 1)))
