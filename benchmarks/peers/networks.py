"""The trained peers. Those of the comparison table map LR slices (B, 1, h, w) to SR slices (B, 1, 4h, 4w).

    python -m benchmarks.peers.networks [--bundle bundles/miar_brats]

prints their parameters and operations, for the sizes in the overlays of this folder. They need the extra bench.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import LatentDiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from benchmarks.peers.loading import THROUGH_PLANE, TITLES, peer_network
from miar_monai.evaluation import markdown_table
from miar_monai.networks import MSVQVAE

__all__ = ["Denoiser", "LatentDiffusion", "costs", "rcan", "rcan_through_plane", "swinir"]

NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "schedule": "scaled_linear_beta",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "prediction_type": "v_prediction",
    "clip_sample": False,  # latents are unbounded
}


def swinir(embed_dim: int = 180, depths: Sequence[int] = (6,) * 6, num_heads: Sequence[int] = (6,) * 6) -> nn.Module:
    """Return SwinIR for one channel and a scale of 4, SwinIR-M by default; the implementation is spandrel's.

    Args:
        embed_dim: channels of the transformer.
        depths: Swin blocks of each residual group.
        num_heads: attention heads of each residual group.

    Reference:
        Liang et al., SwinIR: Image Restoration Using Swin Transformer, 2021 ("classical image SR, middle size").
    """
    from spandrel.architectures.SwinIR import SwinIR

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid")  # spandrel uses a deprecated call
        return SwinIR(
            img_size=64,  # of the LR slices; attention masks of this size are cached
            in_chans=1,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=8,
            mlp_ratio=2,
            upscale=4,
            upsampler="pixelshuffle",
        )


def rcan(num_groups: int = 5, num_blocks: int = 10, channels: int = 64, scale: int = 4) -> nn.Module:
    """Return RCAN for one channel, a quarter as deep as the paper's; the implementation is spandrel's.

    Args:
        num_groups: residual groups.
        num_blocks: blocks of a convolution, a second one and channel attention in each group.
        channels: width.
        scale: of both axes, a power of 2 or 3.

    Reference:
        Zhang et al., Image Super-Resolution Using Very Deep Residual Channel Attention Networks, 2018.
    """
    from spandrel.architectures.RCAN import RCAN

    # norm would subtract the mean of three-channel photographs
    return RCAN(scale=scale, n_resgroups=num_groups, n_resblocks=num_blocks, n_feats=channels, n_colors=1, norm=False)


def rcan_through_plane(factor: int = 5, num_groups: int = 5, num_blocks: int = 10, channels: int = 64) -> nn.Module:
    """Return `rcan` with a pixel shuffle along the columns only: (B, 1, h, w) to (B, 1, h, factor · w).

    Args:
        factor: spacing of the slices in HR voxels.
        num_groups: as for `rcan`.
        num_blocks: as for `rcan`.
        channels: as for `rcan`.
    """
    from einops.layers.torch import Rearrange

    network: Any = rcan(num_groups=num_groups, num_blocks=num_blocks, channels=channels, scale=1)  # without upsampling
    network.tail[0] = nn.Sequential(
        nn.Conv2d(channels, channels * factor, kernel_size=3, padding=1),
        Rearrange("b (c factor) h w -> b c h (w factor)", factor=factor),
    )
    network.scale = factor  # the result is cropped to scale · h rows, of which there are h, and scale · w columns
    return network


class Denoiser(nn.Module):
    """The trained part of a latent diffusion model: MONAI's `DiffusionModelUNet`, and the scales of the latents.

    Attention is on all levels but the first.

    Args:
        latent_channels: C, channels of the latents.
        condition_channels: channels of the condition, which is concatenated to the noisy latents.
        channels: width of each level, fine to coarse, multiples of 32.
        num_res_blocks: residual blocks on each level.
        head_channels: channels of an attention head.
    """

    scale_factor: Tensor

    def __init__(
        self,
        latent_channels: int = 32,
        condition_channels: int = 4,
        channels: Sequence[int] = (128, 192, 256),
        num_res_blocks: int = 2,
        head_channels: int = 64,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
            channels=channels,
            num_res_blocks=num_res_blocks,
            attention_levels=[level > 0 for level in range(len(channels))],
            num_head_channels=head_channels,
            use_flash_attention=True,
        )
        self.register_buffer("scale_factor", torch.full((latent_channels, 1, 1), float("nan")))  # until it is measured

    def forward(self, x: Tensor, timesteps: Tensor, context: None = None) -> Tensor:
        """Predict the velocity (B, C, G, G) in noisy latents with their condition (B, C + condition_channels, G, G)."""
        return self.unet(x, timesteps, context)


class LatentDiffusion(nn.Module):
    """LDM-SR: diffusion in the continuous latents of MIAR's tokenizer, given the LR slice; the tokenizer is frozen.

    The scales of the latents must be set first, by `measure_scale` or by loading weights.

    Args:
        tokenizer: trained tokenizer with images of twice its latents' side in LR pixels (f = 8); its quantizer is not
            used.
        denoiser: the denoiser, the only part that is trained and saved.
        sampling_steps: number of DDIM steps of `forward`.
        seed: seed of the initial noise of `forward`, the same for all slices.

    Reference:
        Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, Sec. 4.4 (LR image
        concatenated); Salimans & Ho, Progressive Distillation, 2022 (velocity); Song et al., DDIM, 2021.
    """

    def __init__(self, tokenizer: MSVQVAE, denoiser: Denoiser, sampling_steps: int = 100, seed: int = 0) -> None:
        super().__init__()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.denoiser = denoiser
        self.sampling_steps = sampling_steps
        self.seed = seed
        self.noise_schedule = DDPMScheduler(**NOISE)

    @torch.no_grad()
    def measure_scale(self, hr: Tensor) -> None:
        """Set the scales so that each channel of the latents has unit variance over HR images (B, 1, H, W).

        With one scale for all channels, as in LDM, noise would dominate the high-frequency channels of cosine latents.
        """
        spread = self.tokenizer.encoder(hr).float().std(dim=(0, 2, 3), unbiased=False)[:, None, None]  # (C, 1, 1)
        self.denoiser.scale_factor.copy_(1 / spread)

    @torch.no_grad()
    def encode(self, hr: Tensor) -> Tensor:
        """Return the scaled latents (B, C, H / 8, W / 8) of HR images (B, 1, H, W), float32 under autocast too."""
        # float32, since MONAI's schedulers cast their tables to the dtype of their input
        return self.tokenizer.encoder(hr).float() * self.denoiser.scale_factor

    def decode_stage_2_outputs(self, latents: Tensor) -> Tensor:
        """Return the images of unscaled latents; MONAI's inferer requires this name of an autoencoder."""
        return self.tokenizer.decoder(latents)

    def condition(self, lr: Tensor) -> Tensor:
        """Rearrange LR images (B, 1, h, w) on the latent grid: (B, 4, h / 2, w / 2)."""
        return F.pixel_unshuffle(lr, 2)

    @torch.no_grad()
    def forward(self, lr: Tensor) -> Tensor:
        """Sample SR images (B, 1, 4h, 4w) for LR images (B, 1, h, w).

        A slice gets the same result in each call and in any batch.
        """
        condition = self.condition(lr)
        # on the CPU, since random numbers differ between kinds of devices
        noise = torch.randn(
            1, self.denoiser.latent_channels, *condition.shape[2:], generator=torch.Generator().manual_seed(self.seed)
        )
        scheduler = DDIMScheduler(**NOISE)
        scheduler.set_timesteps(self.sampling_steps)
        scale_factor: Any = self.denoiser.scale_factor  # a tensor, which MONAI annotates as a number
        inferer: Any = LatentDiffusionInferer(scheduler, scale_factor)  # annotated for MONAI's own networks
        return inferer.sample(
            input_noise=noise.to(lr).expand(len(lr), -1, -1, -1),
            autoencoder_model=self,
            diffusion_model=self.denoiser,
            conditioning=condition,
            mode="concat",
            verbose=False,
        )


def costs(bundle: str = "bundles/miar_brats") -> str:
    """Return a Markdown table of parameters and operations of the peers as the overlays train them.

    The operations are those for one LR slice of 64 × 64.

    Args:
        bundle: folder of the bundle whose tokenizer the latent diffusion model uses.
    """
    from torch.utils.flop_counter import FlopCounterMode

    rows = []
    for peer in (*TITLES, THROUGH_PLANE):
        network = peer_network(bundle, peer).to("meta")  # shapes only, without computation
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 1, 64, 64, device="meta"))
        rows.append((peer, f"{trained / 1e6:.1f}", f"{counter.get_total_flops() / 1e9:.0f}"))
    return markdown_table(("peer", "parameters (M)", "GFLOP per slice"), rows)


if __name__ == "__main__":
    import fire

    fire.Fire(costs)
