"""The input of a run while the network runs, in as little memory as possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose

from miar_monai.data.volume import Volume
from miar_monai.transforms.invert import restored
from miar_monai.transforms.metatensor import metatensor_to_volume

__all__ = ["HeldInput"]


class HeldInput(NamedTuple):
    """A volume whose voxels are not held beside its preprocessed image if that gives them back.

    It does for integers of 16 bits: scaled in float32 and back, they are off by much less than one half. This is tried
    before the voxels are given up.

    Example:
        >>> from pathlib import Path
        >>> from monai.transforms import Compose
        >>> from miar_monai.transforms import LoadVolumed, ScaleIntensityHUd
        >>> preprocessing = Compose([LoadVolumed("image"), ScaleIntensityHUd("image")])
        >>> ct = Volume(np.array([[[-1000.0, 37]]], np.float32), np.eye(4), np.dtype("int16"), Path("ct.nii"))
        >>> held = HeldInput.of(ct, preprocessing({"image": ct})["image"], preprocessing)
        >>> held.nbytes, held.volume.array.shape, held.restored().array.tolist()
        (0, (1, 1, 2), [[[-1000.0, 37.0]]])
    """

    volume: Volume
    """The volume; its voxels are 0 if the image has them."""
    restore: Callable[[], np.ndarray] | None
    """Returns the voxels in the memory of the image, which is lost; None if the volume has them itself."""

    @classmethod
    def of(cls, volume: Volume, image: MetaTensor, transform: Compose) -> HeldInput:
        """Hold a volume.

        Args:
            volume: in float32.
            image: the volume after its preprocessing, (1, X, Y, Z).
            transform: the preprocessing, of the key ``"image"``.
        """
        is_small = volume.dtype.kind in "iu" and volume.dtype.itemsize <= 2
        if not is_small or not np.array_equal(_integers(image.clone(), transform), volume.array):
            return cls(volume, None)
        zeros = np.broadcast_to(np.float32(0), volume.array.shape)  # in the memory of one
        return cls(volume._replace(array=zeros), partial(_integers, image, transform))

    @property
    def nbytes(self) -> int:
        """The memory of the voxels, in addition to that of the image."""
        return 0 if self.restore else self.volume.array.nbytes

    def restored(self) -> Volume:
        """Return the volume with its voxels, after the last use of the image."""
        return self.volume._replace(array=self.restore()) if self.restore else self.volume


def _integers(image: MetaTensor, transform: Compose) -> np.ndarray:
    """Return the integers that an image was made of, (X, Y, Z), float32, in its memory."""
    array = metatensor_to_volume(restored(image, transform)).array
    np.rint(array, out=array)
    array += 0  # not -0.0
    return array
