"""Super-resolution of LR slices of any size by a `MIAR`, whose networks work on tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from miar_monai.degradation import Degradation, operators
from miar_monai.inference.steps import Steps, StepSettings
from miar_monai.inference.tiling import Padding, TileFunction, blend_tiles
from miar_monai.networks import MIAR
from miar_monai.networks.results import Estimate, Prediction

__all__ = ["TiledMIAR", "warn_if_noisy"]

logger = logging.getLogger(__name__)

_MIN_NETWORK_WEIGHT = 0.9  # mean of all slices, below which a warning is logged


@dataclass
class TiledMIAR:
    """Super-resolves the slices of one call of the inferer.

    Args:
        network: the network.
        degradation: assumed degradation of the slices.
        steps: steps of the network, possibly as CUDA graphs.
        settings: settings of the steps.
        device: device of the network.
        overlap: fraction of a tile shared with its neighbor.
        count_tiles: wraps a function of tiles so that it advances a progress bar.
    """

    network: MIAR
    degradation: Degradation
    steps: Steps
    settings: StepSettings
    device: torch.device
    overlap: float
    count_tiles: Callable[[TileFunction], TileFunction]
    network_weights: list[Tensor] = field(default_factory=list, init=False)

    def __call__(self, slices: Tensor, batch_size: int) -> Tensor:
        """Super-resolve LR slices (N, 1, h, w), in batches of tiles: (N, 1, H, W), or (N, 2, H, W) with the error."""
        rows, columns = (
            Padding.of(lr_size, scale, self.network.side)
            for lr_size, scale in zip(slices.shape[2:], self.degradation.scales, strict=True)
        )
        # before the inverse: replicating its ripples would make streaks
        lr = Padding.pad(slices.to(self.device), rows, columns)
        shape = (rows.padded_size, columns.padded_size)
        operator = operators((self.degradation,), shape, (lr.shape[2], lr.shape[3]), lr)
        if shape == (self.network.side, self.network.side):
            estimate = Estimate(**self.steps.of_slices(lr, *operator.tensors))
        else:
            predict = partial(self._predict_tiles, batch_size)
            estimate = self.settings.super_resolve(self.network, lr, operator, predict)
        self.network_weights.append(estimate.network_weight.flatten())
        images = [estimate.image] if estimate.error is None else [estimate.image, estimate.error]
        return Padding.crop(torch.cat(images, dim=1), rows, columns)

    def _predict_tiles(self, batch_size: int, linear: Tensor, condition: Tensor) -> Prediction:
        """Return the prediction for linear estimates (N, 1, H, W) of any size, by tiles."""
        condition = condition.expand(-1, -1, *linear.shape[2:])
        inputs = torch.cat([linear, condition], dim=1)  # (N, 3, H, W): tiles keep their condition

        def predict(tiles: Tensor) -> dict[str, Tensor]:
            return self.steps.of_tiles(tiles[:, :1], tiles[:, 1:, :1, :1])

        return Prediction(**blend_tiles(inputs, self.network.side, self.overlap, batch_size, self.count_tiles(predict)))


def warn_if_noisy(network_weights: Sequence[Tensor]) -> None:
    """Log a warning if noise has moved the results towards the linear estimate.

    Args:
        network_weights: weights of the network in the slices of one or more calls.
    """
    weight = float(torch.cat(list(network_weights)).mean()) if network_weights else 1.0
    if weight < _MIN_NETWORK_WEIGHT:
        logger.warning(
            "the input is noisier than the training data, or sharper than the assumed blur allows: the networks"
            " contribute %d %% of the result, and the rest is the linear estimate, which adds no detail.",
            round(100 * weight),
        )
