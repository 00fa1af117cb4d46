from __future__ import annotations

import pytest
import torch

from miar_monai.errors import SettingError
from miar_monai.inference.samples import SampleSummary


@pytest.mark.parametrize("count", [16, 19, 50])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_interval_covers_a_further_sample_with_its_probability(count: int, level: float) -> None:
    """For any number of samples; extrapolation beyond them is right for distributions without heavy tails."""
    values = torch.randn(40000, count + 1, generator=torch.Generator().manual_seed(0)).sigmoid()
    summary = SampleSummary.of(values[:, 1:], level=level)
    covered = (summary.lower <= values[:, 0]) & (values[:, 0] <= summary.upper)
    assert covered.float().mean().item() == pytest.approx(level, abs=0.02)


def test_a_factor_widens_the_interval_to_its_probability() -> None:
    generator = torch.Generator().manual_seed(1)
    samples, truth = torch.randn(20000, 16, generator=generator), 1.5 * torch.randn(20000, generator=generator)
    narrow = SampleSummary.of(samples)
    factor = narrow.required_factor(truth).quantile(0.9).item()
    assert factor > 1.2
    wide = SampleSummary.of(samples, factor=factor)
    assert ((wide.lower <= truth) & (truth <= wide.upper)).float().mean().item() == pytest.approx(0.9, abs=0.002)
    assert torch.equal(wide.mean, narrow.mean)
    assert torch.equal(wide.std, narrow.std)


def test_samples_may_lie_along_any_axis() -> None:
    samples = torch.rand(5, 2, 3)
    first, last = SampleSummary.of(samples, dim=0), SampleSummary.of(samples.movedim(0, -1), dim=-1)
    for one, other in zip(first, last, strict=True):
        torch.testing.assert_close(one, other)


def test_one_sample_has_no_interval() -> None:
    with pytest.raises(SettingError, match=r"^samples is 1"):
        SampleSummary.of(torch.rand(3, 1))
