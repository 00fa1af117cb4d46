"""Steps of super-resolution that run on a GPU without synchronizing with the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.degradation import SeparableOperator
from miar_monai.inference.error_model import ErrorModel
from miar_monai.networks import SuperResolutionNetwork
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.results import Estimate, Prediction

__all__ = ["StepSettings", "Steps"]


class StepSettings(NamedTuple):
    """Settings that are fixed in a CUDA graph of the steps."""

    decoding: Decoding
    fidelity: float
    error_model: ErrorModel | None

    def super_resolve(
        self,
        network: SuperResolutionNetwork,
        lr: Tensor,
        operator: SeparableOperator,
        predict: Callable[[Tensor, Tensor], Prediction],
        guide: Tensor | None = None,
    ) -> Estimate:
        """Call `SuperResolutionNetwork.super_resolve` with these settings."""
        return network.super_resolve(
            lr, fidelity=self.fidelity, operator=operator, error_model=self.error_model, predict=predict, guide=guide
        )


class Steps(NamedTuple):
    """Functions from tensors to named tensors, so that each can be a CUDA graph."""

    of_slices: Callable[..., dict[str, Tensor]]
    """LR slices (N, 1, h, w), the tensors of their operator and, for a network with a guide, guides (N, 1, H, W): the
    fields of an `Estimate`. Slices of a network with tiles are of one tile."""
    of_tiles: Callable[..., dict[str, Tensor]]
    """Images (N, 1 + guide_channels, H, W) and conditions (N, C, 1, 1) of tiles: maps and entropy of a `Prediction`."""
    samples: Callable[..., dict[str, Tensor]]
    """Images, conditions and noise (N, noise_channels, H', W') of slices: ``"sample"``, (N, 1, H, W), uncorrected."""

    @classmethod
    def of(cls, network: SuperResolutionNetwork, settings: StepSettings, precision: torch.dtype | None) -> Steps:
        """Return the steps of a network, without CUDA graphs.

        Args:
            network: the network.
            settings: settings of decoding and mixing.
            precision: precision of the layers; None for that of the weights.
        """
        layers = network if precision is None else network.cast(precision)
        decoding = settings.decoding
        batches = count(decoding.seed)  # a different seed for each batch of tiles

        def current() -> SuperResolutionNetwork:
            if layers is not network:
                layers.cast_from(network)  # training may have changed its weights in place
            return layers

        def predict(images: Tensor, condition: Tensor) -> Prediction:
            seeded = replace(decoding, seed=next(batches)) if decoding.is_stochastic else decoding
            with torch.autocast(images.device.type, enabled=False):
                return current().predict(images, condition, seeded, with_entropy=settings.error_model is not None)

        def of_slices(lr: Tensor, *tensors: Tensor) -> dict[str, Tensor]:
            guide = tensors[-1] if network.guide_channels else None
            operator = SeparableOperator.from_tensors(tensors[:-1] if network.guide_channels else tensors)
            return _fields(settings.super_resolve(network, lr, operator, predict, guide))

        def of_tiles(images: Tensor, condition: Tensor) -> dict[str, Tensor]:
            return _fields(predict(images, condition)._replace(tokens=None, score=None))

        def samples(images: Tensor, condition: Tensor, noise: Tensor) -> dict[str, Tensor]:
            with torch.autocast(images.device.type, enabled=False):
                return {"sample": current().sample(images, condition, noise)}

        return cls(of_slices, of_tiles, samples)

    def as_graphs(self) -> Steps:
        """Return the steps as CUDA graphs, recorded once per set of shapes."""
        return Steps(*(CUDAGraphed(step) for step in self))

    @property
    def without_graphs(self) -> Steps:
        """The steps without CUDA graphs."""
        return Steps(*(step.function if isinstance(step, CUDAGraphed) else step for step in self))

    def clear(self) -> None:
        """Delete all recordings and free their memory."""
        for step in self:
            if isinstance(step, CUDAGraphed):
                step.clear()


def _fields(result: Prediction | Estimate) -> dict[str, Tensor]:
    """Return the fields of a result that are not None, by name."""
    return {name: value for name, value in result._asdict().items() if value is not None}
