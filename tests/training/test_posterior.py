from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.phantoms import head
from ignite.engine import Events
from torch import Tensor
from torch.utils.data import DataLoader

from miar_monai.degradation import Degradation, Member, OperatorFamily, through_plane_degradations
from miar_monai.errors import SettingError
from miar_monai.networks import Estimator
from miar_monai.networks.estimator import UNBOUNDED, BoundedBlock
from miar_monai.networks.linear import NoiseModel
from miar_monai.training import record_bounds
from miar_monai.training.estimation import EstimatorObjective
from miar_monai.training.losses import ReconstructionLoss
from miar_monai.training.posterior import PosteriorObjective
from miar_monai.training.scores import PosteriorScore
from miar_monai.training.trainers import MIARTrainer

SIDE = 40


def settings(noise_channels: int, guide_channels: int = 0) -> dict[str, Any]:
    torch.manual_seed(0)
    family = OperatorFamily([Member([Degradation(2, 0.5)], 1), Member(through_plane_degradations([2.5, 4]), 1)], SIDE)
    network = Estimator(
        channels=(8, 16), blocks=(1, 1), guide_channels=guide_channels, noise_channels=noise_channels,
        noise_model=NoiseModel(max_training_noise=1.0),
    )  # fmt: skip
    reconstruction = ReconstructionLoss(1.0, 0.0, perceptual=0.0)
    return {"network": network, "family": family, "reconstruction": reconstruction, "noise_prob": 0.0}


def objective(**kind: int) -> PosteriorObjective:
    return PosteriorObjective(PosteriorScore(features=0.0, num_filters=4), **settings(**{"noise_channels": 1, **kind}))


def slices(count: int = 4) -> Tensor:
    return torch.from_numpy(head((SIDE, SIDE, count), seed=2)).float().movedim(-1, 0)[:, None]


def test_the_losses_of_the_estimates_are_those_of_an_estimator() -> None:
    posterior = objective()
    plain = EstimatorObjective(**{**settings(1), "network": posterior.network})
    for parameter in posterior.network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    expected, found = ({}, {})
    for one, parts in ((plain, expected), (posterior, found)):
        torch.manual_seed(4)  # the same degradations
        parts.update(one(slices()))
    for name in ("faithful_loss", "perceptual_loss"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-4)
    scores = found["voxel_score"] + found["patch_score"]
    assert found["loss"].item() == pytest.approx((expected["loss"] + scores).item(), rel=1e-4)


def test_an_untrained_network_has_no_spread() -> None:
    parts = objective()(slices())
    assert parts["spread_over_skill"] == 0
    assert parts["voxel_score"] > 0


def test_training_spreads_the_samples() -> None:
    """The truth is white noise, of which the LR images say little: samples must spread to score well."""
    trained, ratios, scores = objective(), [], []
    optimizer = torch.optim.Adam(trained.network.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        parts = trained(torch.rand(4, 1, SIDE, SIDE, generator=generator))
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        ratios.append(parts["spread_over_skill"].item())
        scores.append(parts["voxel_score"].item())
    assert ratios[0] == 0
    assert 0.7 < sum(ratios[-20:]) / 20 < 1.2
    assert sum(scores[-20:]) < 0.9 * sum(scores[:20])


def test_the_trainer_and_the_bounds_need_nothing_but_the_losses() -> None:
    trained = objective(guide_channels=1)
    batches = DataLoader([{"image": hr, "guide": 1 - hr} for hr in slices()], batch_size=2)
    optimizer = torch.optim.SGD(trained.network.parameters(), lr=1e-2)
    trainer = MIARTrainer("cpu", 2, batches, trained, optimizer, batch_keys=("image", "guide"))
    trainer.run()
    assert (trained.network.unet.noise_layers[0].weight != 0).any()
    record_bounds(trainer, trained.network)
    blocks = [module for module in trained.network.modules() if isinstance(module, BoundedBlock)]
    assert all((block.bound < UNBOUNDED).all() for block in blocks)


def test_the_network_must_sample() -> None:
    with pytest.raises(SettingError, match=r"^this Estimator was not trained to sample, but samples"):
        objective(noise_channels=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graphed_step_draws_new_noise() -> None:
    trained = objective().cuda()
    rate = torch.tensor(1e-2, device="cuda")
    optimizer = torch.optim.AdamW(trained.network.parameters(), lr=rate, capturable=True)
    batches = DataLoader([{"image": hr} for hr in torch.rand(16, 1, SIDE, SIDE)], batch_size=4)
    trainer = MIARTrainer("cuda", 8, batches, trained, optimizer, ["image"], amp=True, cuda_graphs=True)
    history = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: history.append(engine.state.output[0]))
    trainer.run()
    assert float(history[0]["spread_over_skill"]) == 0
    assert float(history[-1]["spread_over_skill"]) > 0.1
    assert len({round(float(parts["loss"]), 6) for parts in history}) > 16
