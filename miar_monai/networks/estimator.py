"""The estimator: super-resolution by convolutions alone, for any grid and with another contrast as a guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.degradation import Degradation, SeparableOperator
from miar_monai.errors import ConfigurationError
from miar_monai.networks.autoencoder import zero_conv
from miar_monai.networks.base import SuperResolutionNetwork
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.linear import NoiseModel
from miar_monai.networks.lr_encoder import PlainBlock
from miar_monai.networks.results import Observation, Prediction

__all__ = ["UNBOUNDED", "BoundedBlock", "Estimator"]

UNBOUNDED = torch.finfo(torch.float32).max
"""Bound of activations that have none: a finite number, as weights are, which is infinite in lower precision."""

_CONDITIONS = 5  # channels of `Observation.resolution`


class Estimator(SuperResolutionNetwork):
    """A U-Net on the linear estimate, with the perceptual and the faithful estimate as output maps.

    With ``noise_channels`` it has a third map, a sample of the posterior distribution: the images that explain the LR
    slice, each as often as it is probable. White noise is a further input, and each noise gives another sample; without
    noise the other two maps are what they are in a network without a third. Weights of such a network load: its sample
    is the perceptual map, until it is trained by `miar_monai.training.posterior.PosteriorObjective`.

    One set of weights serves any factor, profile and blur of both axes, which are its condition, and works with or
    without a guide: another contrast of the same patient on the HR grid. It consists of convolutions without
    normalization, so that its result at a voxel depends on a neighborhood only and large slices need no tiles.

    Args:
        channels: width of each level, fine to coarse; each level is coarser by 2 than the previous one.
        blocks: residual blocks of each level, on both sides of the U; on the coarsest level once.
        patch_size: side of the pixel patches of the finest level.
        guide_channels: 1 for a network with a guide, otherwise 0.
        noise_channels: channels of the noise of a network that samples, otherwise 0.
        degradation, noise_model, front_end, back_end: see `SuperResolutionNetwork`.

    Raises:
        ConfigurationError: if ``channels`` and ``blocks`` have different lengths.

    Reference:
        Zhang et al., Plug-and-Play Image Restoration with Deep Denoiser Prior, 2021 (U-Net of plain residual blocks);
        Lim et al., Enhanced Deep Residual Networks for Single Image Super-Resolution, 2017; Alet et al., Skillful Joint
        Probabilistic Weather Forecasting from Marginals, 2025 (samples in one pass, by noise as an input).

    Example:
        >>> network = Estimator(channels=(8, 16), blocks=(1, 1), guide_channels=1).eval()
        >>> lr, guide = torch.rand(2, 1, 16, 8), torch.rand(2, 1, 64, 40)
        >>> operator = Degradation(scale=(4, 5), sigma=0, profile="gaussian").for_lr(lr)
        >>> network.super_resolve(lr, operator=operator, guide=guide).image.shape
        torch.Size([2, 1, 64, 40])
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256),
        blocks: Sequence[int] = (2, 3, 6),
        patch_size: int = 2,
        guide_channels: int = 0,
        noise_channels: int = 0,
        degradation: Degradation | None = None,
        noise_model: NoiseModel | None = None,
        front_end: Callable[[Tensor, SeparableOperator, Tensor], Tensor] | None = None,
        back_end: Callable[[Tensor, Observation], Tensor] | None = None,
    ) -> None:
        super().__init__(degradation, noise_model, front_end, back_end)
        if len(channels) != len(blocks):
            raise ConfigurationError(
                f"channels has {len(channels)} levels but blocks {len(blocks)}; give one number for each level."
            )
        self.guide_channels = guide_channels
        self.noise_channels = noise_channels
        self.patch_size = patch_size
        in_channels, maps, noise = 1 + guide_channels, 3 if noise_channels else 2, noise_channels * patch_size**2
        self.unet = UNet(in_channels * patch_size**2 + _CONDITIONS, maps * patch_size**2, channels, blocks, noise)

    @property
    def stride(self) -> int:
        """Voxels of the HR grid for each position of the coarsest features."""
        return self.patch_size * self.unet.stride

    @property
    def layers(self) -> tuple[nn.Module]:
        """The U-Net."""
        return (self.unet,)

    def condition(self, observed: Observation) -> Tensor:
        """Return the damping, and the factor and the effective factor of both axes: (B, 5, 1, 1)."""
        return observed.resolution

    def maps(self, images: Tensor, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the uncorrected maps: the perceptual, the faithful and, with ``noise_channels``, the sample.

        Args:
            images: see `predict`; H and W are multiples of ``stride``.
            condition: see `condition`.
            noise: see `sample`. Without it, or if it is 0, the perceptual and the faithful map are those of `predict`.

        Returns:
            (B, 2, H, W), or (B, 3, H, W).
        """
        patches = F.pixel_unshuffle(images, self.patch_size).to(self.dtype)  # (B, C · patch_size², H / patch_size, …)
        planes = condition.to(patches).expand(-1, -1, *patches.shape[2:])
        if noise is not None:
            noise = F.pixel_unshuffle(noise, self.patch_size).to(patches)  # (B, N · patch_size², H / patch_size, …)
        residuals = self.unet(torch.cat([patches, planes], dim=1), noise)  # (B, 2 or 3 · patch_size², …)
        return images[:, :1] + F.pixel_shuffle(residuals, self.patch_size).to(images.dtype)  # (B, 2 or 3, H, W)

    @torch.no_grad()
    def predict(
        self, images: Tensor, condition: Tensor, decoding: Decoding | None = None, with_entropy: bool = False
    ) -> Prediction:
        """Predict the output maps; ``decoding`` and ``with_entropy`` have no effect without tokens.

        Args:
            images: linear estimates and, as a second channel, the guides: (B, 1 + guide_channels, H, W), H and W
                multiples of ``stride``. Others are padded by replication.
            condition: see `condition`.
            decoding: ignored.
            with_entropy: ignored.
        """
        return Prediction(self._padded_maps(images, condition)[:, :2])

    @torch.no_grad()
    def sample(self, images: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return a sample of the posterior distribution of each image, uncorrected: (B, 1, H, W).

        Args:
            images: see `predict`.
            condition: see `condition`.
            noise: white Gaussian noise of variance 1, (B, noise_channels, H', W'), with H' and W' the sizes of the
                images rounded up to multiples of ``stride``; see `white_noise`.

        Raises:
            SettingError: if the network has no ``noise_channels``.
        """
        self.check_samples()
        return self._padded_maps(images, condition, noise)[:, 2:]

    def _padded_maps(self, images: Tensor, condition: Tensor, *noise: Tensor) -> Tensor:
        """Return the maps of images (B, C, H, W) of any size, padded by replication."""
        height, width = images.shape[2:]
        padding = [0, -width % self.stride, 0, -height % self.stride]
        padded = F.pad(images, padding, mode="replicate") if any(padding) else images
        return self.maps(padded, condition, *noise)[..., :height, :width]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load also the weights of a network without noise, whose sample is then the perceptual map."""
        first, last = prefix + "unet.conv_in.weight", prefix + "unet.conv_out."
        noise = self.noise_channels * self.patch_size**2
        if noise and first in state_dict and state_dict[first].shape[1] == self.unet.conv_in.in_channels - noise:
            state_dict[first] = F.pad(state_dict[first], (0, 0, 0, 0, 0, noise))
            for name in (last + "weight", last + "bias"):
                state_dict[name] = torch.cat([state_dict[name], state_dict[name][: self.patch_size**2]])
            for name, value in self.unet.noise_layers.named_parameters():
                state_dict[f"{prefix}unet.noise_layers.{name}"] = torch.zeros_like(value)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BoundedBlock(PlainBlock):
    """A plain residual block whose output stays within the range that it had in training.

    Without normalization, a pattern that training did not show can excite rarely used features, and each block
    amplifies them further: by a factor of a thousand on a slice of chest CT. ``bound`` is the limit of each channel,
    (C, 1, 1), from `miar_monai.training.record_bounds`; it is `UNBOUNDED` before, and in weights without it.
    """

    bound: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("bound", torch.full((channels, 1, 1), UNBOUNDED))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, C, H, W) to bounded features of the same shape."""
        y = super().forward(x)
        bound = self.bound.to(y.dtype)
        return torch.clamp(y, -bound, bound)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "bound", torch.full_like(self.bound, UNBOUNDED))
        super()._load_from_state_dict(state_dict, prefix, *args)


