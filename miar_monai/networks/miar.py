"""MIAR: everything inference needs in one module."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.degradation.operators import Degradation, SeparableDegradation
from miar_monai.errors import ConfigurationError
from miar_monai.networks.autoencoder import Decoder, Encoder
from miar_monai.networks.decoding import Decoded, Decoding, decode_tokens
from miar_monai.networks.lr_encoder import LightLREncoder, TokenizerLREncoder, level_of_lr
from miar_monai.networks.msvqvae import MSVQVAE
from miar_monai.networks.quantizer import MultiScaleQuantizer
from miar_monai.networks.schedule import ScaleSchedule
from miar_monai.networks.transformer import MIARTransformer

__all__ = ["MIAR", "LRFeatures", "MIARResult", "Observation"]


class Observation(NamedTuple):
    """LR slices of any size, and what follows from them in closed form."""

    lr: Tensor
    """(B, 1, h, w)."""
    degradation: SeparableDegradation
    """How they came about."""
    damping: Tensor
    """Of the inverse of that: (B, 1, 1, 1)."""
    trust: Tensor
    """Share of what was learned in the result, in [0, 1]: (B, 1, 1, 1)."""
    linear: Tensor
    """Linear estimate of the HR images: (B, 1, H, W)."""

    @property
    def condition(self) -> Tensor:
        """What the networks hear of damping and blur, both about 0: (B, 2, 1, 1)."""
        sigma = torch.zeros_like(self.damping) + self.degradation.lr_sigma
        return torch.cat([self.damping.log10() + 2, sigma - 1], dim=1)


class LRFeatures(NamedTuple):
    """What the networks see of LR images."""

    linear: Tensor
    """Linear estimate of the HR images: (B, 1, H, W)."""
    f_lr: Tensor
    """On the latent grid, for cross-attention: (B, context_channels, G, G)."""
    skip: Tensor
    """On the grid of the LR images, for the decoder: (B, skip_channels, h, w)."""


class MIARResult(NamedTuple):
    """Everything that decoding found out."""

    sr: Tensor
    """(B, 1, 4h, 4w)."""
    tokens: Tensor
    """(B, L · S), int64."""
    score: Tensor
    """Log-probability of the tokens: (B,)."""
    trust: Tensor
    """Share of what was learned in ``sr``, see `MIAR.observe`: (B,)."""


class MIAR(nn.Module):
    """4× super-resolution by next-scale prediction: LR encoder, transformer, codebook and φ, decoder.

    What is linear is solved in closed form: the networks see the damped linear inverse of the degradation, and both of
    their output maps are corrected to explain the LR image. What is left to learn is what the LR image does not say.

    The closed forms work on whole slices, the networks on tiles of them. `super_resolve` is all of it for slices of one
    tile; `miar_monai.inference.inferer.BeamSearchInferer` cuts larger ones.

    The decoder is the tokenizer's, with skips from the LR image and two output maps: the most perceptual and the most
    faithful estimate; ``fidelity`` mixes them.

    Args:
        scales, channels, num_res_blocks, patch_size, latent_channels, num_codes, num_codebooks: of the
            tokenizer; see `MSVQVAE`.
        lr_encoder: ``"initialized"`` (a copy of the tokenizer's encoder, the paper's), ``"shared"`` (that encoder,
            frozen) or ``"light"`` (a small network on the LR grid).
        context_channels: channels of f_LR (32 with a tokenizer encoder).
        lr_channels, lr_blocks: widths and depth of the light encoder.
        dim, depth, num_heads, positions: of the transformer; see `MIARTransformer`.
        degradation: what makes LR images of HR images, unless `observe` is given another; its scale is the network's.
            The paper's by default.
        damping: of its inverse, at least; see `Degradation.enforce`.
        detail: standard deviation of the detail that is sought, in units of the intensities: the damping is the noise
            of the LR image over it, which is measured in each image (`Degradation.noise_level`).
        known_noise: the noise that the weights have met in training, in units of the intensities.

    Reference:
        Paper Sec. 3, Fig. 1; Wang et al., Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, 2023
        (range-null-space decomposition).

    Example:
        >>> network = MIAR(scales=(1, 2, 4), channels=(8, 8, 16), num_res_blocks=1, latent_channels=8, num_codes=16,
        ...     dim=16, depth=1, num_heads=2).eval()
        >>> network(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        scales: Sequence[int] = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        channels: Sequence[int] = (64, 128, 256),
        num_res_blocks: int = 2,
        patch_size: int = 2,
        latent_channels: int = 32,
        num_codes: int = 4096,
        lr_encoder: str = "initialized",
        context_channels: int = 32,
        lr_channels: Sequence[int] = (128, 192),
        lr_blocks: int = 12,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        num_codebooks: int = 1,
        positions: str = "rotary",
        degradation: Degradation | None = None,
        damping: float = 1e-3,
        detail: float = 0.2,
        known_noise: float = 0.02,
    ) -> None:
        super().__init__()
        self.degradation = degradation or Degradation()
        self.damping = damping
        self.detail = detail
        self.known_noise = known_noise
        self.scale = scale = self.degradation.scale
        self.patch_size = patch_size
        self.skip_level = level_of_lr(scale, patch_size)
        if self.skip_level >= len(channels):
            raise ConfigurationError(
                f"scale is {scale}, but {len(channels)} levels of channels reach"
                f" {patch_size * 2 ** (len(channels) - 1)} at most; give more channels or a smaller scale."
            )
        self.lr_encoder: LightLREncoder | TokenizerLREncoder
        if lr_encoder == "light":
            self.lr_encoder = LightLREncoder(context_channels, lr_channels, lr_blocks, scale)
        elif lr_encoder in ("initialized", "shared"):
            context_channels = latent_channels
            self.lr_encoder = TokenizerLREncoder(
                Encoder(1, latent_channels, channels, num_res_blocks, patch_size), scale
            )
            self.lr_encoder.requires_grad_(lr_encoder == "initialized")
        else:
            raise ConfigurationError(
                f"lr_encoder is {lr_encoder!r}, but it must be 'initialized', 'shared' or 'light'; correct the setting."
            )
        self.transformer = MIARTransformer(
            scales, num_codes, latent_channels, context_channels, dim, depth, num_heads, num_codebooks, positions
        )
        self.quantizer = MultiScaleQuantizer(scales, num_codes, latent_channels, num_codebooks=num_codebooks)
        self.quantizer.requires_grad_(False)
        skip_channels = [0] * len(channels)
        skip_channels[0] = patch_size**2  # the linear estimate
        skip_channels[self.skip_level] = self.lr_encoder.skip_channels
        self.decoder = Decoder(2, latent_channels, channels, num_res_blocks, patch_size, skip_channels)

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales of the latent grid."""
        return self.quantizer.schedule

    @property
    def stride(self) -> int:
        """f, pixels of the image for each cell of the latent grid."""
        return self.patch_size * 2 ** (len(self.decoder.levels) - 1)

    @property
    def lr_side(self) -> int:
        """Side of the LR images that `forward` takes: 64 for the paper's schedule."""
        return self.schedule.latent_side * self.stride // self.scale

    def cast(self, dtype: torch.dtype) -> MIAR:
        """Return a copy whose layers compute in another precision, faster than this network under autocast.

        Autocast casts every weight before each use, and many results back. The copy shares codebook and φ, whose sums
        must not be rounded, with this network; the closed forms keep the precision of the image. For inference only.

        Args:
            dtype: of the weights of the copy, such as `torch.bfloat16`.

        Example:
            >>> network = MIAR(scales=(1, 2, 4), channels=(8, 8, 16), num_res_blocks=1, latent_channels=8,
            ...     num_codes=16, dim=16, depth=1, num_heads=2).eval()
            >>> network.cast(torch.bfloat16)(torch.rand(1, 1, 8, 8)).dtype
            torch.float32
        """
        with torch.inference_mode(False):  # weights of such a mode could not be brought up to date outside of it
            copy = deepcopy(self, {id(self.quantizer): self.quantizer})
            for part in copy.layers:
                part.to(dtype).requires_grad_(False)
        return copy

    def cast_from(self, source: MIAR) -> None:
        """Bring the weights of a copy made by ``source.cast`` up to date, in a few launches on a GPU."""
        own, new = ([p.detach() for part in x.layers for p in part.parameters()] for x in (self, source))
        torch._foreach_copy_(own, new)

    @property
    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """What may compute in lower precision: all but codebook and φ."""
        return self.lr_encoder, self.transformer, self.decoder

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the layers."""
        return self.decoder.conv_in.weight.dtype

    def load_tokenizer(self, tokenizer: MSVQVAE) -> None:
        """Take over a trained tokenizer: codebook and φ, the decoder but for its last layer, the encoder.

        The last layer starts at zero, so that before training both output maps are what is linear in the LR image: the
        first tokens of an untrained transformer would only be noise in it.

        Raises:
            ConfigurationError: if the LR encoder should be the tokenizer's, which has none that is learned.
        """
        if isinstance(self.lr_encoder, TokenizerLREncoder):
            if not isinstance(tokenizer.encoder, Encoder):
                raise ConfigurationError(
                    "lr_encoder takes over the tokenizer's encoder, but this tokenizer has none that is learned; set"
                    " lr_encoder to 'light', or train a tokenizer with encoder 'learned'."
                )
            self.lr_encoder.encoder.load_state_dict(tokenizer.encoder.state_dict())
        self.quantizer.load_state_dict(tokenizer.quantizer.state_dict())
        own, last = self.decoder.state_dict(), ("conv_out.weight", "conv_out.bias", "gain")
        own |= {name: value for name, value in tokenizer.decoder.state_dict().items() if name not in last}
        self.decoder.load_state_dict(own | {name: torch.zeros_like(own[name]) for name in last})

    def observe(self, lr: Tensor, degradation: SeparableDegradation | None = None) -> Observation:
        """Solve what is linear.

        The noise of the slices is measured. It damps the inverse of the degradation, and beyond what the weights have
        met in training it moves the result to the linear estimate: a network takes noise that it does not know for
        detail.

        Args:
            lr: LR slices of any size, (B, 1, h, w).
            degradation: how they came about; as the network was built by default.
        """
        degradation = degradation or self.degradation
        noise = degradation.noise_level(lr)  # (B, 1, 1, 1)
        damping = (noise / self.detail).clamp(min=self.damping)
        trust = (self.known_noise / noise.clamp(min=self.known_noise)).square()
        return Observation(lr, degradation, damping, trust, degradation.restore(lr, damping))

    def features(self, linear: Tensor, condition: Tensor) -> LRFeatures:
        """Return what the networks see of LR images: see `Observation` for the arguments."""
        linear = linear.to(self.dtype)
        return LRFeatures(linear, *self.lr_encoder(linear, condition))

    def decode(self, f_hat: Tensor, features: LRFeatures) -> Tensor:
        """Return both output maps (B, 2, H, W), perceptual first, of latents (B, C, G, G)."""
        linear = F.pixel_unshuffle(features.linear, self.patch_size)  # (B, patch_size², H / patch_size, …)
        return self.decoder(f_hat.to(self.dtype), {0: linear, self.skip_level: features.skip})

    def estimate(self, maps: Tensor, observed: Observation) -> Tensor:
        """Return output maps (B, 2, H, W), corrected to explain the LR slices as far as these can be trusted."""
        maps = observed.degradation.enforce(maps.to(observed.lr.dtype), observed.lr, observed.damping)
        return torch.lerp(observed.linear, maps, observed.trust)

    @staticmethod
    def bounded(estimates: Tensor, observed: Observation) -> Tensor:
        """Return estimates (B, C, H, W) that are nowhere darker than their LR slices, with the level that they had.

        For inference: a loss that learns nothing from dark voxels would let them drift.
        """
        return observed.degradation.bounded(estimates, observed.lr.amin(dim=(2, 3), keepdim=True))

    def render(self, maps: Tensor, observed: Observation, fidelity: float) -> Tensor:
        """Return the images (B, 1, H, W) of output maps (B, 2, H, W): corrected, bounded, and mixed by `mix`."""
        return self.mix(self.bounded(self.estimate(maps, observed), observed), fidelity)

    @staticmethod
    def mix(estimates: Tensor, fidelity: float) -> Tensor:
        """Return the images (B, 1, H, W) between both estimates: 0 is the most perceptual, 1 the most faithful."""
        perceptual, faithful = estimates.split(1, dim=1)
        return torch.lerp(perceptual, faithful, fidelity)

    @torch.no_grad()
    def predict(
        self, linear: Tensor, condition: Tensor, decoding: Decoding, with_entropy: bool = False
    ) -> tuple[Tensor, Decoded]:
        """Predict the tokens of tiles and decode them.

        Args:
            linear: linear estimates of the tiles, (B, 1, scale · lr_side, scale · lr_side).
            condition: see `Observation`, (B, 2, 1, 1).
            decoding: strategy and its settings.
            with_entropy: find the entropy of the tokens too.

        Returns:
            Both output maps, (B, 2, scale · lr_side, scale · lr_side), not corrected yet, and the tokens. With the
            entropy, it is a third map: that of `Decoded`, interpolated.

        Raises:
            ConfigurationError: if the tiles have another size.
        """
        side = self.scale * self.lr_side
        if linear.shape[1:] != (1, side, side):
            got = (linear.shape[1], *(size // self.scale for size in linear.shape[2:]))
            raise ConfigurationError(
                f"the network got images of shape {got}, but it takes (1, {self.lr_side}, {self.lr_side}); call it"
                " through miar_monai.inference.inferer.BeamSearchInferer, which cuts other sizes into tiles."
            )
        features = self.features(linear, condition)
        context = self.transformer.context(features.f_lr)
        decoded = decode_tokens(self.transformer, self.quantizer, context, decoding, with_entropy)
        maps = self.decode(decoded.f_hat, features).to(linear.dtype)
        if decoded.entropy is not None:
            entropy = F.interpolate(decoded.entropy.to(maps.dtype), maps.shape[2:], mode="bilinear")
            maps = torch.cat([maps, entropy], dim=1)
        return maps, decoded

    @torch.no_grad()
    def super_resolve(
        self,
        lr: Tensor,
        decoding: Decoding | None = None,
        fidelity: float = 0.25,
        degradation: SeparableDegradation | None = None,
    ) -> MIARResult:
        """Predict the tokens of LR images and decode them.

        Args:
            lr: LR images, (B, 1, lr_side, lr_side).
            decoding: strategy and its settings; greedy by default.
            fidelity: from 0, the most perceptual output, to 1, the most faithful.
            degradation: how the LR images came about; as the network was built by default.

        Raises:
            ConfigurationError: if ``lr`` has another size.
        """
        observed = self.observe(lr, degradation)
        maps, decoded = self.predict(observed.linear, observed.condition, decoding or Decoding())
        sr = self.render(maps, observed, fidelity)
        return MIARResult(sr, decoded.tokens, decoded.score, observed.trust.flatten())

    def forward(self, lr: Tensor) -> Tensor:
        """Super-resolve LR images (B, 1, lr_side, lr_side) greedily: (B, 1, scale · lr_side, scale · lr_side)."""
        return self.super_resolve(lr).sr
