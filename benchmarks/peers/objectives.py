"""Objectives of the peers, for `miar_monai.training.MIARTrainer`, the trainer of MIAR's second stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import DiffusionInferer
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn

from benchmarks.peers.diffmsr import DiffMSR
from benchmarks.peers.disc_diff import DisCDiff
from benchmarks.peers.networks import LatentDiffusion
from miar_monai.errors import ConfigurationError

__all__ = [
    "AutoencoderObjective",
    "DiffusionObjective",
    "DisCObjective",
    "GuidedObjective",
    "PriorObjective",
    "RegressionObjective",
]

_CHARBONNIER = 1e-6
"""Square of the smallest error of DisC-Diff's loss."""


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


class GuidedObjective(RegressionObjective):
    """The loss between the images of a network with a guide and the true images."""

    def forward(self, lr: Tensor, hr: Tensor, guide: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the loss for LR images (B, 1, h, w), HR images (B, 1, H, W) and their guides (B, 1, H, W)."""
        return {"loss": self.loss(self.network(lr, guide).float(), hr)}


class PriorObjective(nn.Module):
    """The losses of DiffMSR: of the image and, in the second stage, of the prior.

    Args:
        network: the network to train.
        stage: 1, where the prior is that of the truth, or 2, where it comes from all steps of the diffusion.
    """

    def __init__(self, network: DiffMSR, stage: int) -> None:
        super().__init__()
        self.network = network
        self.stage = stage

    def forward(self, lr: Tensor, hr: Tensor, guide: Tensor) -> dict[str, Tensor]:
        """Return the losses for LR images (B, 1, h, w), HR images (B, 1, H, W) and their guides (B, 1, H, W)."""
        network = self.network
        if self.stage == 1:
            return {"loss": F.l1_loss(network.restore(lr, guide, network.prior_of(lr, hr)).float(), hr)}
        with torch.no_grad():
            true_prior = network.prior_of(lr, hr).float()
        prior = network.denoiser(network.denoiser.noisy(true_prior), network.condition(lr))
        parts = {
            "image_loss": F.l1_loss(network.restore(lr, guide, prior).float(), hr),
            "prior_loss": F.l1_loss(prior.float(), true_prior),
        }
        return parts | {"loss": parts["image_loss"] + parts["prior_loss"]}


class DisCObjective(nn.Module):
    """The Charbonnier error of the image that DisC-Diff finds in noise, and its loss of disentanglement.

    Args:
        network: the network whose U-Net is trained.
    """

    def __init__(self, network: DisCDiff) -> None:
        super().__init__()
        self.network = network

    def forward(self, lr: Tensor, hr: Tensor, guide: Tensor) -> dict[str, Tensor]:
        """Return the losses for LR images (B, 1, h, w), HR images (B, 1, H, W) and their guides (B, 1, H, W)."""
        network, schedule = self.network, self.network.noise_schedule
        image, noise = network.scaled(hr), torch.randn_like(hr)
        timesteps = torch.randint(schedule.num_train_timesteps, (len(hr),), device=hr.device)
        noisy = schedule.add_noise(image, noise, timesteps)
        found, ratio = network.unet(noisy, timesteps, network.scaled(network.upsample(lr)), network.scaled(guide))
        parts = {
            "image_loss": ((found.float() - image) ** 2 + _CHARBONNIER).sqrt().mean(),
            "disentanglement_loss": ratio,
        }
        return parts | {"loss": parts["image_loss"] + parts["disentanglement_loss"]}


class AutoencoderObjective(nn.Module):
    """The loss of the reconstructions of an autoencoder, and the divergence of its latents from the standard normal.

    Args:
        network: the autoencoder.
        reconstruction: scalar loss of two batches of images.
        kl_weight: weight of the divergence, LDM's by default.
    """

    def __init__(self, network: AutoencoderKL, reconstruction: nn.Module, kl_weight: float = 1e-6) -> None:
        super().__init__()
        self.network = network
        self.reconstruction = reconstruction
        self.kl_weight = kl_weight

    def forward(self, hr: Tensor) -> dict[str, Tensor]:
        """Return the losses for HR images (B, 1, H, W)."""
        images, mean, sigma = (x.float() for x in self.network(hr))
        divergence = 0.5 * (mean**2 + sigma**2 - 1 - 2 * sigma.log()).sum(dim=(1, 2, 3)).mean()
        parts = {"reconstruction_loss": self.reconstruction(images, hr), "divergence": divergence}
        return parts | {"loss": parts["reconstruction_loss"] + self.kl_weight * divergence}


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
            condition=lr,
            mode="concat",
        )
        return {"loss": F.mse_loss(velocity.float(), schedule.get_velocity(latents, noise, timesteps))}
