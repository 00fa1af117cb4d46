from __future__ import annotations

import warnings
from math import isnan
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_slices
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miar_monai.errors import MissingWeightsError
from miar_monai.evaluation.frechet import LAYERS, FeatureMoments, alexnet_features, frechet_distance


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_moments(mean: Tensor, scale: Tensor, seed: int = 0) -> FeatureMoments:
    """Return features of exactly this mean and of a diagonal covariance with these standard deviations."""
    values = drawn((200, len(mean)), seed)
    white = torch.linalg.qr(values - values.mean(dim=0)).Q * (len(values) - 1) ** 0.5
    return FeatureMoments.of(mean + white * scale)


vectors = st.lists(st.floats(-3, 3), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))
scales = st.lists(st.floats(0, 3), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))


@given(vectors, vectors, scales, scales)
def test_the_distance_of_normal_distributions_with_common_axes_has_a_closed_form(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor
) -> None:
    first, second = with_moments(a, scale_a), with_moments(b, scale_b, seed=1)
    wanted = float((a - b).square().sum() + (scale_a - scale_b).square().sum())
    assert frechet_distance(first, second) == pytest.approx(wanted, abs=1e-5)
    assert frechet_distance(second, first) == pytest.approx(wanted, abs=1e-5)


def test_the_distance_is_that_of_monai() -> None:
    from monai.metrics.fid import get_fid_score

    a, b = drawn((300, 7), 0) @ drawn((7, 7), 1), drawn((200, 7), 2) @ drawn((7, 7), 3) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of an argument of scipy.linalg.sqrtm
        wanted = float(get_fid_score(a, b))
    assert frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b)) == pytest.approx(wanted, rel=1e-6)


def test_fewer_vectors_than_features_have_a_distance_too() -> None:
    few = FeatureMoments.of(drawn((5, 40), 0))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(few, FeatureMoments.of(drawn((5, 40), 1))) > 1
    assert isnan(frechet_distance(few, FeatureMoments.of(drawn((1, 40), 1))))


def test_a_patient_that_is_left_out_leaves_the_others() -> None:
    patients = [drawn((n, 3), n) for n in (20, 31, 12)]
    all_of_them, *moments = map(FeatureMoments.of, (torch.cat(patients), *patients))
    rest = FeatureMoments.of(torch.cat(patients[1:])).normal()
    for found, wanted in zip((all_of_them - moments[0]).normal(), rest, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.weights
@pytest.mark.usefixtures("lpips_weights")
def test_features_are_those_of_the_positions_in_the_mask() -> None:
    features = alexnet_features()
    images = torch.nn.functional.interpolate(tiny_slices(3), (160, 131))
    mask = torch.zeros_like(images, dtype=torch.bool)
    mask[1:, :, :, :70] = True
    found = features(images, mask)
    assert [x.shape[1] for x in found.values()] == [192, 256]
    assert [*found] == [*LAYERS]
    far = images.clone()
    far[0] = 0  # not in the mask
    assert all(torch.equal(x, y) for x, y in zip(features(far, mask).values(), found.values(), strict=True))
    for one, both in zip(features(images[1:2], mask[1:2]).values(), found.values(), strict=True):
        assert len(both) == 2 * len(one) > 0
        torch.testing.assert_close(both[: len(one)], one)


@pytest.mark.weights
@pytest.mark.usefixtures("lpips_weights")
def test_noise_is_further_from_the_truth_than_a_shift() -> None:
    """The distance is not that of the images: a shift by a voxel changes them more than the noise does."""
    features, hr = alexnet_features(), torch.nn.functional.interpolate(tiny_slices(4), (160, 160), mode="bicubic")
    noisy = hr + 0.02 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))
    shifted = hr.roll(1, dims=-1)
    assert (shifted - hr).square().mean() > (noisy - hr).square().mean()
    mask = torch.ones_like(hr, dtype=torch.bool)
    moments = [FeatureMoments.of(features(images, mask)["layer 2"]) for images in (hr, noisy, shifted)]
    assert frechet_distance(moments[0], moments[1]) > 2 * frechet_distance(moments[0], moments[2]) > 0


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lpips")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeightsError, match=r"^Fréchet distance is left out: its weights .*alexnet"):
        alexnet_features()
