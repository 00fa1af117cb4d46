from __future__ import annotations

import pytest
import torch
from helpers.phantoms import head
from torch import Tensor

from miar_monai.degradation import Degradation, Member, OperatorFamily, through_plane_degradations
from miar_monai.errors import SettingError
from miar_monai.networks import Estimator
from miar_monai.training.estimation import EstimatorObjective
from miar_monai.training.losses import ReconstructionLoss

SIDE = 40


def objective(guide_channels: int = 0, **settings: float | tuple[float, float]) -> EstimatorObjective:
    torch.manual_seed(0)
    family = OperatorFamily([Member([Degradation(2, 0.5)], 1), Member(through_plane_degradations([2.5, 4]), 1)], SIDE)
    network = Estimator(channels=(8, 16), blocks=(1, 1), guide_channels=guide_channels)
    return EstimatorObjective(network, family, ReconstructionLoss(1.0, 0.0, perceptual=0.0), **settings)  # type: ignore[arg-type]


def slices(count: int = 4) -> Tensor:
    return torch.from_numpy(head((SIDE, SIDE, count), seed=2)).float().movedim(-1, 0)[:, None]


def test_training_reduces_both_losses_on_every_grid() -> None:
    trained, hr = objective(noise_prob=0.0), (slices(8) > 0.5).float()  # sharp edges can be learned
    optimizer = torch.optim.Adam(trained.network.parameters(), lr=3e-3)

    def mean_losses() -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            parts = [trained(hr) for _ in range(4)]
        return torch.tensor([[part["faithful_loss"], part["perceptual_loss"]] for part in parts]).mean(dim=0)

    before = mean_losses()
    for _ in range(80):
        optimizer.zero_grad()
        trained(hr)["loss"].backward()
        optimizer.step()
    assert (mean_losses() < 0.9 * before).all()


def test_an_untrained_network_has_the_loss_of_the_linear_estimate() -> None:
    untrained, hr = objective(noise_prob=0.0), slices()
    torch.manual_seed(2)
    parts = untrained(hr)
    torch.manual_seed(2)
    operator = untrained.family.sample(len(hr))
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
