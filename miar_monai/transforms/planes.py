"""The choice of planes for the slices of a volume."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import Transform
from monai.utils import convert_to_tensor

from miar_monai.data.spectrum import detailed_planes
from miar_monai.transforms.metatensor import grid_of

__all__ = ["DetailedPlanesd"]


class DetailedPlanesd(Transform):
    """Add the planes of a volume that have detail, see `miar_monai.data.spectrum.detailed_planes`.

    `miar_monai.data.slices.SliceDataset` then yields the slices of these planes. Planes that an item has already stay.

    Args:
        key: of the volume, a `monai.data.MetaTensor` (1, X, Y, Z) in RAS orientation.
        planes_key: of the planes.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> noise = MetaTensor(1 + torch.rand(1, 40, 40, 40), affine=torch.eye(4))
        >>> DetailedPlanesd("image")({"image": noise})["planes"]
        ('axial', 'sagittal', 'coronal')
    """

    def __init__(self, key: str = "image", planes_key: str = "planes") -> None:
        self.key = key
        self.planes_key = planes_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the planes."""
        if self.planes_key in data:
            return dict(data)
        image = data[self.key]
        array = convert_to_tensor(image, track_meta=False)[0].numpy()
        return {**data, self.planes_key: detailed_planes(array, grid_of(image).spacing.tolist())}
