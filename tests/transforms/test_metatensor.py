from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.affines import upscaled_affine
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch

from miar_monai.data.geometry import fov_corners
from miar_monai.data.volume import Volume
from miar_monai.transforms.metatensor import metatensor_to_volume, resampled, volume_to_metatensor
from tests.data.test_geometry import affines

QFORM = np.array([[1.0, 0, 0, 3], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


def volume(qform: tuple[np.ndarray, int] | None = None) -> Volume:
    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    affine = np.array([[0.0, 2, 0, -7], [-2, 0, 0.3, 5], [0, 0, 3, 1 / 3], [0, 0, 0, 1]])
    return Volume(array, affine, np.dtype(np.int16), Path("in/a.nii.gz"), space=4, description="Größe", qform=qform)


def assert_same(a: Volume, b: Volume) -> None:
    for name, value, other in zip(a._fields, a, b, strict=True):
        if name == "qform":
            (to_qform, code), (expected, expected_code) = value, other
            np.testing.assert_array_equal(to_qform, expected)
            assert code == expected_code
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other)
            assert value.dtype == other.dtype
        else:
            assert value == other, name


@pytest.mark.parametrize("batched", [False, True])
def test_a_volume_survives_the_round_trip(batched: bool) -> None:
    original = volume(qform=(QFORM, 1))
    image = volume_to_metatensor(original)
    if batched:
        (image,) = decollate_batch(next(iter(DataLoader(Dataset([image]), batch_size=1))))
    assert_same(metatensor_to_volume(image), original)


def test_without_a_qform_the_sform_replaces_it() -> None:
    original = volume()
    assert_same(metatensor_to_volume(volume_to_metatensor(original)), original._replace(qform=(np.eye(4), 4)))


def test_a_tensor_without_metadata_gets_the_defaults_of_a_volume() -> None:
    result = metatensor_to_volume(MetaTensor(torch.ones(1, 3, 2, 1, dtype=torch.float64)))
    assert (result.dtype, result.array.dtype, result.array.shape) == (np.float32, np.float32, (3, 2, 1))
    assert (result.space, result.description, result.qform, result.path) == (1, "", None, Path("the volume"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(affines(), st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 3))
def test_the_field_of_view_stays(affine: np.ndarray, shape: tuple[int, ...], factors: tuple[int, ...]) -> None:
    coarse = MetaTensor(torch.zeros(1, *shape), affine=torch.from_numpy(affine), meta={"filename_or_obj": "a.nii"})
    fine = resampled(coarse, torch.zeros(2, *np.multiply(shape, factors)))
    assert fine.meta["filename_or_obj"] == "a.nii"
    np.testing.assert_allclose(fine.affine.numpy(), upscaled_affine(affine, factors), atol=1e-9)
    np.testing.assert_allclose(fov_corners(fine.affine.numpy(), fine.shape[1:]), fov_corners(affine, shape), atol=1e-9)
    np.testing.assert_allclose(resampled(fine, torch.zeros(1, *shape)).affine.numpy(), affine, atol=1e-9)
