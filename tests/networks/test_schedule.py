from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miar_monai.degradation.resampling import interpolation_matrix
from miar_monai.errors import ConfigurationError
from miar_monai.networks.schedule import ScaleSchedule

schedules = st.sets(st.integers(1, 11), min_size=1, max_size=5).map(lambda sides: ScaleSchedule(sorted(sides)))


@given(schedules)
def test_bounds_levels_and_split_agree(schedule: ScaleSchedule) -> None:
    row = torch.arange(schedule.num_tokens)
    parts = schedule.split(row, dim=0)
    assert torch.equal(torch.cat(parts), row)
    for k, (part, (first, last), side) in enumerate(zip(parts, schedule.bounds, schedule.sides, strict=True)):
        assert torch.equal(part, row[first:last])
        assert len(part) == side * side
        assert (schedule.levels()[first:last] == k).all()


@given(schedules)
def test_the_position_of_a_token_is_the_center_of_its_cell(schedule: ScaleSchedule) -> None:
    side = schedule.latent_side
    line = torch.arange(side, dtype=torch.float64)
    for p, positions in zip(schedule.sides, schedule.split(schedule.positions(), dim=0), strict=True):
        grid = positions.view(p, p, 2)
        centers = interpolation_matrix(side, p, "area") @ line
        if side % p == 0:  # otherwise cells of torch's area mode overlap
            torch.testing.assert_close(grid[:, 0, 0], centers)
        torch.testing.assert_close(grid[..., 0], grid[:, :1, 0].expand(p, p))  # rows first
        torch.testing.assert_close(grid[..., 1], grid[..., 0].mT)
        torch.testing.assert_close(grid.mean(dim=(0, 1)), torch.full((2,), (side - 1) / 2, dtype=torch.float64))


def test_positions_of_the_last_scale_are_the_latent_grid() -> None:
    last = ScaleSchedule((1, 3, 5)).split(ScaleSchedule((1, 3, 5)).positions(), dim=0)[-1]
    assert torch.equal(last, torch.cartesian_prod(*[torch.arange(5, dtype=torch.float64)] * 2))


@pytest.mark.parametrize("sides", [(), (0, 1), (2, 2), (3, 1), (-1,)])
def test_sides_that_do_not_increase_are_refused(sides: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="the sides must be positive and strictly increasing"):
        ScaleSchedule(sides)


def test_lists_and_tuples_give_equal_schedules() -> None:
    assert ScaleSchedule([1, 2, 4]) == ScaleSchedule((1, 2, 4))
    assert hash(ScaleSchedule([1, 2, 4])) == hash(ScaleSchedule((1, 2, 4)))
