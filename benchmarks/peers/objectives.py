"""Objectives of the peers, for `miar_monai.training.MIARTrainer`, the trainer of MIAR's second stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import DiffusionInferer
from torch import Tensor, nn

from benchmarks.peers.networks import LatentDiffusion
from miar_monai.errors import ConfigurationError

__all__ = ["DiffusionObjective", "RegressionObjective"]


class RegressionObjective(nn.Module):
    """The loss between the images of a network and the true images.

    Args:
        network: maps LR images (B, 1, h, w) to (B, 1, H, W).
        loss: scalar loss of two batches of images.
    """

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def prepare(self) -> None:
        """Called by the trainer at the start; does nothing."""

    def forward(self, lr: Tensor, hr: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss for LR images (B, 1, h, w) and HR images (B, 1, H, W); ``index`` is ignored."""
        return {"loss": self.loss(self.network(lr).float(), hr)}


class DiffusionObjective(nn.Module):
    """The mean squared error of the velocity predicted by the denoiser, at a random time for each image.

    Args:
        network: the network whose denoiser is trained.

    Reference:
        Salimans & Ho, Progressive Distillation, 2022, appendix D.
    """

    def __init__(self, network: LatentDiffusion) -> None:
        super().__init__()
        self.network = network

    def prepare(self) -> None:
        """Called by the trainer at the start; checks that the scale of the latents was measured.

        Raises:
            ConfigurationError: if it was not.
        """
        if not torch.isfinite(self.network.denoiser.scale_factor).all():
            raise ConfigurationError(
                "the scale of the latents was not measured, but the denoiser needs latents of unit variance; call"
                " network.measure_scale(images) before training."
            )

    def forward(self, lr: Tensor, hr: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss for LR images (B, 1, h, w) and HR images (B, 1, H, W); ``index`` is ignored."""
        schedule = self.network.noise_schedule
        latents = self.network.encode(hr)  # (B, C, G, G)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(schedule.num_train_timesteps, (len(hr),), device=hr.device)
        inferer: Any = DiffusionInferer(schedule)  # annotated for MONAI's own networks
        velocity = inferer(
            inputs=latents,
            diffusion_model=self.network.denoiser,
            noise=noise,
            timesteps=timesteps,
            condition=self.network.condition(lr),
            mode="concat",
        )
        return {"loss": F.mse_loss(velocity.float(), schedule.get_velocity(latents, noise, timesteps))}
