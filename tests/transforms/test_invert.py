"""Predictions brought back to the units and axes of their input, in their own memory."""

from __future__ import annotations

from copy import deepcopy
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, Orientationd
from monai.transforms.utils import allow_missing_keys_mode

from miar_monai import transforms as T
from miar_monai.transforms.metatensor import resampled

AXES = [np.eye(3)[list(order)] * signs for order in permutations(range(3)) for signs in product([1.0, -1.0], repeat=3)]
SCALES = {"robust": T.ScaleIntensityRobustd("image"), "HU": T.ScaleIntensityHUd("image", -200, 900)}


def image(axes: np.ndarray, shape: tuple[int, ...]) -> MetaTensor:
    """Return a volume with negative intensities whose voxel axes run along some patient axes."""
    affine = np.eye(4)
    affine[:3] = np.column_stack([axes.T @ np.diag([0.7, 0.9, 2.5]), [11.0, -7.0, 3.0]])
    voxels = 500 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return MetaTensor(voxels, affine=torch.from_numpy(affine))


def prediction(lr: MetaTensor, memory: tuple[int, ...]) -> torch.Tensor:
    """Return a finer volume whose axes have some order in memory."""
    finer = lr.as_tensor().repeat_interleave(4, -3).repeat_interleave(4, -2)
    return finer.permute(0, *memory).contiguous().permute(0, *(1 + np.argsort(memory)).tolist())


@settings(deadline=None)
@given(
    st.sampled_from(AXES),
    st.tuples(*[st.integers(2, 5)] * 3),
    st.sampled_from([(1, 2, 3), (3, 1, 2), (2, 1, 3)]),  # of sagittal, axial and coronal slices
    st.sampled_from(list(SCALES)),
    st.booleans(),
)
def test_the_result_is_that_of_monai_in_the_memory_of_the_prediction(
    axes: np.ndarray, shape: tuple[int, ...], memory: tuple[int, ...], scale: str, in_inference_mode: bool
) -> None:
    chain = Compose([Orientationd("image", axcodes="RAS", labels=None), SCALES[scale]])
    lr = chain({"image": image(axes, shape)})["image"]
    with torch.inference_mode(in_inference_mode):
        sr = prediction(lr, memory)
    placed = resampled(lr, sr.clone())
    placed.applied_operations = deepcopy(lr.applied_operations)
    with allow_missing_keys_mode(chain):
        expected = chain.inverse({"image": placed})["image"]
    found = T.InvertSuperResolutiond("pred", chain)({"image": lr, "pred": sr})["pred"]
    assert torch.equal(found.as_tensor(), expected.as_tensor())
    torch.testing.assert_close(found.affine, expected.affine, rtol=0, atol=1e-12)
    assert found.applied_operations == []
    assert found.untyped_storage().data_ptr() == sr.untyped_storage().data_ptr()


@pytest.mark.parametrize("axes", [AXES[0], AXES[-1], AXES[13]])
def test_later_transforms_of_the_preprocessing_are_undone_first(axes: np.ndarray) -> None:
    chain = Compose(
        [Orientationd("image", axcodes="RAS", labels=None), SCALES["HU"], Flipd("image", 1), SCALES["robust"]]
    )
    original = image(axes, (5, 4, 3))
    lr = chain({"image": original})["image"]
    found = T.InvertSuperResolutiond("pred", chain)({"image": lr, "pred": lr.as_tensor().clone()})["pred"]
    torch.testing.assert_close(found.as_tensor(), original.as_tensor(), atol=1e-2, rtol=0)
    torch.testing.assert_close(found.affine, original.affine)


def test_whole_numbers_are_predictions_too() -> None:
    chain = Compose([SCALES["HU"]])
    lr = chain({"image": image(AXES[0], (5, 4, 3))})["image"]
    found = T.InvertSuperResolutiond("pred", chain)({"image": lr, "pred": torch.ones(1, 5, 4, 3, dtype=torch.uint8)})
    assert torch.equal(found["pred"].as_tensor(), torch.full((1, 5, 4, 3), 900.0))
