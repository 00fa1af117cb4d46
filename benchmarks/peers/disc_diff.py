"""DisC-Diff: conditional diffusion of an image, given its LR slice and another contrast."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import ChannelSELayer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from benchmarks.peers.noise import equal_noise

__all__ = ["DisCDiff", "DisCUNet"]

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "schedule": "linear_beta",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "sample",
    "clip_sample": False,
}
STREAMS = 3
"""Noisy image, LR image and guide."""


class _Disentangle(nn.Module):
    """Split the deepest features of the streams into common and distinct parts, and fuse these.

    Args:
        channels: of the features, even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.common, self.distinct = (
            nn.Sequential(nn.Conv2d(channels, half, 3, padding=1), nn.SiLU()) for _ in range(2)
        )
        self.squeeze = nn.ModuleList(ChannelSELayer(2, half, r=8) for _ in range(1 + STREAMS))
        self.fuse = nn.Sequential(nn.Conv2d(half * (1 + STREAMS), channels, 1), nn.SiLU())

    def forward(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return fused features (B, C, h, w), and how much the common parts differ, relative to the distinct ones."""
        commons, distincts = ([part(x) for x in streams] for part in (self.common, self.distinct))
        parts = [torch.stack(commons).mean(dim=0), *distincts]
        fused = self.fuse(torch.cat([squeeze(x) for squeeze, x in zip(self.squeeze, parts, strict=True)], dim=1))
        return fused, _differences(commons) / _differences(distincts).clamp(min=1e-3)


def _differences(features: Sequence[Tensor]) -> Tensor:
    """Return the sum of the mean squared differences between all pairs, a number."""
    pairs = [(i, j) for i in range(len(features)) for j in range(i)]
    return torch.stack([F.mse_loss(features[i].float(), features[j].float()) for i, j in pairs]).sum()


class DisCUNet(nn.Module):
    """The U-Net of DisC-Diff: an encoder for each stream, one decoder; skips are means over the streams.

    The blocks are MONAI's. The encoders of LR image and guide are copies of the first at the initialization.

    Args:
        channels: width of each level, fine to coarse, multiples of 32.
        num_res_blocks: residual blocks on each level.
        num_attention_levels: attention is on that many coarsest levels; the paper's are those of 1/8, 1/16 and 1/32.
        head_channels: channels of an attention head.
    """

    def __init__(
        self,
        channels: Sequence[int] = (96, 96, 192, 192, 288, 288),
        num_res_blocks: int = 2,
        num_attention_levels: int = 3,
        head_channels: int = 48,
    ) -> None:
        super().__init__()
        levels = len(channels)
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=channels,
            num_res_blocks=num_res_blocks,
            attention_levels=[level >= levels - num_attention_levels for level in range(levels)],
            num_head_channels=head_channels,
            resblock_updown=True,
            use_flash_attention=True,
        )
        first = nn.ModuleList([self.unet.conv_in, self.unet.down_blocks])
        self.others = nn.ModuleList(deepcopy(first) for _ in range(STREAMS - 1))
        self.disentangle = _Disentangle(channels[-1])
        self.multiple = 2 ** (levels - 1)

    def forward(self, x: Tensor, timesteps: Tensor, lr: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the image in noisy images.

        Args:
            x: noisy images, (B, 1, H, W), H and W multiples of ``multiple``.
            timesteps: (B,).
            lr: LR images on the same grid.
            guide: the other contrast on the same grid.

        Returns:
            Images (B, 1, H, W), and the ratio of `_Disentangle`.
        """
        unet = self.unet
        emb = unet.time_embed(get_timestep_embedding(timesteps, unet.block_out_channels[0]).to(x))
        encoders = [(unet.conv_in, unet.down_blocks), *self.others]
        deepest, skips = [], []
        for (conv_in, down_blocks), image in zip(encoders, (x, lr, guide), strict=True):
            h = conv_in(image)
            found = [h]
            for block in down_blocks:
                h, residuals = block(hidden_states=h, temb=emb, context=None)
                found += residuals
            deepest.append(h)
            skips.append(found)
        means = [torch.stack(level).mean(dim=0) for level in zip(*skips, strict=True)]
        h, ratio = self.disentangle(deepest)
        h = unet.middle_block(hidden_states=h, temb=emb, context=None)
        for block in unet.up_blocks:
            count = len(block.resnets)
            h = block(hidden_states=h, res_hidden_states_list=means[-count:], temb=emb, context=None)
            means = means[:-count]
        return unet.out(h), ratio


class DisCDiff(nn.Module):
    """DisC-Diff, written from the paper and trainable in minutes, with differences that are all to its advantage there.

    It predicts the image instead of the noise, which converges sooner; the variance is fixed, not learned; there is no
    curriculum by entropy; steps are DDIM's, so that a slice gives the same result in each call. The paper leaves open
    how the LR slice comes to the HR grid; here by bicubic interpolation.

    Args:
        unet: the trained network.
        sampling_steps: as in the paper.
        seed: of the initial noise, the same for all slices.

    Reference:
        Mao et al., DisC-Diff: Disentangled Conditional Diffusion Model for Multi-Contrast MRI Super-Resolution, MICCAI
        2023.
    """

    def __init__(self, unet: DisCUNet | None = None, sampling_steps: int = 20, seed: int = 0) -> None:
        super().__init__()
        self.unet = unet or DisCUNet()
        self.sampling_steps = sampling_steps
        self.seed = seed
        self.noise_schedule = DDPMScheduler(**SCHEDULE)

    @staticmethod
    def scaled(images: Tensor) -> Tensor:
        """Return images in about [0, 1] in about [-1, 1], where diffusion takes place."""
        return 2 * images - 1

    def upsample(self, lr: Tensor) -> Tensor:
        """Return LR slices (B, 1, h, w) on the HR grid, (B, 1, 4h, 4w)."""
        return F.interpolate(lr, scale_factor=4, mode="bicubic")

    @torch.no_grad()
    def forward(self, lr: Tensor, guide: Tensor) -> Tensor:
        """Sample SR slices (B, 1, 4h, 4w) for LR slices (B, 1, h, w) and guides (B, 1, 4h, 4w)."""
        height, width = guide.shape[-2:]
        margins = (0, -width % self.unet.multiple, 0, -height % self.unet.multiple)
        images = (self.scaled(F.pad(image, margins, mode="replicate")) for image in (self.upsample(lr), guide))
        condition = tuple(images)
        x = equal_noise(lr, condition[0].shape[1:], self.seed)
        scheduler = DDIMScheduler(**SCHEDULE)
        scheduler.set_timesteps(self.sampling_steps)
        for t in scheduler.timesteps.tolist():
            image, _ = self.unet(x, torch.full((len(lr),), t, device=lr.device), *condition)
            x, _ = scheduler.step(image.float(), t, x)
        return (x[..., :height, :width] + 1) / 2
