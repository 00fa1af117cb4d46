from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError
from miar_monai.evaluation.ring_correlation import CorrelationScan, patch_starts, patches_within, ring_correlation


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


sides = st.integers(4, 33)
seeds = st.integers(0, 1000)


@given(sides, seeds, st.floats(0.1, 9), st.floats(-5, 5))
def test_a_patch_is_correlated_with_itself_whatever_its_contrast_and_brightness(
    side: int, seed: int, contrast: float, brightness: float
) -> None:
    patch = drawn((2, side, side), seed)
    correlation, power = ring_correlation(contrast * patch + brightness, patch)
    torch.testing.assert_close(correlation, torch.ones(2, side // 2), atol=2e-4, rtol=0)
    torch.testing.assert_close(power, torch.full((2, side // 2), contrast**2), atol=0, rtol=1e-2)


@given(sides, seeds)
def test_the_correlation_is_symmetric_lies_within_its_bounds_and_has_no_preferred_direction(
    side: int, seed: int
) -> None:
    a, b = drawn((2, side, side), seed)
    correlation, power = ring_correlation(a, b)
    assert correlation.abs().max() <= 1 + 1e-5
    swapped, inverse = ring_correlation(b, a)
    torch.testing.assert_close(swapped, correlation)
    torch.testing.assert_close(inverse, 1 / power, rtol=1e-4, atol=0)
    turned = ring_correlation(a.rot90(), b.rot90())[0]
    torch.testing.assert_close(turned, correlation, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [31, 48])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_shift_turns_the_phase_of_a_wave_by_its_frequency(side: int, shift: int) -> None:
    x = torch.arange(side).float()
    for cycles in (4, 7):
        waves = [torch.cos(2 * torch.pi * cycles * (x - by) / side).expand(side, side) for by in (0, shift)]
        correlation = ring_correlation(waves[0], waves[1])[0][cycles - 1]
        angle = torch.tensor(2 * torch.pi * cycles * shift / side)
        torch.testing.assert_close(correlation, angle.cos(), atol=0.02, rtol=0)


def test_noise_is_not_correlated() -> None:
    a, b = drawn((2, 400, 31, 31), 0)
    correlation = ring_correlation(a, b)[0]
    assert correlation.mean(dim=0).abs().max() < 0.1
    assert (correlation.std(dim=0).diff() < 0.02).all()  # more coefficients in each ring


def test_a_patch_without_detail_is_not_correlated_with_one_with_detail() -> None:
    flat, patch = torch.full((11, 11), 0.0), drawn((11, 11), 0)
    for pair, wanted in (((flat, patch), (0, 0)), ((patch, flat), (0, torch.inf)), ((flat, flat), (1, 1))):
        assert [set(x.tolist()) for x in ring_correlation(*pair)] == [{float(value)} for value in wanted]


@given(st.integers(4, 40), st.integers(0, 60))
def test_patches_overlap_by_half_and_lie_in_the_middle(side: int, more: int) -> None:
    length = side + more
    starts = patch_starts(length, side)
    assert set(torch.tensor(starts).diff().tolist()) <= {side // 2}
    before, after = starts[0], length - starts[-1] - side
    assert 0 <= after - before <= 1
    assert before + after < side // 2


@given(st.integers(40, 61), st.integers(40, 61), st.integers(9, 24))
def test_identical_slices_have_no_labelled_patch(height: int, width: int, side: int) -> None:
    hr = drawn((2, 1, height, width), 0)
    scan = CorrelationScan.of(hr, hr, side)
    assert scan.frequency.shape == (2, len(patch_starts(height, side)), len(patch_starts(width, side)))
    assert (scan.frequency == 1).all()
    assert not scan.labelled().any()


def test_the_patch_with_other_detail_is_labelled_and_no_other() -> None:
    hr = drawn((2, 1, 75, 91), 0)
    sr = hr.clone()
    side = 24
    rows, columns = (list(patch_starts(length, side)) for length in (75, 91))
    inside = slice(rows[2], rows[2] + side), slice(columns[4], columns[4] + side)
    sr[1, 0, inside[0], inside[1]] = drawn((side, side), 1)
    scan = CorrelationScan.of(sr, hr, side)
    assert scan.invented()[1, 2, 4]
    labelled = scan.labelled().nonzero().tolist()
    assert all(n == 1 and abs(i - 2) <= 1 and abs(j - 4) <= 1 for n, i, j in labelled)  # the others overlap with it


def test_missing_detail_is_labelled_but_not_invented() -> None:
    hr = drawn((1, 1, 96, 96), 0)
    blurred = Degradation().for_lr(lr := Degradation()(hr)).restore(lr, 1e-3)
    scan = CorrelationScan.of(blurred, hr)
    assert scan.labelled(0.4).all()
    assert not scan.invented(0.4).any()
    assert not scan.labelled(cutoff=0.15).any()  # the input determines low frequencies


def test_higher_cutoffs_and_thresholds_label_more() -> None:
    hr = drawn((1, 1, 96, 96), 0)
    noisy = hr + drawn(hr.shape, 1)
    shares = [CorrelationScan.of(noisy, hr, threshold=t).labelled(0.3).float().mean() for t in (0.4, 0.7, 0.9)]
    assert shares == sorted(shares)
    assert shares[0] < shares[2]
    scan = CorrelationScan.of(noisy, hr, threshold=0.7)
    shares = [scan.labelled(cutoff).float().mean() for cutoff in (0.1, 0.5, 1.0)]
    assert shares == sorted(shares)
    assert shares[0] < shares[2]


def test_the_crossing_is_interpolated_between_two_rings() -> None:
    """With noise of another power, the threshold that is crossed is the correlation itself."""
    hr = drawn((1, 1, 20, 20), 0)
    sr = hr + 0.7 * drawn(hr.shape, 1)
    correlation = torch.cat([torch.ones(1), ring_correlation(sr[0, 0], hr[0, 0])[0]])
    for threshold in (0.7, 0.8, 0.9):
        scan = CorrelationScan.of(sr, hr, side=20, threshold=threshold)
        position = 10 * scan.frequency.item()
        low = int(position)
        between = torch.lerp(correlation[low], correlation[low + 1], position - low)
        assert between == pytest.approx(threshold, abs=1e-4)
        assert (correlation[: low + 1] >= threshold).all()


def test_patches_within_a_mask() -> None:
    mask = torch.zeros(1, 1, 30, 40, dtype=torch.bool)
    mask[..., :15, :] = True
    assert patches_within(mask, 20).tolist() == [[[True, True, True], [False, False, False]]]
    assert not patches_within(mask, 20, share=0.8).any()


@pytest.mark.parametrize("side", [3, 31])
def test_patches_that_do_not_fit_are_refused(side: int) -> None:
    hr = torch.rand(1, 1, 30, 40)
    with pytest.raises(ConfigurationError, match=f"patches of {side} voxels do not fit into slices of 30 voxels"):
        CorrelationScan.of(hr, hr, side)
