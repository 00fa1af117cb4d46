"""The passes through a volume: planes, order, degradations and grids."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miar_monai.data.grid import Grid
from miar_monai.degradation import Degradation
from miar_monai.inference.acquisition import Acquisition
from miar_monai.inference.passes import Plan, plan_passes

FACTORS = st.sampled_from([1, 1, 1.5, 2, 2.5, 16 / 3, 8])
TRIPLES = st.tuples(FACTORS, FACTORS, FACTORS).filter(lambda triple: prod(triple) > 1)
SPACINGS = st.tuples(*[st.sampled_from([0.7, 1.0, 5.0])] * 3)


def in_plane(plane: tuple[int, int]) -> Degradation:
    return Degradation(sigma=0.75)


def slices(spacing: tuple[float, ...], thickness: float | None = None) -> Acquisition:
    axis = max(range(3), key=lambda i: (spacing[i], i))
    return Acquisition(axis, spacing[axis], thickness or spacing[axis])


def names(plan: Plan) -> list[list[str]]:
    return [[one.name for one in stage] for stage in plan.stages]


@given(factors=TRIPLES, spacing=SPACINGS)
def test_every_axis_becomes_finer_once_and_by_its_factor(factors: tuple, spacing: tuple) -> None:
    plan = plan_passes(factors, spacing, in_plane, slices(spacing))
    reached = np.ones(3)
    for stage in plan.stages:
        finer = [{axis: s for axis, s in zip(one.plane, one.degradation.scales, strict=True) if s > 1} for one in stage]
        assert all(one == finer[0] for one in finer)  # the passes of a stage make the same grid
        for axis, scale in finer[0].items():
            assert reached[axis] == 1
            reached[axis] = scale
    np.testing.assert_array_equal(reached, factors)
    grid = Grid((11, 9, 7), np.diag([*spacing, 1.0]))
    final, direct = plan.grids(grid)[-1], grid.resized([1 / factor for factor in factors])
    assert final.shape == direct.shape
    np.testing.assert_allclose(final.affine, direct.affine, atol=1e-9)


@given(factors=TRIPLES, spacing=SPACINGS, thickness=st.sampled_from([None, 0.5, 4.0]))
def test_axes_that_stay_are_identical_and_all_degradations_are_those_of_a_scanner(
    factors: tuple, spacing: tuple, thickness: float | None
) -> None:
    profiled = set()
    for stage in plan_passes(factors, spacing, in_plane, slices(spacing, thickness)).stages:
        for one in stage:
            shape = 12, 10
            finer = tuple(round(n * s) for n, s in zip(shape, one.degradation.scales, strict=True))
            for axis, line in zip(one.plane, one.degradation.axes(finer, shape), strict=True):
                if line.factor == 1:
                    assert torch.equal(line.matrix(), torch.eye(line.lr_size, dtype=torch.float64))
                elif line.profile == "slr":
                    profiled.add(axis)
                    known = thickness is not None and axis == slices(spacing).axis
                    assert (line.sigma, line.thickness) == (0, thickness / spacing[axis] if known else 1)
                else:
                    assert (line.sigma, line.profile, line.thickness) == (0.75, "bicubic", 1)
    assert len(profiled) <= 1  # a volume has one axis across its slices


@pytest.mark.parametrize(
    ("factors", "spacing", "planes"),
    [
        ((4, 4, 1), (0.7, 0.7, 5), [["axial"]]),
        ((1, 1, 5), (1, 1, 5), [["coronal", "sagittal"]]),
        ((5, 1, 1), (5, 1, 1), [["axial", "coronal"]]),
        ((1, 5, 1), (1, 5, 1), [["axial", "sagittal"]]),
        ((1, 2, 2), (3, 1, 1), [["sagittal"]]),
        ((2, 2, 5), (1, 1, 5), [["coronal", "sagittal"], ["axial"]]),
        ((5, 2, 2), (5, 1, 1), [["axial", "coronal"], ["sagittal"]]),
        ((2, 2, 2), (1, 1, 1), [["coronal", "sagittal"], ["axial"]]),
    ],
)
def test_planes_follow_from_the_axes(factors: tuple, spacing: tuple, planes: list[list[str]]) -> None:
    found = names(plan_passes(factors, spacing, in_plane, slices(spacing)))
    assert [sorted(stage) for stage in found] == planes


def test_the_blur_is_measured_within_the_slices_only() -> None:
    asked: list[tuple[int, int]] = []

    def measured(plane: tuple[int, int]) -> Degradation:
        asked.append(plane)
        return Degradation(sigma=0.5)

    plan_passes((1, 1, 5), (1, 1, 5), measured, slices((1, 1, 5)))
    assert asked == []
    plan_passes((5, 4, 4), (5, 1, 1), measured, slices((5, 1, 1)))
    assert asked == [(1, 2)]


def test_two_axes_of_a_series_of_thick_slices_have_their_own_degradations() -> None:
    ((one,),) = plan_passes(
        (4, 4, 1), (5, 1, 1), in_plane, slices((5, 1, 1))
    ).stages  # axial planes through sagittal slices
    rows, columns = one.degradation.axes((40, 40), (10, 10))
    assert (rows.profile, rows.sigma, columns.profile, columns.sigma) == ("slr", 0, "bicubic", 0.75)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_degraded_result_has_the_grid_of_the_input_in_any_orientation(order: tuple[int, int, int]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.diag([1.0, 1.2, 5])[:, order]
    shape = tuple(np.array([8, 9, 6])[list(order)].tolist())
    plan = plan_passes((2, 1.5, 5), (1, 1.2, 5), in_plane, slices((1, 1.2, 5)))
    grids = plan.grids(Grid(shape, affine))  # type: ignore[arg-type]
    patient = Grid((8, 9, 6), np.diag([1, 1.2, 5, 1]))
    fine = torch.rand(plan.grids(patient)[-1].shape, dtype=torch.float64)
    expected = plan.degraded(fine, plan.grids(patient))
    assert expected.shape == (8, 9, 6)
    result = plan.degraded(fine.permute(order), grids)
    torch.testing.assert_close(result, expected.permute(order))
