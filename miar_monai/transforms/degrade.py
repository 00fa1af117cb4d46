"""Degradation of whole volumes: thick slices and coarse pixels, as ``miar degrade`` makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miar_monai.data.volume import Volume
from miar_monai.degradation import AxisDegradation
from miar_monai.errors import SettingError, check_range

__all__ = ["degrade_volume"]


def degrade_volume(
    volume: Volume,
    factors: Sequence[float],
    profile: str = "bicubic",
    thickness: float = 1.0,
    blur: float = 1.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Volume:
    """Return a volume with larger voxels, around the same center and in the same units.

    Each axis that changes is degraded by its own `AxisDegradation`, in float64.

    Args:
        volume: the volume.
        factors: size of the new voxels over that of the old ones along each voxel axis, (3,), from 1 to 64, whole or
            not; 1 leaves an axis as it is.
        profile: point spread function of the new voxels; see `miar_monai.degradation.axis.PROFILES`.
        thickness: its width over the new spacing, for profiles other than bicubic: below 1 there are gaps.
        blur: standard deviation of a Gaussian blur in new voxels, along the axes that change.
        noise: standard deviation of white Gaussian noise, as a fraction of the range of the intensities.
        seed: of the noise.

    Raises:
        SettingError: if a factor or a setting is out of range, or no axis changes.

    Example:
        >>> from pathlib import Path
        >>> volume = Volume(np.ones((8, 8, 10), np.float32), np.eye(4), np.dtype("float32"), Path("scan.nii"))
        >>> degrade_volume(volume, (1, 1, 5), profile="gaussian", blur=0).array.shape
        (8, 8, 2)
    """
    for name, value, low, high in (("thickness", thickness, 0.01, 64), ("blur", blur, 0, 64), ("noise", noise, 0, 10)):
        check_range(name, value, low, high)
    for factor in factors:
        check_range("factor", factor, 1, 64)
    if all(factor == 1 for factor in factors):
        raise SettingError(
            f"{volume.path}: the voxels would keep their size; give a factor above 1 or a spacing above that of the"
            f" input, {' × '.join(f'{size:.4g}' for size in volume.grid.patient_spacing)} mm."
        )
    coarse, array = volume.grid.resized(factors), volume.array.astype(np.float64)
    for axis, factor in enumerate(factors):
        if factor > 1:
            sizes = array.shape[axis], coarse.shape[axis]
            matrix = AxisDegradation(*sizes, factor, profile, thickness, blur).matrix().numpy()  # (lr_size, hr_size)
            array = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    if noise > 0:
        generator = np.random.default_rng(seed)
        array = array + noise * float(np.ptp(volume.array)) * generator.standard_normal(array.shape)
    return volume._replace(array=array.astype(np.float32), affine=coarse.affine, description="")
