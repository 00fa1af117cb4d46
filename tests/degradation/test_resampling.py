from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from miar_monai.degradation.resampling import interpolation_matrix, resample

MODES = [
    ("area", False),
    ("nearest-exact", False),
    ("bilinear", False),
    ("bilinear", True),
    ("bicubic", False),
    ("bicubic", True),
]
modes = pytest.mark.parametrize(("mode", "antialias"), MODES)
sizes = st.integers(1, 40)


@modes
@given(sizes, sizes)
def test_constants_are_preserved(mode: str, antialias: bool, in_size: int, out_size: int) -> None:
    matrix = interpolation_matrix(in_size, out_size, mode, antialias)
    assert matrix.shape == (out_size, in_size)
    torch.testing.assert_close(matrix.sum(1), torch.ones(out_size, dtype=torch.float64))


@modes
@given(sizes)
def test_the_same_size_is_the_identity(mode: str, antialias: bool, size: int) -> None:
    torch.testing.assert_close(interpolation_matrix(size, size, mode, antialias), torch.eye(size, dtype=torch.float64))


@modes
@given(sizes, sizes)
def test_the_grid_is_symmetric(mode: str, antialias: bool, in_size: int, out_size: int) -> None:
    """Cell-centered grids are symmetric, except for nearest if a center lies between two voxels."""
    assume(mode != "nearest-exact" or (in_size % 2 == 1 and out_size % 2 == 1))
    matrix = interpolation_matrix(in_size, out_size, mode, antialias)
    torch.testing.assert_close(matrix.flip(0, 1), matrix)


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@given(st.integers(2, 5), st.integers(3, 9))
def test_downsampling_keeps_a_ramp_in_place(mode: str, factor: int, size: int) -> None:
    """The center of LR voxel i lies at HR index ``factor * i + (factor - 1) / 2``, away from the replicated ends."""
    assume(size >= 7 or mode == "area")
    ramp = torch.arange(factor * size, dtype=torch.float64)
    shrunk = interpolation_matrix(factor * size, size, mode, antialias=mode != "area") @ ramp
    expected = factor * torch.arange(size) + (factor - 1) / 2
    inner = slice(None) if mode == "area" else slice(size // 2, size // 2 + 1)
    torch.testing.assert_close(shrunk[inner], expected.double()[inner])


@modes
def test_resampling_by_matrices_agrees_with_torch(mode: str, antialias: bool) -> None:
    images = torch.rand(2, 3, 37, 31, dtype=torch.float64)
    options = {} if mode in ("area", "nearest-exact") else {"align_corners": False, "antialias": antialias}
    for height, width in ((9, 8), (80, 62), (37, 10)):
        matrices = (interpolation_matrix(i, o, mode, antialias) for i, o in ((37, height), (31, width)))
        expected = F.interpolate(images, size=(height, width), mode=mode, **options)
        torch.testing.assert_close(resample(images, *matrices), expected)


def test_resample_and_its_transpose_are_adjoint() -> None:
    rows, columns = interpolation_matrix(37, 9, "bicubic", True), interpolation_matrix(31, 8, "bicubic", True)
    x, y = torch.rand(1, 1, 37, 31, dtype=torch.float64), torch.rand(1, 1, 9, 8, dtype=torch.float64)
    torch.testing.assert_close((resample(x, rows, columns) * y).sum(), (x * resample(y, rows.mT, columns.mT)).sum())
