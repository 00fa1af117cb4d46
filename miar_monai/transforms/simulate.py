"""Simulation of low-resolution volumes."""

from __future__ import annotations

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from miar_monai.data.geometry import axial_axis
from miar_monai.data.grid import Grid
from miar_monai.degradation import Degradation
from miar_monai.errors import ImageError
from miar_monai.transforms.metatensor import image_name, with_affine

__all__ = ["CentralSlices", "SimulateLowResolution"]


class CentralSlices(Transform):
    """Keep the central slices along the inferior-superior axis of the patient, for any orientation of the array.

    The paper uses the central 40 axial slices (Section 4.1). If the number of slices to drop is odd, one more is
    dropped above, so that the choice does not depend on the orientation of the array.

    Args:
        num_slices: number of slices to keep; None or 0 keeps all (the command line of a bundle has no None).

    Example:
        >>> import torch
        >>> CentralSlices(4)(MetaTensor(torch.zeros(1, 5, 5, 7), affine=torch.eye(4))).affine[2, 3].item()
        1.0
    """

    def __init__(self, num_slices: int | None = 40) -> None:
        self.num_slices = num_slices

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """Return the central slices of a volume (C, X, Y, Z), with their affine.

        Raises:
            ImageError: if the volume has fewer slices.
        """
        if not self.num_slices:
            return image
        affine = np.asarray(image.affine, dtype=np.float64)
        axis = axial_axis(affine)
        surplus = image.shape[axis + 1] - self.num_slices
        if surplus < 0:
            raise ImageError(
                f"{image_name(image)} has {image.shape[axis + 1]} axial slices, but num_slices is {self.num_slices}: "
                "use a volume with more slices, or set num_slices lower, or to 0 for all."
            )
        start = surplus // 2 if affine[2, axis] > 0 else surplus - surplus // 2
        shift = np.eye(4)
        shift[axis, 3] = start
        return with_affine(image, image.as_tensor().narrow(axis + 1, start, self.num_slices), affine @ shift)


class SimulateLowResolution(Transform):
    """Degrade slices in-plane as the paper does (Section 4.1): bicubic downsampling and a Gaussian blur.

    Args:
        scale: HR voxels for each LR voxel along X and Y.
        sigma: standard deviation of the blur, in voxels of the image that ``blur_on`` selects; 0 for no blur.
        blur_on: ``"lr"`` (as in the paper) or ``"hr"``.

    Example:
        >>> import torch
        >>> SimulateLowResolution()(torch.zeros(1, 32, 16, 7)).shape
        torch.Size([1, 8, 4, 7])
    """

    def __init__(self, scale: float = 4, sigma: float = 1.0, blur_on: str = "lr") -> None:
        self.degradation = Degradation(scale, sigma, blur_on)

    def __call__(self, image: Tensor) -> Tensor:
        """Return the LR version of a slice (C, X, Y) or a volume (C, X, Y, Z); for a `MetaTensor` with its affine.

        Raises:
            ConfigurationError: if X or Y is not a multiple of the scale.
        """
        voxels = convert_to_tensor(image, track_meta=False)
        slices = voxels.movedim(-1, 1) if voxels.ndim == 4 else voxels
        lr = self.degradation(slices)
        lr = lr.movedim(1, -1).contiguous() if voxels.ndim == 4 else lr
        if not isinstance(image, MetaTensor):
            return lr
        width, height, depth = [*image.shape[1:], 1][:3]
        grid = Grid((width, height, depth), np.asarray(image.affine))
        return with_affine(image, lr, grid.resized((*self.degradation.scales, 1)).affine)
