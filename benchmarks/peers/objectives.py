"""What the peers minimize, for `miar_monai.training.MIARTrainer`, which trains MIAR's second stage."""

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
    """The loss between what a network makes of LR images and the truth.

    Args:
        network: maps LR images (B, 1, h, w) to (B, 1, H, W).
        loss: compares two batches of images: scalar.
    """

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def prepare(self) -> None:
        """Do nothing: there is nothing to prepare; the trainer calls this."""

    def forward(self, lr: Tensor, hr: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss of LR images (B, 1, h, w) and their truth (B, 1, H, W); how they came about is not told."""
        return {"loss": self.loss(self.network(lr).float(), hr)}


class DiffusionObjective(nn.Module):
    """The mean squared error of the velocity that the denoiser sees in noisy latents, at a random time for each image.

    Args:
        network: its denoiser is trained.

    Reference:
        Salimans & Ho, Progressive Distillation, 2022, appendix D.
    """

    def __init__(self, network: LatentDiffusion) -> None:
        super().__init__()
        self.network = network

    def prepare(self) -> None:
        """Check that the scale of the latents is known; the trainer calls this.

        Raises:
            ConfigurationError: if it is not.
        """
        if not torch.isfinite(self.network.denoiser.scale_factor).all():
            raise ConfigurationError(
                "the scale of the latents is not known, but the denoiser needs latents of unit variance; call"
                " network.measure_scale(images) before training."
            )

    def forward(self, lr: Tensor, hr: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss of LR images (B, 1, h, w) and their truth (B, 1, H, W); how they came about is not told."""
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
