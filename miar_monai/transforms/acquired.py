"""The acquired grid of a volume that the scanner interpolated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.signal import kaiser_beta

from miar_monai.data.volume import Volume
from miar_monai.errors import SettingError, check_range

__all__ = ["decimation_matrix", "to_acquired_spacing"]

_EQUAL = 0.02  # relative difference of spacings that is rounding
_MAX_FACTOR = 8.0  # acquired over stored spacing
_ATTENUATION = 120.0  # dB, the precision of the kernel: about 1e-6
_AXES = ("left-right", "posterior-anterior", "inferior-superior")


def to_acquired_spacing(volume: Volume, spacing: Sequence[float]) -> Volume:
    """Return a volume at the spacing of its acquisition: undo an interpolation by the scanner.

    Each axis is resampled by `decimation_matrix` to the exact spacing, around the same center. Interpolation by a sinc,
    and zero-filling in k-space of images that stay linear in it, are undone to about 1e-6 of the range, except next to
    the edges. Other interpolations are undone approximately. In a phantom (``tests/transforms/test_acquired.py``), the
    rms error for the magnitude of a zero-filled image is at most 1 % of the range, and 0.1 % three voxels away from
    dark background; for linear interpolation it is 0.8 %, for a cubic spline 0.15 %.

    Args:
        volume: in any units.
        spacing: acquired distances of the voxels in millimeters along the patient axes left-right, posterior-anterior
            and inferior-superior; or one number for all axes whose voxels are closer.

    Raises:
        SettingError: if no axis would change, three numbers are given and one is below the spacing of the volume, or an
            axis would have a single voxel or voxels more than 8 times as large.

    Example:
        >>> from pathlib import Path
        >>> array = np.ones((8, 8, 3), np.float32)
        >>> volume = Volume(array, np.diag([0.5, 0.5, 4, 1]), np.dtype("int16"), Path("scan.nii"))
        >>> result = to_acquired_spacing(volume, [1])
        >>> result.array.shape, result.grid.patient_spacing, bool(np.allclose(result.array, 1))
        ((4, 4, 3), (1.0, 1.0, 4.0), True)
    """
    factors = _factors(volume, spacing)
    coarse, array = volume.grid.resized(factors), volume.array
    for axis, factor in enumerate(factors):
        if factor > 1:
            matrix = decimation_matrix(array.shape[axis], coarse.shape[axis], factor).astype(np.float32)
            array = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    if volume.array.min() >= 0:  # a kernel with negative lobes undershoots
        array = array.clip(min=0)
    return volume._replace(array=np.ascontiguousarray(array), affine=coarse.affine)


def decimation_matrix(size: int, new_size: int, factor: float) -> np.ndarray:
    """Return the matrix that resamples a line without loss up to the Nyquist frequency of the coarser one.

    A sinc with a Kaiser window: frequencies up to the new Nyquist frequency pass, those from twice as high on do not.
    An interpolated line has none in between, so that the kernel can be short: for factors from 1.25, edges have no
    influence on samples farther than 16 new ones from them. Beyond the edges the line is reflected.

    Args:
        size: number of samples.
        new_size: number of samples of the coarser line, with the same center.
        factor: its spacing over the old one, above 1.

    Returns:
        (new_size, size), float64. Each row sums to 1.

    Example:
        >>> x = np.cos(0.4 * np.pi * (np.arange(100) - 49.5))  # below the new Nyquist frequency
        >>> coarse = decimation_matrix(100, 50, 2.0) @ x
        >>> bool(np.allclose(coarse[10:-10], np.cos(0.8 * np.pi * (np.arange(50) - 24.5))[10:-10], atol=1e-5))
        True
    """
    passed = 0.5 / factor  # cycles per old sample
    stopped = min(2 * passed, 1 - passed)  # above, images of the line would appear
    cutoff, half = (passed + stopped) / 2, (_ATTENUATION - 7.95) / (2.285 * 4 * np.pi * (stopped - passed))
    centers = (size - 1) / 2 + factor * (np.arange(new_size) - (new_size - 1) / 2)
    samples = np.floor(centers).astype(int)[:, None] + np.arange(-int(half), int(half) + 2)  # (new_size, taps)
    distances = samples - centers[:, None]
    shape = np.sqrt((1 - (distances / half) ** 2).clip(0))
    weights = np.sinc(2 * cutoff * distances) * np.i0(kaiser_beta(_ATTENUATION) * shape)
    weights[np.abs(distances) > half] = 0
    reflected = samples % (2 * size)
    reflected = np.minimum(reflected, 2 * size - 1 - reflected)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size)[:, None], reflected), weights)
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True))


def _factors(volume: Volume, spacing: Sequence[float]) -> list[float]:
    """Return the acquired over the stored spacing along each voxel axis, 1 where it does not change."""
    for value in spacing:
        check_range("acquired spacing", value, 1e-3, 1e3)
    grid = volume.grid
    stored = " x ".join(f"{mm:.3g}" for mm in grid.patient_spacing)
    factors = []
    for axis, size, old, new in zip(
        grid.patient_axes, grid.shape, grid.spacing.tolist(), grid.by_voxel_axis(spacing), strict=True
    ):
        factor = new / old
        if abs(factor - 1) < _EQUAL or (factor < 1 and len(spacing) == 1):
            factor = 1.0
        elif not 1 < factor <= _MAX_FACTOR or round(size / factor) < 2:
            raise SettingError(
                f"{volume.path}: an acquired spacing of {new:g} mm is given for the {_AXES[axis]} axis, which has"
                f" {size} voxels of {old:.3g} mm; {old:.3g} to {_MAX_FACTOR * old:.3g} mm and at least two voxels are"
                f" possible: correct it (the voxels have {stored} mm)."
            )
        factors.append(factor)
    if max(factors) == 1:
        raise SettingError(
            f"{volume.path}: the voxels have the acquired spacing or a larger one already, {stored} mm; give the"
            " spacing before the interpolation, or leave it out."
        )
    return factors
