"""Scanning Fourier ring correlation (sFRC): where the detail of a slice is not that of the truth.

The Fourier ring correlation (FRC) of two patches is the correlation of their Fourier coefficients at one spatial
frequency, whatever its direction. That of a super-resolved patch with the truth is 1 at low frequencies, which the
input determines, and falls at high ones. A patch is labelled if it falls below a threshold at too low a frequency.

Reference:
    Kc et al., sFRC for Assessing Hallucinations in Medical Image Restoration, arXiv 2603.04673, 2026.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miar_monai.errors import ConfigurationError

__all__ = ["CUTOFF", "PATCH_SIDE", "THRESHOLD", "CorrelationScan", "patch_starts", "patches_within", "ring_correlation"]

PATCH_SIDE = 48
"""Voxels; the authors' choice for MRI."""

THRESHOLD = 0.5
"""Of the correlation; the authors' choice for 4x super-resolution of CT."""

CUTOFF = 0.32
"""Share of the Nyquist frequency; the authors' choice for 4x super-resolution of CT, 0.33 per mm at 0.48 mm."""

_SHARE_OF_POWER = 0.5  # of the truth's, above which a result has detail of its own


def ring_correlation(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Fourier ring correlation of square patches under a Hann window, and the ratio of their power.

    The mean of each patch is subtracted first, so that neither brightness nor contrast matters to the correlation.

    Args:
        first: (..., side, side).
        second: patches of the same shape.

    Returns:
        Correlation at the frequencies 1, ..., side // 2 cycles per side, and the power of ``first`` divided by that of
        ``second``: (..., side // 2) each. Where both patches have no power, both are 1; where only one has, the
        correlation is 0.

    Example:
        >>> image = torch.rand(15, 15)
        >>> correlation, power = ring_correlation(3 - 2 * image, image)
        >>> [round(value, 3) for value in (*correlation[:2].tolist(), *power[:2].tolist())]
        [-1.0, -1.0, 4.0, 4.0]
    """
    a, b = (_spectrum(patches) for patches in (first, second))
    together, power, reference = (_ring_sums((x * y.conj()).real) for x, y in ((a, b), (a, a), (b, b)))
    scale = power.sqrt() * reference.sqrt()
    neither = (power == 0) & (reference == 0)
    return torch.where(scale > 0, together / scale, neither.to(scale)), torch.where(neither, 1, power / reference)


def _spectrum(patches: Tensor) -> Tensor:
    side = patches.shape[-1]
    profile = torch.hann_window(side, periodic=False, device=patches.device)
    window = profile[:, None] * profile
    mean = (patches * window).sum(dim=(-2, -1), keepdim=True) / window.sum()
    return torch.fft.fft2((patches.float() - mean) * window)


def _ring_sums(values: Tensor) -> Tensor:
    """Return the sums of values of Fourier coefficients, (..., side, side), by ring: (..., side // 2)."""
    side = values.shape[-1]
    index = side * torch.fft.fftfreq(side, device=values.device)
    ring = torch.hypot(index[:, None], index).round().long().clamp(max=side // 2 + 1)  # corners are left out
    sums = values.new_zeros(*values.shape[:-2], side // 2 + 2)
    return sums.index_add_(-1, ring.flatten(), values.flatten(-2))[..., 1:-1]


class CorrelationScan(NamedTuple):
    """The correlation of slices with the truth, in patches that overlap by half."""

    frequency: Tensor
    """Share of the Nyquist frequency at which the correlation falls below the threshold, 1 if it does not:
    (N, rows, columns)."""
    power: Tensor
    """Power of the slices at this frequency, relative to that of the truth: (N, rows, columns)."""

    @classmethod
    def of(cls, sr: Tensor, hr: Tensor, side: int = PATCH_SIDE, threshold: float = THRESHOLD) -> CorrelationScan:
        """Scan slices.

        Args:
            sr: slices, (N, 1, H, W).
            hr: true slices, (N, 1, H, W).
            side: side of the patches in voxels; see `patch_starts`.
            threshold: of the correlation.

        Raises:
            ConfigurationError: if a slice is smaller than a patch.

        Example:
            >>> hr = torch.rand(1, 1, 50, 60)
            >>> scan = CorrelationScan.of(hr, hr, side=20)
            >>> scan.frequency.shape, scan.frequency.min().item()
            (torch.Size([1, 4, 5]), 1.0)
        """
        correlation, power = ring_correlation(*(_patches(images, side) for images in (sr, hr)))
        below = correlation < threshold
        first = below.int().argmax(dim=-1, keepdim=True)  # (N, rows, columns, 1)
        before = torch.cat([torch.ones_like(correlation[..., :1]), correlation], dim=-1).gather(-1, first)
        crossed = (before - threshold) / (before - correlation.gather(-1, first))  # between two rings
        frequency = torch.where(below.any(dim=-1, keepdim=True), (first + crossed) / (side / 2), 1)
        return cls(frequency.squeeze(-1), power.gather(-1, first).squeeze(-1))

    def labelled(self, cutoff: float = CUTOFF) -> Tensor:
        """Return which patches are not correlated with the truth up to a frequency: bool, (N, rows, columns).

        These are the patches that sFRC labels. Detail that is missing is not correlated either.

        Args:
            cutoff: share of the Nyquist frequency.
        """
        return self.frequency < cutoff

    def invented(self, cutoff: float = CUTOFF) -> Tensor:
        """Return which `labelled` patches have detail of their own, at least half the power of the truth there.

        In the others, detail is missing.

        Args:
            cutoff: share of the Nyquist frequency.

        Example:
            >>> hr = torch.rand(1, 1, 48, 48)
            >>> [bool(CorrelationScan.of(sr, hr).invented().all()) for sr in (hr.flip(-1), 0 * hr)]
            [True, False]
        """
        return self.labelled(cutoff) & (self.power >= _SHARE_OF_POWER)


def patch_starts(length: int, side: int) -> range:
    """Return the first voxels of patches along an axis; they overlap by half, and their margins are equal.

    Args:
        length: length of the axis in voxels.
        side: side of the patches in voxels.

    Raises:
        ConfigurationError: if the axis is shorter than a patch, or a patch has less than 4 voxels.

    Example:
        >>> list(patch_starts(50, 20))
        [0, 10, 20, 30]
    """
    if not 4 <= side <= length:
        raise ConfigurationError(
            f"patches of {side} voxels do not fit into slices of {length} voxels: between 4 voxels and the side of the "
            "slice are needed; give another side."
        )
    step = side // 2
    return range((length - side) % step // 2, length - side + 1, step)


def _patches(images: Tensor, side: int) -> Tensor:
    """Return the patches of images (N, 1, H, W): (N, rows, columns, side, side)."""
    for dim in (2, 3):
        images = images.narrow(
            dim, (starts := patch_starts(images.shape[dim], side)).start, images.shape[dim] - starts.start
        )
    return images[:, 0].unfold(1, side, side // 2).unfold(2, side, side // 2)


def patches_within(mask: Tensor, side: int = PATCH_SIDE, share: float = 0.5) -> Tensor:
    """Return which patches have a share of their voxels in a mask: bool, (N, rows, columns).

    Args:
        mask: bool, (N, 1, H, W).
        side: side of the patches in voxels.
        share: smallest share of the voxels.
    """
    return _patches(mask.float(), side).mean(dim=(-2, -1)) >= share
