from __future__ import annotations

import pytest
import torch
from helpers.phantoms import head
from torch import Tensor
from torch.utils.data import DataLoader

from miar_monai.degradation import Degradation, Member, OperatorFamily, through_plane_degradations
from miar_monai.errors import SettingError
from miar_monai.networks import Estimator
from miar_monai.networks.linear import NoiseModel
from miar_monai.training.estimation import EstimatorObjective
from miar_monai.training.losses import ReconstructionLoss
from miar_monai.training.trainers import MIARTrainer

SIDE = 40


def objective(guide_channels: int = 0, **settings: float | tuple[float, float]) -> EstimatorObjective:
    torch.manual_seed(0)
    family = OperatorFamily([Member([Degradation(2, 0.5)], 1), Member(through_plane_degradations([2.5, 4]), 1)], SIDE)
    # edges without a blur resemble noise, which would reduce the weight of the network
    noise_model = NoiseModel(max_training_noise=1.0)
    network = Estimator(channels=(8, 16), blocks=(1, 1), guide_channels=guide_channels, noise_model=noise_model)
    return EstimatorObjective(network, family, ReconstructionLoss(1.0, 0.0, perceptual=0.0), **settings)  # type: ignore[arg-type]


def slices(count: int = 4) -> Tensor:
    return torch.from_numpy(head((SIDE, SIDE, count), seed=2)).float().movedim(-1, 0)[:, None]


@pytest.mark.parametrize("name", ["faithful_loss", "perceptual_loss"])
def test_a_small_step_along_the_gradient_reduces_a_loss(name: str) -> None:
    trained, hr = objective(), torch.rand(8, 1, SIDE, SIDE)
    optimizer = torch.optim.SGD(trained.network.parameters(), lr=1e-3)

    def loss() -> Tensor:
        torch.manual_seed(1)  # the same degradations and noise
        return trained(hr)[name]

    before = loss()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < before - 1e-5


def test_the_trainer_needs_nothing_but_the_losses() -> None:
    trained = objective()
    before = [x.clone() for x in trained.network.parameters()]
    optimizer = torch.optim.SGD(trained.network.parameters(), lr=1e-2)
    loader = DataLoader([{"image": hr} for hr in slices()], batch_size=2)
    MIARTrainer("cpu", 1, loader, trained, optimizer, batch_keys=("image", "guide")).run()
    assert any(not torch.equal(x, old) for x, old in zip(trained.network.parameters(), before, strict=True))


def test_an_untrained_network_has_the_loss_of_the_linear_estimate() -> None:
    untrained, hr = objective(noise_prob=0.0), slices()
    torch.manual_seed(2)
    parts = untrained(hr)
    torch.manual_seed(2)
    operator = untrained.family.select(untrained.family.sample(len(hr)))
    linear = untrained.network.observe(operator.A(hr), operator).linear
    corrected = operator.prox(linear, operator.A(hr), 1e-3)
    assert parts["faithful_loss"].item() == pytest.approx((corrected - hr).abs().mean().item(), rel=0.05)
    assert parts["loss"].item() == pytest.approx(2 * parts["faithful_loss"].item(), rel=1e-5)


def test_noise_is_added_to_its_share_of_the_images() -> None:
    hr = slices()
    losses = []
    for share in (0.0, 1.0):
        one = objective(noise=(0.02, 0.02), noise_prob=share)
        torch.manual_seed(3)
        losses.append(one(hr)["faithful_loss"].item())
    assert losses[1] > losses[0] + 1e-3


def test_a_share_of_the_degradations_is_assumed_wrongly() -> None:
    hr, losses = slices(), []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        family = OperatorFamily([Member([Degradation(2, 0.5), Degradation(2, 1.0)], 1)], SIDE)
        network = Estimator(channels=(8, 16), blocks=(1, 1), noise_model=NoiseModel(max_training_noise=1.0))
        reconstruction = ReconstructionLoss(1.0, 0.0, perceptual=0.0)
        one = EstimatorObjective(network, family, reconstruction, noise_prob=0.0, mismatch_prob=share)
        torch.manual_seed(3)
        losses.append(one(hr)["faithful_loss"].item())
    assert losses[1] > 1.5 * losses[0]


def test_guides_are_dropped_by_their_share() -> None:
    hr, guide, seen = slices(64), torch.ones(64, 1, SIDE, SIDE), []
    one = objective(guide_channels=1, guide_prob=0.25)
    one.network.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 4:8].amax(dim=(1, 2, 3))))
    one(hr, guide)
    assert set(seen[0].tolist()) == {0.0, 1.0}
    assert 0.05 < seen[0].mean().item() < 0.5


def test_shares_must_be_fractions() -> None:
    with pytest.raises(SettingError, match=r"^guide_prob is 2"):
        objective(guide_prob=2.0)


def test_the_reconstruction_loss_stays_in_evaluation_mode() -> None:
    trained = objective()
    modules = [*trained.reconstruction.modules(), torch.nn.Dropout()]
    trained.reconstruction.add_module("dropout", modules[-1])  # as in LPIPS
    trained.train()
    assert trained.network.training
    assert not any(module.training for module in modules)
