from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.phantoms import head
from torch import Tensor

from miar_monai.degradation import Degradation
from miar_monai.errors import CheckpointError, ConfigurationError, SettingError
from miar_monai.networks import Estimator
from miar_monai.networks.estimator import UNBOUNDED, BoundedBlock
from miar_monai.networks.results import Prediction
from miar_monai.networks.weights import load_weights, save_weights


def estimator(guide_channels: int = 0, noise_channels: int = 0) -> Estimator:
    """Return a network whose maps differ, as after training."""
    torch.manual_seed(0)
    network = Estimator((8, 16, 16), (1, 1, 1), guide_channels=guide_channels, noise_channels=noise_channels)
    for name, parameter in network.named_parameters():
        if "conv2" in name or "conv_out" in name or "noise_layers" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


GRIDS = [
    Degradation(),
    Degradation(2.5, (0.5, 0.0)),
    Degradation((1, 5), 0.0, profile=("bicubic", "gaussian"), thickness=(1.0, 0.8)),
    Degradation((8, 1.5), 0.0, profile=("box", "slr")),
]


@pytest.mark.parametrize("degradation", GRIDS, ids=str)
def test_results_of_any_grid_and_size_are_consistent_with_the_input(degradation: Degradation) -> None:
    network, lr = estimator(), torch.from_numpy(head((23, 21, 2), seed=1)).float().movedim(-1, 0)[:, None]
    operator = degradation.for_lr(lr)
    lr = operator.A(operator.interpolate(lr))
    estimate = network.super_resolve(lr, operator=operator)
    assert estimate.image.shape == (2, 1, *operator.hr_shape)
    assert not torch.equal(estimate.perceptual, estimate.faithful)
    observed = network.observe(lr, operator)
    maps = network.predict(observed.images, network.condition(observed)).maps
    before, after = ((operator.A(x) - lr).abs().mean() for x in (maps, network.correct(maps, observed)))
    assert after < 0.1 * before


def test_an_untrained_network_returns_the_linear_estimate() -> None:
    network, lr = Estimator(channels=(8, 16), blocks=(1, 1)).eval(), torch.rand(1, 1, 8, 8)
    observed = network.observe(lr)
    assert torch.equal(network.predict(observed.images, network.condition(observed)).maps[:, :1], observed.linear)


def test_a_slice_on_which_the_network_diverges_is_the_linear_estimate() -> None:
    network = estimator()
    lr = torch.from_numpy(head((23, 21, 4), seed=1)).float().movedim(-1, 0)[:, None]
    observed = network.observe(lr)
    prediction = network.predict(observed.images, network.condition(observed))
    maps = prediction.maps.clone()
    maps[1, 0, 40, 50] = 1e5
    maps[2, 1, 7, 7] = float("nan")
    found, plain = network.finish(Prediction(maps), observed), network.finish(prediction, observed)
    linear = network.finish(prediction, observed._replace(network_weight=torch.zeros(4, 1, 1, 1)))
    factors = torch.tensor([1, 0, 0, 1])[:, None, None, None]
    assert torch.equal(found.network_weight, plain.network_weight * factors)
    assert (plain.network_weight > 0.1).all()
    for i, expected in enumerate((plain, linear, linear, plain)):
        torch.testing.assert_close(found.image[i], expected.image[i])
    assert not torch.allclose(plain.image, linear.image, atol=1e-3)


def test_its_condition_tells_grids_apart() -> None:
    network, lr = estimator(), torch.rand(1, 1, 20, 20)
    conditions = [network.condition(network.observe(lr, grid.for_lr(lr))).flatten() for grid in GRIDS]
    assert conditions[0].shape == (5,)
    rows, columns = conditions[2][1:3], conditions[2][3:]
    assert rows.tolist() == pytest.approx([-1.0, -1.0], abs=1e-6)  # an axis that stays
    assert columns[0].item() == pytest.approx(torch.tensor(5.0).log2().item() - 1, abs=1e-6)
    assert columns[1] > columns[0]  # the profile lowers the resolution further
    for i in range(len(GRIDS)):
        assert all((conditions[i] - conditions[j]).abs().max() > 0.1 for j in range(i))