class UNet(nn.Module):
    """A U-Net of bounded residual blocks; skips are added.

    Noise is a part of the input and is added again at each coarser level, averaged to its positions and scaled to its
    variance, by a 1 × 1 convolution. All weights of the noise are initialized to zero.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; the last layer is initialized to zero.
        channels: width of each level, fine to coarse.
        blocks: residual blocks of each level on each side; on the coarsest level once.
        noise_channels: channels of the noise, or 0.

    Example:
        >>> UNet(3, 2, channels=(8, 16), blocks=(1, 2))(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        noise_channels: int = 0,
    ) -> None:
        super().__init__()

        def level(width: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(BoundedBlock(width) for _ in range(count)))

        self.stride = 2 ** (len(channels) - 1)
        self.noise_channels = noise_channels
        self.conv_in = nn.Conv2d(in_channels + noise_channels, channels[0], 3, padding=1)
        finer, coarser = channels[:-1], channels[1:]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(finer, coarser, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(finer, coarser, strict=True))
        self.encoder = nn.ModuleList(level(width, count) for width, count in zip(finer, blocks, strict=False))
        self.middle = level(channels[-1], blocks[-1])
        self.decoder = nn.ModuleList(level(width, count) for width, count in zip(finer, blocks, strict=False))
        self.conv_out = zero_conv(channels[0], out_channels)
        self.noise_layers = nn.ModuleList(
            nn.Conv2d(noise_channels, width, 1, bias=False) for width in (coarser if noise_channels else [])
        )
        with torch.no_grad():
            for weight in (self.conv_in.weight[:, in_channels:], *self.noise_layers.parameters()):
                weight.zero_()
        # the native layout of convolutions on a GPU, without which each one transposes its data twice
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, H, W) and noise (B, noise_channels, H, W) to (B, out_channels, H, W).

        H and W are multiples of ``stride``; without noise, it is 0.
        """
        if self.noise_channels:
            drawn = x.new_zeros(len(x), self.noise_channels, *x.shape[2:]) if noise is None else noise
            x = torch.cat([x, drawn], dim=1)  # (B, in_channels + noise_channels, H, W)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for level, (blocks, down) in enumerate(zip(self.encoder, self.down, strict=True)):
            skips.append(blocks(x))
            x = down(skips[-1])  # (B, channels[i + 1], H / 2^(i + 1), W / 2^(i + 1))
            if noise is not None:
                noise = 2 * F.avg_pool2d(noise, 2)  # of four values, whose mean has a quarter of their variance
                x = x + self.noise_layers[level](noise)
        x = self.middle(x)
        for blocks, up in reversed([*zip(self.decoder, self.up, strict=True)]):
            x = blocks(up(x) + skips.pop())  # (B, channels[i], H / 2^i, W / 2^i)
        return self.conv_out(x + skips.pop())
