"""Low-resolution volumes from high-resolution ones."""

from __future__ import annotations

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from miar_monai.data.geometry import axial_axis, downscaled_affine
from miar_monai.degradation.operators import Degradation
from miar_monai.errors import ImageError
from miar_monai.transforms.metatensor import moved, name_of

__all__ = ["CentralSlices", "SimulateLowResolution"]


class CentralSlices(Transform):
    """Keep the central slices along the patient's inferior-superior axis, whatever axis of the array that is.

    The paper takes the central 40 axial slices (Section 4.1). Where one more slice could stay above or below, it is
    dropped above, so that the choice does not depend on how the volume is stored.

    Args:
        num_slices: how many slices to keep; None or 0 keeps all (a bundle's command line cannot say None).

    Example:
        >>> import torch
        >>> CentralSlices(4)(MetaTensor(torch.zeros(1, 5, 5, 7), affine=torch.eye(4))).affine[2, 3].item()
        1.0
    """

    def __init__(self, num_slices: int | None = 40) -> None:
        self.num_slices = num_slices

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """Return the central slices of a volume (C, X, Y, Z), with the affine that belongs to them.

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
                f"{name_of(image)} has {image.shape[axis + 1]} axial slices and num_slices asks for the central "
                f"{self.num_slices}: use a volume with more slices, or set num_slices lower, or to 0 for all."
            )
        start = surplus // 2 if affine[2, axis] > 0 else surplus - surplus // 2
        shift = np.eye(4)
        shift[axis, 3] = start
        return moved(image, image.as_tensor().narrow(axis + 1, start, self.num_slices), affine @ shift)


class SimulateLowResolution(Transform):
    """Degrade slices in-plane as the paper does (Section 4.1): bicubic downsampling and a Gaussian blur.

    Args:
        scale: HR voxels for each LR voxel along X and Y.
        sigma: standard deviation of the blur in voxels of the side it acts on; 0 leaves the blur out.
        blur_on: ``"lr"`` (the paper's words) or ``"hr"``.

    Example:
        >>> import torch
        >>> SimulateLowResolution()(torch.zeros(1, 32, 16, 7)).shape
        torch.Size([1, 8, 4, 7])
    """

    def __init__(self, scale: int = 4, sigma: float = 1.0, blur_on: str = "lr") -> None:
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
        scale = self.degradation.scale
        return moved(image, lr, downscaled_affine(np.asarray(image.affine), (scale, scale, 1)))
