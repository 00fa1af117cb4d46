"""MIAR: everything inference needs in one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.degradation import Degradation, SeparableOperator
from miar_monai.errors import ConfigurationError
from miar_monai.networks.autoencoder import Decoder, Encoder
from miar_monai.networks.decoding import Decoding, decode_tokens
from miar_monai.networks.linear import DataConsistency, LinearInverse, NoiseModel
from miar_monai.networks.lr_encoder import LightLREncoder, TokenizerLREncoder, level_of_patches
from miar_monai.networks.msvqvae import MSVQVAE
from miar_monai.networks.quantizer import MultiScaleQuantizer
from miar_monai.networks.results import ErrorEstimator, Estimate, LRFeatures, Observation, Prediction
from miar_monai.networks.schedule import ScaleSchedule
from miar_monai.networks.transformer import MIARTransformer

__all__ = ["MIAR"]

SKIPS = ("linear", "features")
"""Inputs of the decoder besides the latents; see `MIAR`."""


class MIAR(nn.Module):
    """Super-resolution by next-scale prediction: LR encoder, transformer, codebook and φ, decoder.

    The algorithm has three steps, and `super_resolve` is all of them: `observe` solves the linear part on whole slices;
    `predict` runs the networks on tiles of the HR grid; `finish` corrects, bounds and mixes their output maps, on whole
    slices again. `miar_monai.inference.inferer.BeamSearchInferer` gives `super_resolve` a prediction that cuts larger
    slices into tiles. The networks work on the HR grid: the factor of the super-resolution is that of the operator.

    The decoder is the tokenizer's, with skips from the LR image and two output maps: the most perceptual and the most
    faithful estimate; ``fidelity`` mixes them.

    Args:
        scales, channels, num_res_blocks, patch_size, latent_channels, num_codes, num_codebooks: of the
            tokenizer; see `MSVQVAE`.
        lr_encoder: ``"initialized"`` (a copy of the tokenizer's encoder, the paper's), ``"shared"`` (that encoder,
            frozen) or ``"light"`` (a small network on patches of the linear estimate).
        context_channels: channels of f_LR (``latent_channels`` with a tokenizer encoder).
        lr_channels, lr_blocks: widths and depth of the light encoder.
        dim, depth, num_heads, positions: of the transformer; see `MIARTransformer`.
        degradation: default of `observe`; the paper's by default.
        lr_patch_size: side of the patches of the linear estimate that the LR encoder's skip describes: ``patch_size``
            times a power of two.
        noise_model: damping of the linear estimate, from the noise of each slice; `NoiseModel` by default.
        front_end: maps LR slices, operator and damping to the input of the networks: `LinearInverse` by default, or
            `Interpolation`.
        decoder_inputs: which of the ``"linear"`` estimate and the ``"features"`` of the LR encoder the decoder gets by
            skips, besides the latents; none in the paper.
        back_end: corrects the maps: `DataConsistency` by default, or `NoConsistency`.

    Raises:
        ConfigurationError: if settings do not fit together.

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
        lr_patch_size: int = 4,
        noise_model: NoiseModel | None = None,
        front_end: Callable[[Tensor, SeparableOperator, Tensor], Tensor] | None = None,
        decoder_inputs: Sequence[str] = SKIPS,
        back_end: Callable[[Tensor, Observation], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.degradation = degradation or Degradation()
        self.noise_model = noise_model or NoiseModel()
        self.front_end = front_end or LinearInverse()
        self.back_end = back_end or DataConsistency()
        self.patch_size = patch_size
        self.decoder_inputs = tuple(decoder_inputs)
        if unknown := set(self.decoder_inputs) - set(SKIPS):
            raise ConfigurationError(
                f"decoder_inputs has {', '.join(sorted(unknown))}, but there are only {' and '.join(SKIPS)}; correct"
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
        """The parts that may compute in lower precision: all but codebook and φ."""
        return self.lr_encoder, self.transformer, self.decoder

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the layers."""
        return self.decoder.conv_in.weight.dtype

    def load_tokenizer(self, tokenizer: MSVQVAE) -> None:
        """Take over a trained tokenizer: codebook and φ, the decoder, the encoder.

        With skips the decoder's last layer starts at zero, so that before training both output maps are linear in the
        LR image: the first tokens of an untrained transformer would only be noise in it. Without skips both maps start
        as the image of the tokenizer.

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
        own, learned = self.decoder.state_dict(), tokenizer.decoder.state_dict()
        last = {name: learned.pop(name) for name in ("conv_out.weight", "conv_out.bias", "gain")}
        for name, value in last.items():
            axis = 1 if name == "gain" else 0  # of the output channels
            own[name] = torch.zeros_like(own[name]) if self.decoder_inputs else torch.cat([value] * 2, dim=axis)
        self.decoder.load_state_dict(own | learned)

    def observe(self, lr: Tensor, operator: SeparableOperator | None = None) -> Observation:
        """Solve the linear part; the noise of each slice is measured, and damps the inverse of the degradation.

        Args:
            lr: LR slices of any size, (B, 1, h, w).
            operator: their degradation; ``self.degradation`` by default.
        """
        operator = operator or self.degradation.for_lr(lr)
        damping, weight = self.noise_model(operator.noise_level(lr))  # (B, 1, 1, 1)
        linear = self.front_end(lr, operator, damping)
        return Observation(lr, operator, linear, damping, self.noise_model.min_damping, weight)

    def features(self, linear: Tensor, condition: Tensor) -> LRFeatures:
        """Return the features of LR images: see `Observation` for the arguments."""
        linear = linear.to(self.dtype)
        return LRFeatures(linear, *self.lr_encoder(linear, condition))

    def decode(self, f_hat: Tensor, features: LRFeatures) -> Tensor:
        """Return both output maps (B, 2, H, W), perceptual first, of latents (B, C, G, G)."""
        skips = {}
        if "linear" in self.decoder_inputs:
            skips[0] = F.pixel_unshuffle(features.linear, self.patch_size)  # (B, patch_size², H / patch_size, …)
        if "features" in self.decoder_inputs:
            skips[self.skip_level] = features.skip
        return self.decoder(f_hat.to(self.dtype), skips)

    @torch.no_grad()
    def predict(
        self, linear: Tensor, condition: Tensor, decoding: Decoding | None = None, with_entropy: bool = False
    ) -> Prediction:
        """Predict the tokens of tiles and decode them.

        Args:
            linear: linear estimates of the tiles, (B, 1, side, side).
            condition: see `Observation`, (B, 2, 1, 1).
            decoding: strategy and its settings; greedy by default.
            with_entropy: return the entropy of the tokens too.

        Raises:
            ConfigurationError: if the tiles have another size.
        """
        if linear.shape[1:] != (1, self.side, self.side):
            raise ConfigurationError(
                f"the network got images that are {tuple(linear.shape[1:])} on the HR grid, but it takes"
                f" {(1, self.side, self.side)}; call it through miar_monai.inference.inferer.BeamSearchInferer, which"
                " cuts other sizes into tiles."
            )
        features = self.features(linear, condition)
        context = self.transformer.context(features.f_lr)
        decoded = decode_tokens(self.transformer, self.quantizer, context, decoding or Decoding(), with_entropy)
        maps, entropy = self.decode(decoded.f_hat, features).to(linear.dtype), None
        if decoded.entropy is not None:
            entropy = F.interpolate(decoded.entropy.to(maps.dtype), maps.shape[2:], mode="bilinear")
        return Prediction(maps, entropy, decoded.tokens, decoded.score)

    def correct(self, maps: Tensor, observed: Observation) -> Tensor:
        """Return output maps (B, 2, H, W), corrected by the back end, in the precision of the LR slices."""
        return self.back_end(maps.to(observed.lr.dtype), observed)

    def finish(
        self,
        prediction: Prediction,
        observed: Observation,
        fidelity: float = 0.25,
        error_model: ErrorEstimator | None = None,
    ) -> Estimate:
        """Return the super-resolved images of a prediction: corrected, bounded, and mixed.

        No voxel is darker than the darkest of its LR slice, and the level stays. That is for inference: a loss that
        learns nothing from dark voxels would let them drift.

        Args:
            prediction: for whole slices.
            observed: the slices.
            fidelity: from 0, the perceptual estimate, to 1, the faithful one.
            error_model: estimates the error of the image, from a prediction with entropy.
        """
        maps = self.correct(prediction.maps, observed)
        maps = observed.operator.bounded(maps, observed.lr.amin(dim=(2, 3), keepdim=True))
        perceptual, faithful = maps.split(1, dim=1)
        image = torch.lerp(perceptual, faithful, fidelity)
        estimate = Estimate(image, perceptual, faithful, observed.network_weight)
        if error_model is None or prediction.entropy is None:
            return estimate
        return estimate._replace(error=error_model(estimate, prediction.entropy, observed.suppressed_by_noise))

    @torch.no_grad()
    def super_resolve(
        self,
        lr: Tensor,
        decoding: Decoding | None = None,
        fidelity: float = 0.25,
        operator: SeparableOperator | None = None,
        error_model: ErrorEstimator | None = None,
        predict: Callable[[Tensor, Tensor], Prediction] | None = None,
    ) -> Estimate:
        """Super-resolve LR slices: observe, predict, finish.

        Args:
            lr: LR slices, (B, 1, h, w); of one tile each, or of any size if ``predict`` takes any.
            decoding: strategy and its settings; greedy by default.
            fidelity: from 0, the perceptual estimate, to 1, the faithful one.
            operator: the degradation of the slices; ``self.degradation`` by default.
            error_model: estimates the error of the images; see `finish`.
            predict: maps linear estimates (B, 1, H, W) and conditions (B, 2, 1, 1) to a prediction; `predict` by
                default.

        Raises:
            ConfigurationError: if ``lr`` has another size.
        """
        observed = self.observe(lr, operator)
        predict = predict or partial(self.predict, decoding=decoding, with_entropy=error_model is not None)
        return self.finish(predict(observed.linear, observed.condition), observed, fidelity, error_model)

    def forward(self, lr: Tensor) -> Tensor:
        """Super-resolve LR images (B, 1, h, w) of one tile each greedily: (B, 1, side, side)."""
        return self.super_resolve(lr).image
