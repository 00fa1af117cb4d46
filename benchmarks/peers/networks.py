"""The trained peers. Those of the comparison table map LR slices (B, 1, h, w) to SR slices (B, 1, 4h, 4w).

    python -m benchmarks.peers.networks [--bundle bundles/miar_brats]

prints their parameters and operations, for the sizes in the overlays of this folder. They need the extra bench.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers import LatentDiffusionInferer
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from benchmarks.peers.loading import GUIDED, THROUGH_PLANE, TITLES, peer_network
from benchmarks.peers.noise import equal_noise
from miar_monai.evaluation import markdown_table

__all__ = ["Denoiser", "LatentDiffusion", "Reconstruction", "costs", "rcan", "rcan_through_plane", "swinir", "vae"]

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


def vae(channels: Sequence[int] = (64, 128, 256), latent_channels: int = 12, num_res_blocks: int = 2) -> AutoencoderKL:
    """Return the autoencoder of the latent diffusion model: MONAI's, for one channel, convolutions only.

    With three levels f = 4, as for the super-resolution of the paper, so that the latents have the grid of the LR
    slice. Twelve channels are as many numbers as the latents of MIAR's tokenizer, which has 48 on a grid of f = 8.

    Args:
        channels: width of each level, fine to coarse, multiples of 32.
        latent_channels: C, channels of the latents.
        num_res_blocks: residual blocks on each level.

    Example:
        >>> vae()(torch.rand(1, 1, 32, 16))[1].shape  # the means of the latents
        torch.Size([1, 12, 8, 4])
    """
    return AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=channels,
        num_res_blocks=num_res_blocks,
        attention_levels=[False] * len(channels),
        latent_channels=latent_channels,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )


class Reconstruction(nn.Module):
    """An autoencoder as a map of images to their reconstructions, without noise in the latents.

    Args:
        vae: the autoencoder.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        """Return reconstructed images (B, 1, H, W)."""
        return self.vae.decode(self.vae.encode(images)[0])


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
        latent_channels: int = 12,
        condition_channels: int = 1,
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
    """LDM-SR: diffusion in the latents of an autoencoder of its own, given the LR slice; the autoencoder is frozen.

    The scales of the latents must be set first, by `measure_scale` or by loading weights.

    Args:
        vae: trained autoencoder whose latents are on the grid of the LR slices (f = 4), see `vae`. It bounds the
            quality of the samples.
        denoiser: the denoiser, the only part that is trained and saved.
        sampling_steps: number of DDIM steps of `forward`.
        seed: seed of the initial noise of `forward`, the same for all slices.

    Reference:
        Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, Sec. 4.4 (LR image
        concatenated); Salimans & Ho, Progressive Distillation, 2022 (velocity); Song et al., DDIM, 2021.
    """

    def __init__(self, vae: AutoencoderKL, denoiser: Denoiser, sampling_steps: int = 100, seed: int = 0) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.denoiser = denoiser
        self.sampling_steps = sampling_steps
        self.seed = seed
        self.noise_schedule = DDPMScheduler(**NOISE)

    @torch.no_grad()
    def measure_scale(self, hr: Tensor) -> None:
        """Set the scales so that each channel of the latents has unit variance over HR images (B, 1, H, W).

        With one scale for all channels, as in LDM, noise would dominate those with little variance.
        """
        spread = self.vae.encode(hr)[0].float().std(dim=(0, 2, 3), unbiased=False)[:, None, None]  # (C, 1, 1)
        self.denoiser.scale_factor.copy_(1 / spread)

    @torch.no_grad()
    def encode(self, hr: Tensor) -> Tensor:
        """Return the scaled latents (B, C, H / 4, W / 4) of HR images (B, 1, H, W), float32 under autocast too."""
        # float32, since MONAI's schedulers cast their tables to the dtype of their input
        return self.vae.encode(hr)[0].float() * self.denoiser.scale_factor

    @torch.no_grad()
    def forward(self, lr: Tensor) -> Tensor:
        """Sample SR images (B, 1, 4h, 4w) for LR images (B, 1, h, w).

        A slice gets the same result in each call and in any batch.
        """
        noise = equal_noise(lr, (self.denoiser.latent_channels, *lr.shape[2:]), self.seed)
        scheduler = DDIMScheduler(**NOISE)
        scheduler.set_timesteps(self.sampling_steps)
        scale_factor: Any = self.denoiser.scale_factor  # a tensor, which MONAI annotates as a number
        inferer: Any = LatentDiffusionInferer(scheduler, scale_factor)  # annotated for MONAI's own networks
        return inferer.sample(
            input_noise=noise,
            autoencoder_model=self.vae,
            diffusion_model=self.denoiser,
            conditioning=lr,
            mode="concat",
            verbose=False,
        )


def costs(bundle: str = "bundles/miar_brats") -> str:
    """Return a Markdown table of parameters and operations of the peers as the overlays train them.

    The operations are those for one LR slice of 64 × 64.

    Args:
        bundle: folder of the bundle whose training the overlays change.
    """
    from torch.utils.flop_counter import FlopCounterMode

    rows = []
    for peer in (*TITLES, *GUIDED, THROUGH_PLANE):
        # shapes only, without computation; degradations, which MMHCA applies to its guide, compute on real devices only
        device = "cpu" if peer == "mmhca" else "meta"
        network = peer_network(bundle, peer).to(device)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            guide = [torch.empty(1, 1, 256, 256, device=device)] if peer in GUIDED else []
            network(torch.empty(1, 1, 64, 64, device=device), *guide)
        rows.append((peer, f"{trained / 1e6:.1f}", f"{counter.get_total_flops() / 1e9:.0f}"))
    return markdown_table(("peer", "parameters (M)", "GFLOP per slice"), rows)


if __name__ == "__main__":
    import fire

    fire.Fire(costs)
