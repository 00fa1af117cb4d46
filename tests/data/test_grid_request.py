"""What users ask for: values of axes, one of three settings, limits, and the rounding of headers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miar_monai.data.grid import Grid
from miar_monai.data.grid_request import GridRequest, axis_values
from miar_monai.errors import SettingError

THICK = Grid((20, 24, 6), np.diag([0.9, 1.0, 5, 1]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (2, (2.0,)),
        ("2", (2.0,)),
        (np.float32(2.5), (2.5,)),
        ("1,1,5", (1.0, 1.0, 5.0)),
        ([1, 1, 5], (1.0, 1.0, 5.0)),
        ((1, "1", 5.5), (1.0, 1.0, 5.5)),
    ],
)
def test_axes_have_one_value_or_three(value: Any, expected: tuple[float, ...] | None) -> None:
    assert axis_values("factor", value) == expected


@pytest.mark.parametrize(
    "value", ["", "1,2", "1,1,x", "nan", -1, 0, float("inf"), True, [1, 2], [], {"a": 1}, [[1], 1, 1], "$1", "1,1,1,1"]
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(
        SettingError, match=r"^spacing .* must be one positive number, or three with commas, such as 1,1"
    ):
        axis_values("spacing", value)


@given(factors=st.tuples(*[st.floats(1, 8)] * 3).filter(lambda triple: max(triple) > 1.001))
def test_a_factor_and_the_spacing_that_it_gives_are_the_same_request(factors: tuple[float, float, float]) -> None:
    by_factor = GridRequest.of(factor=factors).factors(THICK)
    spacing = [mm / factor for mm, factor in zip(THICK.patient_spacing, factors, strict=True)]
    np.testing.assert_allclose(by_factor, factors, rtol=2e-5)
    np.testing.assert_allclose(GridRequest.of(spacing=spacing).factors(THICK), factors, rtol=2e-5)


def test_axes_are_those_of_the_patient_and_isotropic_is_the_smallest_spacing() -> None:
    sagittal = Grid((20, 24, 6), np.array([[0.0, 0, 5, 0], [0.9, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
    np.testing.assert_allclose(GridRequest.of(isotropic=True).factors(sagittal), (5 / 0.9, 1, 1 / 0.9))
    assert GridRequest.of(spacing=(2.5, 0.9, 1)).factors(sagittal) == (2, 1, 1)
    assert GridRequest.of().factors(sagittal) == (4, 4, 1)
    assert GridRequest.of().factors(sagittal, (2, 2, 1)) == (2, 2, 1)


def test_the_rounding_of_headers_makes_no_broken_factors() -> None:
    rounded = Grid((20, 24, 6), np.diag([0.99999994, 1.0, 5.000001, 1]))
    assert GridRequest.of(spacing=1).factors(rounded) == (1, 1, 5)
    assert GridRequest.of(isotropic=True).factors(rounded) == (1, 1, 5)


def test_only_one_setting_is_possible_and_none_is_the_default() -> None:
    assert GridRequest.of().is_default
    assert not GridRequest.of(isotropic=True).is_default
    with pytest.raises(SettingError, match=r"^factor, spacing and isotropic are given, .*; leave two out"):
        GridRequest.of(2, 1, True)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"spacing": (1, 1, 5)}, "the left-right axis has voxels 0.9 mm apart, but 1 mm is asked for: only finer"),
        (
            {"spacing": (0.9, 0.1, 5)},
            "the posterior-anterior axis would become 10 times finer, from 1 to 0.1 mm, but at",
        ),
        ({"factor": 1}, "the voxels would keep their size, 0.9 x 1 x 5 mm; ask for a factor above 1"),
    ],
)
def test_impossible_grids_are_one_sentence(request_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=f"^{sentence}"):
        GridRequest.of(**request_).factors(THICK)


def test_results_have_a_largest_size() -> None:
    with pytest.raises(
        SettingError,
        match=r"^the result would have 3\.4e\+10 voxels, in at least 128\.0 GiB of memory, but at most 8\.6e\+09 ",
    ):
        GridRequest.of(factor=8).factors(Grid((512, 512, 256), np.eye(4)))
