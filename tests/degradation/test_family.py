from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miar_monai.degradation import (
    AxisDegradation,
    AxisOperator,
    Degradation,
    Member,
    OperatorFamily,
    in_plane_degradations,
    through_plane_degradations,
)

DEGRADATIONS = [
    Degradation(),
    Degradation((1, 5), 0.0, profile=("bicubic", "gaussian")),
    Degradation(2.5, 0.5),
    Degradation((3, 1), 0.0, profile=("slr", "bicubic"), thickness=(0.8, 1.0)),
]


@pytest.fixture
def family() -> OperatorFamily:
    return OperatorFamily([Member(DEGRADATIONS[:1], 1), Member(DEGRADATIONS[1:], 3)], 60)


def images(count: int = len(DEGRADATIONS)) -> Tensor:
    return torch.rand(count, 1, 60, 60, generator=torch.Generator().manual_seed(0))


def test_a_padded_operator_computes_what_the_operator_itself_does(family: OperatorFamily) -> None:
    hr = images()
    operator = family.select(torch.arange(len(hr)))
    lr, maps = operator.A(hr), torch.rand_like(hr)
    noise, linear, corrected = operator.noise_level(lr), operator.restore(lr, 1e-2), operator.prox(maps, lr, 1e-2)
    for i, degradation in enumerate(DEGRADATIONS):
        alone = degradation.for_hr(hr[i])
        height, width = alone.lr_shape
        expected = alone.A(hr[i])
        torch.testing.assert_close(lr[i, :, :height, :width], expected)
        assert lr[i, :, height:].count_nonzero() == lr[i, :, :, width:].count_nonzero() == 0
        torch.testing.assert_close(noise[i, 0], alone.noise_level(expected)[0])
        torch.testing.assert_close(linear[i], alone.restore(expected, 1e-2))
        torch.testing.assert_close(corrected[i], alone.prox(maps[i], expected, 1e-2))
        assert operator.rows.factor[i].item() == pytest.approx(60 / height)
        torch.testing.assert_close(operator.columns.effective_factor[i, 0], alone.columns.effective_factor)


def test_degradations_are_drawn_by_the_shares_of_their_groups(family: OperatorFamily) -> None:
    torch.manual_seed(0)
    factors = family.select(family.sample(4000)).columns.factor.flatten().round(decimals=3)
    shares = {float(factor): float((factors == factor).float().mean()) for factor in factors.unique()}
    assert shares == pytest.approx({1.0: 0.25, 2.5: 0.25, 4.0: 0.25, 5.0: 0.25}, abs=0.03)


def test_degradations_are_mistaken_for_similar_ones_only() -> None:
    torch.manual_seed(0)
    members = [
        Degradation(2, 0.0),
        Degradation(2, 0.5),
        Degradation(2, 1.0),
        Degradation((1, 5), 0.0, profile=("bicubic", "slr")),
        Degradation((1, 5), 0.0, profile=("bicubic", "box"), thickness=(1.0, 0.8)),
        Degradation((5, 1), 0.0, profile=("slr", "bicubic")),
    ]
    family = OperatorFamily([Member(members, 1)], 60)
    index = torch.arange(len(members)).repeat(2000)
    drawn = [set(column.tolist()) for column in family.mistaken(index, 1.0).view(-1, len(members)).unbind(dim=1)]
    assert drawn == [{1}, {0, 2}, {1}, {4}, {3}, {5}]
    assert torch.equal(family.mistaken(index, 0.0), index)
    assert (family.mistaken(index, 0.25) != index).float().mean().item() == pytest.approx(0.25 * 5 / 6, abs=0.02)


def test_noise_leaves_the_padding_at_zero(family: OperatorFamily) -> None:
    operator = family.select(torch.arange(len(DEGRADATIONS)))
    std = torch.full((len(DEGRADATIONS), 1, 1, 1), 0.1)
    noise = family.noisy(torch.zeros_like(operator.A(images())), operator, std)
    for one, degradation in zip(noise, DEGRADATIONS, strict=True):
        height, width = degradation.for_hr(images()).lr_shape
        assert one[:, :height, :width].std().item() == pytest.approx(0.1, rel=0.1)
        assert one.count_nonzero() == height * width


def test_a_side_that_is_no_multiple_of_a_factor_is_covered_at_its_center() -> None:
    family = OperatorFamily([Member(through_plane_degradations([5]), 1)], 64)
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    operator = family.select(torch.tensor([0]))
    lr = operator.A(ramp)[0, 0, 0]
    assert lr[:13].mean().item() == pytest.approx(31.5)
    assert lr[13:].count_nonzero() == 0


def test_through_plane_degradations_leave_out_slices_thinner_than_a_voxel() -> None:
    kinds = through_plane_degradations([1.25, 4], ["gaussian", "slr"], [0.6, 1.0])
    assert {(kind.scales, kind.profiles) for kind in kinds} == {
        ((1, 1.25), ("bicubic", "gaussian")),
        ((1.25, 1), ("gaussian", "bicubic")),
        ((1, 1.25), ("bicubic", "slr")),
        ((1.25, 1), ("slr", "bicubic")),
        ((1, 4), ("bicubic", "gaussian")),
        ((4, 1), ("gaussian", "bicubic")),
        ((1, 4), ("bicubic", "slr")),
        ((4, 1), ("slr", "bicubic")),
    }
    assert len(kinds) == 12  # two thicknesses at a factor of 4
    assert all(kind.lr_sigma == 0 for kind in kinds)


def test_in_plane_degradations_blur_no_axis_that_stays() -> None:
    kinds = in_plane_degradations([2], [1.0], pairs=[(1, 3)])
    assert [kind.sigma for kind in kinds] == [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]


@pytest.mark.parametrize("profile", ["box", "slr", "gaussian"])
@pytest.mark.parametrize("factor", [4.0, 2.5])
def test_singular_vectors_are_in_the_order_of_their_frequency(profile: str, factor: float) -> None:
    """Those of a box, whose singular values are all equal, are arbitrary as LAPACK returns them."""
    axis = AxisDegradation(80, round(80 / factor), factor, profile)
    operator = AxisOperator.of(axis)
    frequency = operator.frequency * operator.factor
    assert (frequency.diff() >= 0).all()
    assert frequency[0] < 0.05
    assert frequency[-1] > 0.9
    torch.testing.assert_close(operator.u @ operator.s.diag() @ operator.vt, axis.matrix())
    torch.testing.assert_close(operator.u.mT @ operator.u, torch.eye(len(operator.s), dtype=torch.float64))


@pytest.mark.parametrize("degradation", DEGRADATIONS, ids=str)
def test_the_noise_of_any_grid_is_estimated(degradation: Degradation) -> None:
    """Within a head of smooth tissue, on a background without noise as around a segmented brain."""
    line = torch.linspace(-1.2, 1.2, 120)
    radius = torch.hypot(line[:, None], line)
    hr = torch.where(radius < 1, 0.6 + 0.2 * torch.cos(3 * radius), 0.0)[None, None]
    operator = degradation.for_hr(hr)
    lr = operator.A(hr)
    tissue = operator.A((radius < 1).float()) > 0.05
    noise = 0.02 * torch.randn(lr.shape, generator=torch.Generator().manual_seed(1)) * tissue
    assert operator.noise_level(lr + noise).item() == pytest.approx(0.02, rel=0.25)
    assert operator.noise_level(lr).item() < 0.01
