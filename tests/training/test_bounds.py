from __future__ import annotations

import pytest
import torch
from helpers.phantoms import head
from torch import Tensor
from torch.utils.data import DataLoader

from miar_monai.degradation import Degradation, Member, OperatorFamily
from miar_monai.networks import Estimator
from miar_monai.networks.estimator import UNBOUNDED, BoundedBlock
from miar_monai.training import record_bounds
from miar_monai.training.estimation import EstimatorObjective
from miar_monai.training.losses import ReconstructionLoss
from miar_monai.training.trainers import MIARTrainer

SIDE = 24


def slices(count: int = 6) -> Tensor:
    return torch.from_numpy(head((SIDE, SIDE, count), seed=2)).float().movedim(-1, 0)[:, None]


def trainer_of(network: Estimator) -> MIARTrainer:
    family = OperatorFamily([Member([Degradation(2, 0.5)], 1)], SIDE)
    objective = EstimatorObjective(network, family, ReconstructionLoss(1.0, 0.0, perceptual=0.0), noise_prob=0.0)
    loader = DataLoader([{"image": hr} for hr in slices()], batch_size=2)
    return MIARTrainer("cpu", 1, loader, objective, torch.optim.SGD(network.parameters(), lr=1e-2), ["image"])


def averaged_network() -> Estimator:
    torch.manual_seed(0)
    network = Estimator(channels=(8, 16), blocks=(1, 2))
    for block in network.unet.modules():
        if isinstance(block, BoundedBlock):
            torch.nn.init.normal_(block.conv2.weight, std=0.05)
    return network


def test_bounds_are_the_largest_magnitudes_in_training_with_a_margin() -> None:
    network, trained = averaged_network(), Estimator(channels=(8, 16), blocks=(1, 2))
    trainer = trainer_of(trained)
    record_bounds(trainer, network, margin=1.0)
    assert trainer.objective.network is trained
    hr = slices()
    operator = Degradation(2, 0.5).for_hr(hr)
    observed = network.observe(operator.A(hr), operator)
    outputs: dict[str, Tensor] = {}
    for name, block in network.named_modules():
        if isinstance(block, BoundedBlock):
            block.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
    before = network.maps(observed.images, network.condition(observed))
    for name, block in network.named_modules():
        if isinstance(block, BoundedBlock):
            reached = outputs[name].abs().amax(dim=(0, 2, 3))
            assert block.bound.flatten().tolist() == pytest.approx(reached.tolist(), rel=1e-4)
    record_bounds(trainer, network, num_batches=1, margin=1.5)  # earlier bounds do not limit later ones
    assert torch.allclose(network.maps(observed.images, network.condition(observed)), before, atol=1e-6)


def test_training_ends_with_bounds_in_the_averaged_network() -> None:
    network = averaged_network()
    trainer = trainer_of(network)
    trainer.run()
    assert all((block.bound == UNBOUNDED).all() for block in network.modules() if isinstance(block, BoundedBlock))
    record_bounds(trainer, network)
    assert all((block.bound < 100).all() for block in network.modules() if isinstance(block, BoundedBlock))
