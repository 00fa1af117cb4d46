"""Bounds of activations: the range that they have in training."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from miar_monai.networks.estimator import UNBOUNDED, BoundedBlock
from miar_monai.training.trainers import MIARTrainer

__all__ = ["record_bounds"]


@torch.no_grad()
def record_bounds(trainer: MIARTrainer, network: nn.Module, num_batches: int = 200, margin: float = 1.2) -> None:
    """Set the bounds of each `BoundedBlock` to what its channels reach on batches of the training.

    Args:
        trainer: a trainer whose objective has a ``network``; its batches and degradations are drawn as in training.
        network: the network to record and to change, such as the moving average.
        num_batches: number of batches.
        margin: factor from the largest magnitude of a channel to its bound.

    Example:
        >>> from miar_monai.degradation import Degradation, Member, OperatorFamily
        >>> from miar_monai.networks import Estimator
        >>> from miar_monai.training.estimation import EstimatorObjective
        >>> from miar_monai.training.losses import ReconstructionLoss
        >>> network = Estimator(channels=(8, 16), blocks=(1, 1))
        >>> family = OperatorFamily([Member([Degradation()], 1)], 16)
        >>> objective = EstimatorObjective(network, family, ReconstructionLoss(1.0, 0.0, perceptual=0.0))
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> trainer = MIARTrainer("cpu", 1, [{"image": torch.rand(2, 1, 16, 16)}], objective, optimizer, ["image"])
        >>> record_bounds(trainer, network, num_batches=1)
        >>> bool((network.unet.middle[0].bound < 100).all())
        True
    """
    blocks = [module for module in network.modules() if isinstance(module, BoundedBlock)]
    for block in blocks:
        block.bound.fill_(UNBOUNDED)
    largest: dict[BoundedBlock, Tensor] = {}

    def record(block: BoundedBlock, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        now = output.abs().amax(dim=(0, 2, 3)).float()[:, None, None]  # (C, 1, 1)
        largest[block] = torch.maximum(largest[block], now) if block in largest else now

    hooks = [block.register_forward_hook(record) for block in blocks]
    objective = trainer.plain_objective
    trained, objective.network = objective.network, network
    try:
        for batch in islice(trainer.data_loader, num_batches):
            trainer.losses(batch)
    finally:
        objective.network = trained
        for hook in hooks:
            hook.remove()
    for block, bound in largest.items():
        block.bound.copy_(margin * bound)
