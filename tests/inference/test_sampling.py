"""Posterior samples of volumes: grids, planes, seeds and maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.phantoms import head
from helpers.tiny import started, tiny_miar
from monai.data import MetaTensor
from torch import Tensor

from miar_monai.data.volume import SAMPLE_MAPS as MAPS
from miar_monai.data.volume import sample_maps
from miar_monai.degradation import Degradation
from miar_monai.errors import SettingError
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.inference.samples import SampleSummary, Sampling
from miar_monai.inference.volume_inferer import VolumeInferer
from miar_monai.networks import Estimator
from miar_monai.networks.linear import NoiseModel
from miar_monai.transforms.intensity_range import IntensityRange

REQUESTS: dict[str, dict[str, Any]] = {
    "axial": {},
    "thick slices": {"factor": (1, 1, 3)},
    "all axes": {"factor": (2, 2, 2.5)},
}


def sampler(**options: Any) -> Estimator:
    """Return a network whose samples depend on the noise."""
    torch.manual_seed(0)
    exact = NoiseModel(1e-6, 1e9, 1e9)
    network = Estimator((8, 16), (1, 1), noise_channels=1, noise_model=exact, **options)
    torch.nn.init.normal_(network.unet.conv_in.weight[:, -4:], std=0.3)
    started(network).unet.conv_out.weight.data.mul_(0.05)
    return network.eval()


def thick() -> MetaTensor:
    """Return a bright head with a dark stripe, as a batch of one volume: elsewhere voxels are not bounded."""
    array = 2 + torch.from_numpy(head((15, 13, 7), seed=3)).float()
    array[0] = array[:, 0] = array[:, :, 0] = 0
    return MetaTensor(array[None, None], affine=torch.diag(torch.tensor([1.0, 1, 3, 1])))


def inferer(sw_batch_size: int = 3, **settings: Any) -> VolumeInferer:
    slices = BeamSearchInferer(sw_batch_size=sw_batch_size, blur=0.0)
    return VolumeInferer(slices, **{"samples": 4, "keep_samples": True, **settings})


def kept(result: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.as_subclass(Tensor) for name, x in result.items() if name.startswith("sample")], dim=1)


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_maps_are_those_of_the_samples(request_: dict[str, Any]) -> None:
    network, image = sampler(), thick()
    result = inferer(**request_, interval_factor=1.2)(image, network)
    assert list(result) == ["image", *sample_maps(4, keep=True)]
    plain = VolumeInferer(BeamSearchInferer(blur=0.0), **request_)(image, network)
    torch.testing.assert_close(result["image"], plain, atol=1e-3, rtol=0)
    samples = kept(result)
    assert (samples.std(dim=1) > 1e-2).float().mean() > 0.5
    for name, expected in zip(MAPS, SampleSummary.of(samples, factor=1.2), strict=True):
        found = result[name]
        torch.testing.assert_close(found[:, 0].as_subclass(Tensor), expected)
        assert found.shape == plain.shape
        np.testing.assert_array_equal(found.affine, plain.affine)
    only_maps = inferer(**request_, interval_factor=1.2, keep_samples=False)(image, network)
    assert list(only_maps) == ["image", *MAPS]
    torch.testing.assert_close(only_maps["p95"], result["p95"])


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_each_sample_explains_the_input(request_: dict[str, Any]) -> None:
    network, image = sampler(), thick()
    volumes = inferer(**request_)
    plan = volumes.plan(image[0], network)
    grids = plan.grids(volumes_grid(image))
    for sample in kept(volumes(image, network, plan=plan))[0]:
        degraded = plan.degraded(sample.double(), grids)
        difference = (degraded - image[0, 0].as_tensor().double())[5:, 5:, 3:]  # of voxels that are not bounded
        assert difference.abs().mean() < 0.02 * sample.std()


def volumes_grid(image: MetaTensor) -> Any:
    from miar_monai.transforms.metatensor import grid_of

    return grid_of(image[0])


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_seed_determines_the_samples_whatever_the_batches_and_their_number(request_: dict[str, Any]) -> None:
    network, image = sampler(), thick()
    four = kept(inferer(**request_, seed=5)(image, network))
    torch.testing.assert_close(four, kept(inferer(1, **request_, seed=5)(image, network)), atol=1e-3, rtol=0)
    six = kept(inferer(40, **request_, seed=5, samples=6)(image, network))
    torch.testing.assert_close(six[:, :4], four, atol=1e-3, rtol=0)
    assert not torch.allclose(kept(inferer(**request_, seed=6)(image, network)), four, atol=1e-2)


def test_two_planes_sample_in_turn() -> None:
    """A mean of two samples would have half their variance."""
    network, image = sampler(), thick()
    volumes = inferer(factor=(1, 1, 3), seed=2)
    samples = kept(volumes(image, network))
    (stage,) = volumes.plan(image[0], network).stages
    assert [one.name for one in stage] == ["sagittal", "coronal"]
    for number in range(4):
        one = stage[number % 2]
        axes = [2 + axis for axis in one.plane]
        expected, _ = volumes.inferer.super_resolve(
            image.as_tensor().movedim(axes, (2, 3)), network, assumed=one.degradation, sampling=Sampling(2, (number,))
        )
        torch.testing.assert_close(samples[:, [number]], expected.movedim((2, 3), axes), atol=1e-3, rtol=0)


def test_samples_use_the_guide() -> None:
    network, image = sampler(guide_channels=1), thick()
    guide = MetaTensor(torch.rand(1, 1, 15, 13, 21), affine=torch.eye(4))
    guided, without = (kept(inferer(factor=(1, 1, 3))(image, network, guide=one)) for one in (guide, None))
    assert not torch.allclose(guided, without, atol=1e-3)


def test_constant_slices_and_intensities_outside_of_the_range_are_those_of_the_input() -> None:
    network = sampler()
    slices = torch.rand(2, 1, 8, 8)
    slices[0] = 0.5
    slices[1, 0, 2:4, 2:4] = 3.0
    limited = BeamSearchInferer(intensity_range=(0, 1))
    assert limited.intensity_range is not None
    assumed, sampling = Degradation(2, 0.5), Sampling(0, (0, 1, 2))
    samples, weight = limited.super_resolve(slices, network, assumed=assumed, sampling=sampling)
    assert weight is None
    assert samples.shape == (2, 3, 16, 16)
    assert torch.equal(samples[0], torch.full((3, 16, 16), 0.5))
    clipped, _ = limited.super_resolve(slices.clamp(0, 1), network, assumed=assumed, sampling=sampling)
    difference = samples[1] - clipped[1]
    excess = IntensityRange(0, 1).restore(torch.zeros(1, 1, 16, 16), slices[1:])[0]
    torch.testing.assert_close(difference, excess.expand(3, -1, -1), atol=1e-3, rtol=0)


def test_noise_differs_between_samples_slices_stages_and_seeds() -> None:
    drawn = [
        torch.randn(1, generator=source).item()
        for seed in (0, 1)
        for stage in (0, 1)
        for row in Sampling(seed, (0, 1), stage).generators(range(3, 5))
        for source in row
    ]
    assert len({*drawn}) == 16


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"samples": 1}, r"^samples is 1, but at least 2 are needed"),
        ({"samples": -2}, r"^samples is -2"),
        ({"samples": 2.5}, r"^samples is 2\.5, but it must be a whole number"),
        ({"seed": -1}, r"^sampling_seed is -1"),
        ({"interval_factor": -1.0}, r"^interval_factor is -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        inferer(**settings)


def test_networks_that_do_not_sample_are_refused_before_the_work() -> None:
    for network in (Estimator((8, 16), (1, 1)), tiny_miar()):
        name = type(network).__name__
        with pytest.raises(SettingError, match=rf"^this {name} was not trained to sample, but samples"):
            inferer()(thick(), network)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [False, True])
def test_recorded_samples_are_those_of_a_cpu(amp: bool) -> None:
    network, image = sampler(), thick()
    volumes = inferer(4)
    expected = kept(volumes(image, network))
    network.cuda()
    for _ in range(3):  # launched three times, recorded, replayed
        with torch.autocast("cuda", torch.bfloat16, enabled=amp), torch.inference_mode():
            found = kept(volumes(image, network))
        assert (found - expected).abs().max() < (0.05 if amp else 1e-3) * expected.abs().max()