def test_a_guide_changes_the_maps_and_its_absence_is_zero() -> None:
    network, lr = estimator(guide_channels=1), torch.rand(2, 1, 8, 8)
    guide = torch.rand(2, 1, 32, 32)
    without = network.super_resolve(lr).image
    assert torch.equal(without, network.super_resolve(lr, guide=torch.zeros_like(guide)).image)
    assert not torch.allclose(without, network.super_resolve(lr, guide=guide).image, atol=1e-4)


def test_a_result_depends_on_a_neighborhood_only() -> None:
    """Without normalization and attention, large slices need no tiles."""
    network, condition = estimator(), torch.zeros(1, 5, 1, 1)
    images = torch.rand(1, 1, 160, 96)
    whole = network.predict(images, condition).maps
    part = network.predict(images[:, :, 40:], condition).maps
    torch.testing.assert_close(part[:, :, 48:], whole[:, :, 88:], atol=1e-5, rtol=0)


def test_sizes_that_are_no_multiple_of_the_stride_are_padded() -> None:
    network = estimator()
    assert (network.stride, network.side) == (8, None)
    assert network.predict(torch.rand(1, 1, 37, 10), torch.zeros(1, 5, 1, 1)).maps.shape == (1, 2, 37, 10)


def test_a_copy_in_bfloat16_follows_the_weights() -> None:
    network, images, condition = estimator(), torch.rand(1, 1, 32, 32), torch.zeros(1, 5, 1, 1)
    copy = network.cast(torch.bfloat16)
    assert copy.dtype == torch.bfloat16
    torch.testing.assert_close(
        copy.predict(images, condition).maps, network.predict(images, condition).maps, atol=0.05, rtol=0
    )
    with torch.no_grad():
        network.unet.conv_out.bias.add_(1)
    copy.cast_from(network)
    torch.testing.assert_close(
        copy.predict(images, condition).maps, network.predict(images, condition).maps, atol=0.05, rtol=0
    )


def test_gradients_reach_all_weights() -> None:
    network: Estimator = estimator(guide_channels=1).train()
    observed = network.observe(torch.rand(2, 1, 8, 8), guide=torch.rand(2, 1, 32, 32))
    maps = network.correct(network.maps(observed.images, network.condition(observed)), observed)
    maps.square().mean().backward()
    gradients: list[Tensor | None] = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_levels_must_agree() -> None:
    with pytest.raises(ConfigurationError, match=r"^channels has 2 levels but blocks 1; give one number"):
        Estimator(channels=(8, 16), blocks=(1,))


def test_activations_stay_within_their_bounds() -> None:
    """Features that training did not excite cannot grow from block to block."""
    network, x = estimator(), torch.rand(1, 1, 24, 20)
    condition = torch.zeros(1, 5, 1, 1)
    departures = []
    for bound in (UNBOUNDED, 1.0):
        for block in network.unet.modules():
            if isinstance(block, BoundedBlock):
                block.bound.fill_(bound)
        departures.append((network.predict(1e4 * x, condition).maps - 1e4 * x).abs().max().item())
    assert departures[1] < 0.5 * departures[0]
    features = network.unet.middle[0](1e4 * torch.rand(1, 16, 5, 7))
    assert features.abs().max() == 1


def test_weights_without_bounds_load_and_are_unbounded() -> None:
    network = estimator()
    x, condition = torch.rand(1, 1, 16, 16), torch.zeros(1, 5, 1, 1)
    before = network.predict(x, condition).maps
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("bound")}
    loaded = Estimator(channels=(8, 16, 16), blocks=(1, 1, 1)).eval()
    for block in loaded.unet.modules():
        if isinstance(block, BoundedBlock):
            block.bound.fill_(0.0)
    loaded.load_state_dict(state)
    assert torch.equal(loaded.predict(x, condition).maps, before)


def sampler() -> Estimator:
    """Return a network whose sample depends on the noise, as after training."""
    network = estimator(guide_channels=1, noise_channels=2)
    torch.nn.init.normal_(network.unet.conv_in.weight[:, -8:], std=0.05)
    return network


