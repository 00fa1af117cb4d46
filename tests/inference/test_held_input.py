from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.transforms import Compose, Orientationd, ScaleIntensityRanged

from miar_monai.data.volume import Volume
from miar_monai.inference.held_input import HeldInput
from miar_monai.transforms import LoadVolumed, ScaleIntensityHUd, ScaleIntensityRobustd

SCALES = {
    "brain": ScaleIntensityRobustd("image"),
    "chest": ScaleIntensityHUd("image"),
    "clipped": ScaleIntensityRanged("image", 9, 50, 0, 1, clip=True),
}
AXES = (np.diag([-1.0, -1, 4, 1]), np.eye(4)[[2, 0, 1, 3]], np.diag([1.0, -2, -1, 1])[[1, 2, 0, 3]])


def preprocessing(scale: str) -> Compose:
    return Compose([LoadVolumed("image"), Orientationd("image", axcodes="RAS", labels=None), SCALES[scale]])


@given(
    array=arrays(np.float32, (5, 3, 4), elements=st.integers(-40_000, 70_000)),
    dtype=st.sampled_from(["uint8", "int16", "uint16"]),
    scale=st.sampled_from(["brain", "chest"]),
    affine=st.sampled_from(AXES),
)
def test_integers_are_given_back_by_the_image(array: np.ndarray, dtype: str, scale: str, affine: np.ndarray) -> None:
    limits = np.iinfo(dtype)
    array = np.asfortranarray(array.clip(limits.min, limits.max))
    assume(array.min() < array.max())
    volume, transform = Volume(array, affine, np.dtype(dtype), Path("a.nii")), preprocessing(scale)
    image = transform({"image": volume})["image"]
    held = HeldInput.of(volume, image, transform)
    assert (held.nbytes, held.volume.array.shape, held.volume.array.any()) == (0, array.shape, False)
    again = held.restored()
    assert np.may_share_memory(again.array, image.numpy())
    np.testing.assert_array_equal(again.array, array, strict=True)
    assert not np.signbit(again.array[again.array == 0]).any()
    assert again._replace(array=array) == volume


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_other_numbers_are_held(dtype: str) -> None:
    array = np.random.default_rng(0).integers(-(10**6), 10**6, (5, 3, 4)).astype(np.float32) / 3
    volume, transform = Volume(array, np.eye(4), np.dtype(dtype), Path("a.nii")), preprocessing("brain")
    held = HeldInput.of(volume, transform({"image": volume})["image"], transform)
    assert held.nbytes == array.nbytes
    assert held.restored() is volume


@pytest.mark.parametrize("is_whole", [True, False])
def test_voxels_that_the_image_does_not_give_back_are_held(is_whole: bool) -> None:
    """Clipped intensities are lost, and so are the fractions of a volume that is to be rounded when it is written."""
    array = np.arange(60, dtype=np.float32).reshape(5, 3, 4) + (0 if is_whole else 0.25)
    volume = Volume(array, np.eye(4), np.dtype("int16"), Path("a.nii"))
    transform = preprocessing("clipped" if is_whole else "chest")
    assert HeldInput.of(volume, transform({"image": volume})["image"], transform).restored() is volume
