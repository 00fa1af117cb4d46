"""Another contrast of the same patient, brought to the grid of an image by the affines."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy.ndimage import affine_transform, gaussian_filter, spline_filter

from miar_monai.data.grid import Grid
from miar_monai.data.volume import Volume
from miar_monai.transforms.intensity import ScaleIntensityRobust
from miar_monai.transforms.metatensor import grid_of, volume_to_metatensor, with_affine

__all__ = ["ResampleGuided", "in_field_of_view", "prepare_guide", "resample_guide"]

_SAME_GRID = 1e-3  # voxels, to which headers may be rounded
_EDGE = 1e-6  # voxels


def prepare_guide(guide: Volume, grid: Grid) -> MetaTensor:
    """Return a guide as the networks need it: scaled, and on the grid of an image.

    Args:
        guide: another contrast of the same patient, in any units, orientation and resolution.
        grid: of the image or the result.

    Returns:
        The guide, (1, X, Y, Z), float32: its background is 0 and the 99.5th percentile of the voxels above it is 1 (see
        `ScaleIntensityRobust`); 0 outside of its field of view.

    Raises:
        ImageError: if the guide is constant.

    Example:
        >>> from pathlib import Path
        >>> array = np.random.default_rng(0).uniform(100, 900, (30, 30, 30)).astype(np.float32)
        >>> guide = Volume(array, np.diag([2.0, 2, 2, 1]), np.dtype("int16"), Path("t1.nii"))
        >>> prepare_guide(guide, Grid((60, 60, 12), np.diag([1.0, 1, 5, 1]))).shape
        torch.Size([1, 60, 60, 12])
    """
    return resample_guide(ScaleIntensityRobust()(volume_to_metatensor(guide)), grid)


def resample_guide(guide: MetaTensor, grid: Grid) -> MetaTensor:
    """Return a volume on another grid in the same millimeters, by cubic splines; 0 outside of its field of view.

    Along the axes where its voxels are smaller than those of the grid, it is first blurred by a Gaussian with a
    standard deviation of half the difference, in its voxels, against aliasing. Values stay within those of the volume.

    Args:
        guide: (1, X, Y, Z), with the affine of its voxels.
        grid: on which it is sampled; both may be oblique.

    Returns:
        (1, X', Y', Z'), float32, a copy without interpolation if the grids are the same.

    Example:
        >>> guide = MetaTensor(torch.arange(4.0).reshape(1, 4, 1, 1), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
        >>> resample_guide(guide, Grid((3, 1, 1), np.diag([2.0, 2, 2, 1]) + np.eye(4, k=3) * 2)).flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    array = guide.as_tensor()[0].cpu().float().numpy()
    transform = _voxels_to_voxels(grid, grid_of(guide))
    if array.shape == grid.shape and np.all(abs(transform - np.eye(4)) @ [*grid.shape, 1] < _SAME_GRID):
        return with_affine(guide, guide.as_tensor().cpu().float().clone(), grid.affine)
    # the size of the new voxels along the axes of the guide, in its voxels
    sizes = np.linalg.norm(transform[:3, :3], axis=1)
    low, high = float(array.min()), float(array.max())
    # SpatialResample of MONAI would hold the coordinates of all voxels, six times the memory of the result
    sigma = np.minimum(np.maximum(sizes - 1, 0) / 2, array.shape)  # beyond its size, a volume is its mean
    smooth = gaussian_filter(array, sigma, mode="mirror") if sigma.any() else array
    coefficients = spline_filter(smooth, order=3, output=np.float32, mode="mirror")
    result = affine_transform(
        coefficients, transform[:3, :3], transform[:3, 3], output_shape=grid.shape, mode="mirror", prefilter=False
    )
    np.clip(result, low, high, out=result)  # splines overshoot at edges
    result[~in_field_of_view(grid, grid_of(guide))] = 0
    return with_affine(guide, torch.from_numpy(result)[None], grid.affine)


def in_field_of_view(grid: Grid, other: Grid) -> np.ndarray:
    """Return which voxels of a grid have their center in the field of view of another grid, (X, Y, Z), bool.

    Example:
        >>> in_field_of_view(Grid((4, 1, 1), np.eye(4)), Grid((1, 1, 1), np.diag([3.0, 1, 1, 1]))).ravel().tolist()
        [True, True, False, False]
    """
    transform = _voxels_to_voxels(grid, other)
    y, z = np.ogrid[: grid.shape[1], : grid.shape[2]]
    inside = np.ones(grid.shape, bool)
    for (along_x, along_y, along_z, start), size in zip(transform[:3], other.shape, strict=True):
        plane = along_y * y + along_z * z + start
        for x in range(grid.shape[0]):
            inside[x] &= abs(plane + along_x * x - (size - 1) / 2) <= size / 2 + _EDGE
    return inside


def _voxels_to_voxels(grid: Grid, other: Grid) -> np.ndarray:
    """Return the map of the voxel indices of a grid to those of another, (4, 4)."""
    return np.asarray(np.linalg.solve(other.affine, grid.affine))


class ResampleGuided(MapTransform):
    """Bring guides to the grid of an image by the affines, see `resample_guide`.

    Args:
        keys: of the guides, (1, X, Y, Z); missing ones are ignored.
        reference_key: of the image.

    Example:
        >>> image, guide = (MetaTensor(torch.rand(1, 9, 9, n), affine=torch.eye(4)) for n in (5, 7))
        >>> ResampleGuided("guide")({"image": image, "guide": guide})["guide"].shape
        torch.Size([1, 9, 9, 5])
    """

    def __init__(self, keys: KeysCollection = "guide", reference_key: str = "image") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.reference_key = reference_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the guides on the grid of the image."""
        grid = grid_of(data[self.reference_key])
        return {**data, **{key: resample_guide(data[key], grid) for key in self.key_iterator(data)}}