def test_weights_without_noise_give_the_same_maps_and_the_perceptual_one_as_sample(tmp_path: Path) -> None:
    plain, sampling = estimator(guide_channels=1), Estimator((8, 16, 16), (1, 1, 1), guide_channels=1, noise_channels=2)
    for parameter in plain.unet.conv_in.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(plain, tmp_path / "plain.pt", half=False)
    load_weights(sampling, tmp_path / "plain.pt", "").eval()
    images, condition = torch.rand(2, 2, 24, 32), torch.rand(2, 5, 1, 1)
    expected = plain.predict(images, condition).maps
    torch.testing.assert_close(sampling.predict(images, condition).maps, expected)
    sample = sampling.sample(images, condition, torch.randn(2, 2, 24, 32))
    torch.testing.assert_close(sample, expected[:, :1])
    save_weights(sampling, tmp_path / "sampling.pt", half=False)
    load_weights(sampling, tmp_path / "sampling.pt", "")
    for network in (estimator(guide_channels=1), estimator(guide_channels=1, noise_channels=1)):
        with pytest.raises(CheckpointError, match="belongs to another network"):
            load_weights(network, tmp_path / "sampling.pt", "")


def test_gradients_reach_the_weights_of_the_noise() -> None:
    network = Estimator((8, 16), (1, 1), noise_channels=1)
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.05)
    maps = network.maps(torch.rand(2, 1, 16, 16), torch.zeros(2, 5, 1, 1), torch.randn(2, 1, 16, 16))
    maps[:, 2].square().mean().backward()
    for weight in (network.unet.conv_in.weight, network.unet.noise_layers[0].weight):
        assert weight.grad is not None
        assert (weight.grad[:, -4:] != 0).any()


def test_estimates_do_not_depend_on_noise_that_is_zero() -> None:
    network, images, condition = sampler(), torch.rand(1, 2, 16, 24), torch.zeros(1, 5, 1, 1)
    silent = network.maps(images, condition)
    assert silent.shape == (1, 3, 16, 24)
    torch.testing.assert_close(network.maps(images, condition, torch.zeros(1, 2, 16, 24)), silent)
    assert torch.equal(network.predict(images, condition).maps, silent[:, :2])
    assert not torch.allclose(network.maps(images, condition, torch.randn(1, 2, 16, 24)), silent, atol=1e-3)


def test_the_noise_of_coarser_levels_has_the_variance_of_the_noise() -> None:
    network, seen = sampler(), []
    for layer in network.unet.noise_layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.sample(torch.rand(1, 2, 256, 256), torch.zeros(1, 5, 1, 1), torch.randn(1, 2, 256, 256))
    assert [tuple(noise.shape) for noise in seen] == [(1, 8, 64, 64), (1, 8, 32, 32)]
    assert [noise.std().item() for noise in seen] == pytest.approx([1.0, 1.0], abs=0.03)


@pytest.mark.parametrize("degradation", GRIDS, ids=str)
def test_samples_are_consistent_reproducible_and_independent(degradation: Degradation) -> None:
    network, lr = sampler(), torch.from_numpy(head((23, 21, 2), seed=1)).float().movedim(-1, 0)[:, None]
    operator = degradation.for_lr(lr)
    lr = operator.A(operator.interpolate(lr))
    noise = network.white_noise(operator, (2, 4), torch.Generator().manual_seed(5))
    samples = network.posterior_samples(lr, noise, operator)
    assert samples.shape == (2, 4, *operator.hr_shape)
    assert (samples.std(dim=1).mean(dim=(1, 2)) > 1e-3).all()
    observed = network.observe(lr, operator)
    uncorrected = network.sample(observed.images, network.condition(observed), noise[:, 0])
    before, after = ((operator.A(x) - lr).abs().mean() for x in (uncorrected, samples[:, :1]))
    assert after < 0.5 * before  # not 0, as voxels are not darker than the darkest of their slice
    corrected = network.correct(uncorrected, observed)
    assert (operator.A(corrected) - lr).abs().mean() < 0.1 * before
    again = network.white_noise(operator, (2, 4), torch.Generator().manual_seed(5))
    assert torch.equal(network.posterior_samples(lr, again, operator), samples)
    alone = network.posterior_samples(lr[1:], noise[1:, 2:3], operator)
    torch.testing.assert_close(alone, samples[1:, 2:3], atol=1e-4, rtol=0)


def test_networks_that_were_not_trained_to_sample_say_so() -> None:
    network, lr = estimator(), torch.rand(1, 1, 8, 8)
    sentence = r"^this Estimator was not trained to sample, but samples were requested; use an Estimator with"
    with pytest.raises(SettingError, match=sentence):
        network.white_noise(network.degradation.for_lr(lr), [1])
    with pytest.raises(SettingError, match=sentence):
        network.sample(torch.rand(1, 1, 8, 8), torch.zeros(1, 5, 1, 1), torch.zeros(1, 0, 8, 8))
