"""MIAR, the complete super-resolution network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.degradation import Degradation, SeparableOperator
from miar_monai.errors import ConfigurationError
from miar_monai.networks.autoencoder import Decoder, Encoder
from miar_monai.networks.base import SuperResolutionNetwork
from miar_monai.networks.decoding import Decoding, decode_tokens
from miar_monai.networks.linear import NoiseModel
from miar_monai.networks.lr_encoder import LightLREncoder, TokenizerLREncoder, level_of_patches
from miar_monai.networks.msvqvae import MSVQVAE
from miar_monai.networks.quantizer import MultiScaleQuantizer
from miar_monai.networks.results import LRFeatures, Observation, Prediction
from miar_monai.networks.schedule import ScaleSchedule
from miar_monai.networks.transformer import MIARTransformer

__all__ = ["MIAR"]

SKIPS = ("linear", "features")
"""Optional inputs of the decoder; see `MIAR`."""


class MIAR(SuperResolutionNetwork):
    """Super-resolution by next-scale prediction: LR encoder, transformer, codebook and φ, decoder.

    Its networks run on tiles of the HR grid; for larger slices, `miar_monai.inference.inferer.BeamSearchInferer` passes
    a tiled ``predict`` to `super_resolve`. The decoder is the tokenizer's, with skips from the LR image and two output
    maps, the perceptual and the faithful estimate, which ``fidelity`` mixes.

    Args:
        scales, channels, num_res_blocks, patch_size, latent_channels, num_codes, num_codebooks: settings of the
            tokenizer; see `MSVQVAE`.
        lr_encoder: ``"initialized"`` (a copy of the tokenizer's encoder, the paper's), ``"shared"`` (that encoder,
            frozen) or ``"light"`` (a small network on patches of the linear estimate).
        context_channels: channels of f_LR (``latent_channels`` with a tokenizer encoder).
        lr_channels, lr_blocks: widths and depth of the light encoder.
        dim, depth, num_heads, positions: settings of the transformer; see `MIARTransformer`.
        degradation, noise_model, front_end, back_end: see `SuperResolutionNetwork`.
        lr_patch_size: side of the pixel patches of the LR encoder's skip, ``patch_size`` times a power of two.
        decoder_inputs: skips of the decoder: the ``"linear"`` estimate, the ``"features"`` of the LR encoder, both, or
            none as in the paper.

    Raises:
        ConfigurationError: if the settings are inconsistent.

    Reference:
        Paper Sec. 3, Fig. 1.

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
        lr_patch_size: int = 4,
        noise_model: NoiseModel | None = None,
        front_end: Callable[[Tensor, SeparableOperator, Tensor], Tensor] | None = None,
        decoder_inputs: Sequence[str] = SKIPS,
        back_end: Callable[[Tensor, Observation], Tensor] | None = None,
    ) -> None:
        super().__init__(degradation, noise_model, front_end, back_end)
        self.patch_size = patch_size
        self.decoder_inputs = tuple(decoder_inputs)
        if unknown := set(self.decoder_inputs) - set(SKIPS):
            raise ConfigurationError(
                f"decoder_inputs has {', '.join(sorted(unknown))}, but only {' and '.join(SKIPS)} are possible; correct"
                " the setting."
            )
        skip_level = level_of_patches(lr_patch_size, patch_size, len(channels))
        self.lr_encoder: LightLREncoder | TokenizerLREncoder
        if lr_encoder == "light":
            self.lr_encoder = LightLREncoder(context_channels, lr_channels, lr_blocks, lr_patch_size)
        elif lr_encoder in ("initialized", "shared"):
            context_channels = latent_channels
            encoder = Encoder(1, latent_channels, channels, num_res_blocks, patch_size)
            self.lr_encoder = TokenizerLREncoder(encoder, skip_level)
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
        self.skip_level = skip_level
        skip_channels = [0] * len(channels)
        if "linear" in self.decoder_inputs:
            skip_channels[0] = patch_size**2
        if "features" in self.decoder_inputs:
            skip_channels[skip_level] = self.lr_encoder.skip_channels
        self.decoder = Decoder(2, latent_channels, channels, num_res_blocks, patch_size, skip_channels)

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales of the latent grid."""
        return self.quantizer.schedule

    @property
    def side(self) -> int:
        """Side of a tile on the HR grid: 256 for the paper's schedule."""
        return self.schedule.latent_side * self.decoder.stride

    @property
    def stride(self) -> int:
        """Voxels of the HR grid for each position of the latent grid."""
        return self.decoder.stride

    @property
    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The parts that may compute in lower precision, which excludes codebook and φ."""
        return self.lr_encoder, self.transformer, self.decoder

    @property
    def shared_layers(self) -> tuple[nn.Module]:
        """Codebook and φ, whose sums must not be rounded."""
        return (self.quantizer,)

    def load_tokenizer(self, tokenizer: MSVQVAE) -> None:
        """Copy the weights of a trained tokenizer: codebook and φ, decoder, and encoder if it is used.

        With skips the last layer of the decoder is set to zero, so before training both output maps are linear in the
        LR image: the tokens of an untrained transformer would only add noise. Without skips both maps are initially
        the decoded image of the tokenizer.

        Raises:
            ConfigurationError: if the LR encoder needs the tokenizer's encoder, and that is not a learned one.
        """
        if isinstance(self.lr_encoder, TokenizerLREncoder):
            if not isinstance(tokenizer.encoder, Encoder):
                raise ConfigurationError(
                    "lr_encoder needs a tokenizer with a learned encoder, but this tokenizer has a fixed one; set"
                    " lr_encoder to 'light', or train a tokenizer with encoder 'learned'."
                )
            self.lr_encoder.encoder.load_state_dict(tokenizer.encoder.state_dict())
        self.quantizer.load_state_dict(tokenizer.quantizer.state_dict())
        state, learned = self.decoder.state_dict(), tokenizer.decoder.state_dict()
        last = {name: learned.pop(name) for name in ("conv_out.weight", "conv_out.bias", "gain")}
        for name, value in last.items():
            axis = 1 if name == "gain" else 0  # of the output channels
            state[name] = torch.zeros_like(state[name]) if self.decoder_inputs else torch.cat([value] * 2, dim=axis)
        self.decoder.load_state_dict(state | learned)

    def condition(self, observed: Observation) -> Tensor:
        """Return log-damping and blur: (B, 2, 1, 1)."""
        return observed.condition

    def features(self, linear: Tensor, condition: Tensor) -> LRFeatures:
        """Encode LR images; for the arguments see `Observation`."""
        linear = linear.to(self.dtype)
        return LRFeatures(linear, *self.lr_encoder(linear, condition))

    def decode(self, f_hat: Tensor, features: LRFeatures) -> Tensor:
        """Decode latents (B, C, G, G) to the perceptual and the faithful map, (B, 2, H, W)."""
        skips = {}
        if "linear" in self.decoder_inputs:
            skips[0] = F.pixel_unshuffle(features.linear, self.patch_size)  # (B, patch_size², H / patch_size, …)
        if "features" in self.decoder_inputs:
            skips[self.skip_level] = features.skip
        return self.decoder(f_hat.to(self.dtype), skips)

    @torch.no_grad()
    def predict(
        self, images: Tensor, condition: Tensor, decoding: Decoding | None = None, with_entropy: bool = False
    ) -> Prediction:
        """Predict the tokens of tiles and decode them.

        Args:
            images: linear estimates of the tiles, (B, 1, side, side).
            condition: see `Observation`, (B, 2, 1, 1).
            decoding: strategy and its settings; greedy by default.
            with_entropy: also return the entropy of the tokens.

        Raises:
            ConfigurationError: if the tiles have another size.
        """
        if images.shape[1:] != (1, self.side, self.side):
            raise ConfigurationError(
                f"the images have shape {tuple(images.shape[1:])} on the HR grid, but the network needs"
                f" {(1, self.side, self.side)}; use miar_monai.inference.inferer.BeamSearchInferer, which cuts other"
                " sizes into tiles."
            )
        features = self.features(images, condition)
        context = self.transformer.context(features.f_lr)
        decoded = decode_tokens(self.transformer, self.quantizer, context, decoding or Decoding(), with_entropy)
        maps, entropy = self.decode(decoded.f_hat, features).to(images.dtype), None
        if decoded.entropy is not None:
            entropy = F.interpolate(decoded.entropy.to(maps.dtype), maps.shape[2:], mode="bilinear")
        return Prediction(maps, entropy, decoded.tokens, decoded.score)
