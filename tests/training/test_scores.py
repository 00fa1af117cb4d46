from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miar_monai.errors import SettingError
from miar_monai.training.scores import PosteriorScore, fair_energy_score


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def crps(mean: float, std: float, count: int = 2**17) -> float:
    """Return the score of Gaussian samples where the truth is a standard normal number."""
    samples = mean + std * drawn((count, 2), seed=0)
    return fair_energy_score(samples - drawn((count, 1), seed=1)).item()


def test_the_score_of_gaussian_samples_is_the_known_one() -> None:
    """The expected distance of normal numbers a and b is the root of 2 / π times that of the sum of variances."""
    for std in (0.5, 1.0, 2.0):
        expected = (2 / torch.pi) ** 0.5 * ((1 + std**2) ** 0.5 - (2 * std**2) ** 0.5 / 2)
        assert crps(0.0, std) == pytest.approx(expected, abs=0.01)


@settings(deadline=None, max_examples=20)
@given(
    mean=st.floats(-2, 2),
    log_std=st.floats(-1.5, 1.5),
)
def test_no_other_gaussian_scores_better_than_the_truth(mean: float, log_std: float) -> None:
    assert crps(mean, 2**log_std) > crps(0.0, 1.0) - 0.003
    if abs(mean) > 0.5 or abs(log_std) > 0.5:
        assert crps(mean, 2**log_std) > crps(0.0, 1.0) + 0.005


@pytest.mark.parametrize("dim", [None, 2])
def test_a_sampler_that_minimizes_the_score_has_the_true_mean_and_spread(dim: int | None) -> None:
    mean, log_std = (torch.zeros((), requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([mean, log_std], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 500)
        truth = 0.7 + 0.3 * torch.randn(2000, 1, 4, generator=generator)
        samples = mean + log_std.exp() * torch.randn(2000, 2, 4, generator=generator)
        optimizer.zero_grad()
        fair_energy_score(samples - truth, dim).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(0.7, abs=0.02)
    assert log_std.exp().item() == pytest.approx(0.3, abs=0.02)


def test_the_distance_of_vectors_is_euclidean() -> None:
    errors = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    assert fair_energy_score(errors, dim=2).item() == pytest.approx(0.0, abs=1e-3)  # (5 + 0 - 5) / 2
    errors = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])
    assert fair_energy_score(errors, dim=2).item() == pytest.approx(5.0, abs=1e-3)


def test_equal_samples_have_finite_gradients() -> None:
    errors = torch.zeros(1, 2, 3, requires_grad=True)
    fair_energy_score(errors, dim=2).backward()
    assert errors.grad is not None
    assert errors.grad.isfinite().all()


def smooth(noise: Tensor, strength: float) -> Tensor:
    """Correlate neighboring voxels and keep the variance of each."""
    neighbors = noise.roll(1, dims=-1)
    return (noise + strength * neighbors) / (1 + strength**2) ** 0.5


def test_patches_see_how_voxels_depend_on_each_other() -> None:
    """The truth has correlated voxels; samples with the right variance of each voxel are told apart by patches only."""
    score = PosteriorScore(features=0.0, num_filters=64)
    truth = smooth(drawn((24, 1, 32, 32), seed=0), 1.0)
    found: dict[str, list[float]] = {}
    for strength in (-1.0, 0.0, 1.0):
        torch.manual_seed(1)  # the same filters
        for name, value in score(smooth(drawn((24, 2, 32, 32), seed=2), strength), truth).items():
            found.setdefault(name, []).append(value.item())
    assert found["voxel_score"][2] == pytest.approx(found["voxel_score"][0], rel=0.02)
    assert found["patch_score"][0] > 1.005 * found["patch_score"][1] > 1.005**2 * found["patch_score"][2]


@pytest.mark.weights
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_features_see_samples_that_are_too_smooth(weights_home: Path) -> None:
    if not (weights_home / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").is_file():
        pytest.skip(f"no weights of LPIPS in {weights_home}")
    score, generator = PosteriorScore(voxels=0.0, patches=0.0, features=1.0), torch.Generator().manual_seed(0)
    texture = 0.5 + 0.2 * torch.randn(4, 3, 96, 96, generator=generator)
    samples, truth = texture[:, :2], texture[:, 2:]
    smoothed = torch.nn.functional.avg_pool2d(samples, 5, stride=1, padding=2, count_include_pad=False)
    assert score(smoothed, truth)["feature_score"] > 1.2 * score(samples, truth)["feature_score"]
    samples.requires_grad_()
    score(samples, truth)["feature_score"].backward()
    assert samples.grad is not None
    assert samples.grad.isfinite().all()


def test_weights_scale_the_parts() -> None:
    samples, truth = drawn((1, 2, 32, 32), seed=0), drawn((1, 1, 32, 32), seed=1)
    single, double = PosteriorScore(features=0.0), PosteriorScore(voxels=2.0, patches=0.0, features=0.0)
    assert (2 * single(samples, truth)["voxel_score"]).item() == double(samples, truth)["voxel_score"].item()
    assert "patch_score" not in double(samples, truth)


@pytest.mark.parametrize("name", ["voxels", "patches", "features", "num_filters", "filter_side"])
def test_weights_must_not_be_negative(name: str) -> None:
    with pytest.raises(SettingError, match=rf"^{name} is -1"):
        PosteriorScore(**{"features": 0.0, name: -1})  # type: ignore[arg-type]
