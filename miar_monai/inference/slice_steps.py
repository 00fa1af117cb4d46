"""Super-resolution of LR slices of any size by a network, on tiles or on whole slices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from miar_monai.degradation import Degradation, SeparableOperator, operators
from miar_monai.inference.error_model import ErrorModel
from miar_monai.inference.steps import Steps, StepSettings
from miar_monai.inference.tiling import MAX_BAND, Padding, TileFunction, blend_tiles, in_bands
from miar_monai.networks import SuperResolutionNetwork
from miar_monai.networks.results import Estimate, Prediction

__all__ = ["SliceFunction", "SliceSteps", "warn_of_linear_estimates"]

logger = logging.getLogger(__name__)

SliceFunction = Callable[[Tensor, int, Tensor | None], Tensor]
"""Maps LR slices (N, 1, h, w), the batch size and guides (N, 1, H, W) to results (N, C, H, W)."""

_MIN_NETWORK_WEIGHT = 0.9  # mean of all slices, below which a warning is logged
_MAX_RECORDED = 2**20  # voxels of the HR grid of a batch; in larger ones, kernels take longer than their launch


@dataclass
class SliceSteps:
    """Super-resolves the slices of one call of the inferer.

    Args:
        network: the network.
        degradation: assumed degradation of the slices.
        steps: steps of the network, possibly as CUDA graphs.
        settings: settings of the steps.
        device: device of the network.
        overlap: fraction of a tile shared with its neighbor.
        count_tiles: wraps a function of tiles so that it advances a progress bar.
        error_model: limits samples; that of the results is one of the settings.
    """

    network: SuperResolutionNetwork
    degradation: Degradation
    steps: Steps
    settings: StepSettings
    device: torch.device
    overlap: float
    count_tiles: Callable[[TileFunction], TileFunction]
    error_model: ErrorModel | None = None
    network_weights: Tensor = field(init=False)
    """Weights of the network in the slices so far. They are one tensor, since many small ones, spread over the heap,
    would keep the memory of the batches between them from being used again."""

    def __post_init__(self) -> None:
        self.network_weights = torch.empty(0, device=self.device)

    def __call__(self, slices: Tensor, batch_size: int, guide: Tensor | None = None) -> Tensor:
        """Super-resolve LR slices (N, 1, h, w), in batches of tiles: (N, 1, H, W), or (N, 2, H, W) with the error."""
        side = self.network.side
        lr, operator, guides, rows, columns = self._prepared(slices, guide)
        shape = (rows.padded_size, columns.padded_size)
        voxels = len(lr) * shape[0] * shape[1]
        if shape == (side, side) or (side is None and voxels <= MAX_BAND):
            steps = self.steps if side or voxels <= _MAX_RECORDED else self.steps.without_graphs
            estimate = Estimate(**steps.of_slices(lr, *operator.tensors, *guides))
        else:
            predict = partial(self._predict_parts, batch_size)
            estimate = self.settings.super_resolve(self.network, lr, operator, predict, *guides)
        self.network_weights = torch.cat([self.network_weights, estimate.network_weight.flatten()])
        images = [estimate.image] if estimate.error is None else [estimate.image, estimate.error]
        return Padding.crop(torch.cat(images, dim=1), rows, columns)

    def samples(
        self, slices: Tensor, generators: Sequence[Sequence[torch.Generator]], guide: Tensor | None = None
    ) -> Tensor:
        """Return posterior samples of LR slices (N, 1, h, w), without tiles: (N, S, H, W).

        Args:
            slices: the slices.
            generators: sources of the noise of the S samples of each slice.
            guide: another contrast on the HR grid.
        """
        lr, operator, guides, *_ = self._prepared(slices, guide)
        draws = [[self.network.white_noise(operator, [1], source) for source in row] for row in generators]
        noise = torch.stack([torch.cat(row) for row in draws])  # (N, S, noise_channels, H', W')
        steps = self.steps if noise[0, 0, 0].numel() <= _MAX_RECORDED else self.steps.without_graphs

        def sample(*inputs: Tensor) -> Tensor:
            size = max(MAX_BAND // inputs[0][0, 0].numel(), 1)
            parts = zip(*(x.split(size) for x in inputs), strict=True)
            return torch.cat([steps.samples(*part)["sample"] for part in parts])

        return self.network.posterior_samples(
            lr,
            noise,
            operator,
            guides[0] if guides else None,
            sample,
            error_model=self.error_model,
            predict=partial(self._predict_parts, len(lr)),
        )

    def _prepared(
        self, slices: Tensor, guide: Tensor | None
    ) -> tuple[Tensor, SeparableOperator, list[Tensor], Padding, Padding]:
        """Return padded slices on the device, their operator, their guides if the network has some, and the padding."""
        rows, columns = (
            Padding.of(lr_size, scale, self.network.side)
            for lr_size, scale in zip(slices.shape[2:], self.degradation.scales, strict=True)
        )
        # before the inverse: replicating its ripples would make streaks
        lr = Padding.pad(slices.to(self.device), rows, columns)
        shape = (rows.padded_size, columns.padded_size)
        operator = operators((self.degradation,), shape, (lr.shape[2], lr.shape[3]), lr)
        guides = []
        if self.network.guide_channels:
            guide = lr.new_zeros(len(lr), 1, rows.size, columns.size) if guide is None else guide.to(lr)
            guides = [Padding.pad_hr(guide, rows, columns)]
        return lr, operator, guides, rows, columns

    def _predict_parts(self, batch_size: int, images: Tensor, condition: Tensor) -> Prediction:
        """Return the prediction for images (N, C, H, W) of any size, by tiles or in bands."""
        channels = images.shape[1]
        inputs = torch.cat([images, condition.expand(-1, -1, *images.shape[2:])], dim=1)  # parts keep their condition
        of_tiles = self.steps.of_tiles if self.network.side else self.steps.without_graphs.of_tiles

        def predict(parts: Tensor) -> dict[str, Tensor]:
            return of_tiles(parts[:, :channels], parts[:, channels:, :1, :1])

        if self.network.side is None:
            return Prediction(**in_bands(inputs, self.network.stride, predict))
        tiles = self.count_tiles(predict)
        return Prediction(**blend_tiles(inputs, self.network.side, self.overlap, batch_size, tiles))


def warn_of_linear_estimates(network_weights: Sequence[Tensor]) -> None:
    """Log a warning if the network has diverged, and one if noise has moved the results towards the linear estimate.

    Args:
        network_weights: weights of the network in the slices of one or more calls; 0 where it has diverged.
    """
    if not network_weights:
        return
    weights = torch.cat(list(network_weights))
    sound = weights[weights > 0]
    if len(sound) < len(weights):
        logger.warning(
            "the network diverged on %d of %d slices, which are unlike the training data: their result is the linear"
            " estimate, which adds no detail.",
            len(weights) - len(sound),
            len(weights),
        )
    weight = float(sound.mean()) if len(sound) else 1.0
    if weight < _MIN_NETWORK_WEIGHT:
        logger.warning(
            "the input is noisier than the training data, or sharper than the assumed blur allows: the networks"
            " contribute %d %% of the result, and the rest is the linear estimate, which adds no detail.",
            round(100 * weight),
        )
