"""MIAR, the complete super-resolution network."""

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
"""Optional inputs of the decoder; see `MIAR`."""


class MIAR(nn.Module):
    """Super-resolution by next-scale prediction: LR encoder, transformer, codebook and φ, decoder.

    `super_resolve` has three steps: `observe` solves the linear part on whole slices; `predict` runs the networks on
    tiles of the HR grid; `finish` corrects, bounds and mixes their output maps, on whole slices again. For larger
    slices, `miar_monai.inference.inferer.BeamSearchInferer` passes a tiled ``predict`` to `super_resolve`. The networks
    work on the HR grid, so the scale factor depends on the operator only.

    The decoder is the tokenizer's, with skips from the LR image and two output maps, the perceptual and the faithful
    estimate, which ``fidelity`` mixes.

    Args:
        scales, channels, num_res_blocks, patch_size, latent_channels, num_codes, num_codebooks: settings of the
            tokenizer; see `MSVQVAE`.
        lr_encoder: ``"initialized"`` (a copy of the tokenizer's encoder, the paper's), ``"shared"`` (that encoder,
            frozen) or ``"light"`` (a small network on patches of the linear estimate).
        context_channels: channels of f_LR (``latent_channels`` with a tokenizer encoder).
        lr_channels, lr_blocks: widths and depth of the light encoder.
        dim, depth, num_heads, positions: settings of the transformer; see `MIARTransformer`.
        degradation: default of `observe`; the paper's by default.
        lr_patch_size: side of the pixel patches of the LR encoder's skip, ``patch_size`` times a power of two.
        noise_model: damping of the linear estimate, from the noise of each slice; `NoiseModel` by default.
        front_end: maps LR slices, operator and damping to the input of the networks: `LinearInverse` by default, or
            `Interpolation`.
        decoder_inputs: skips of the decoder: the ``"linear"`` estimate, the ``"features"`` of the LR encoder, both, or
            none as in the paper.
        back_end: corrects the maps: `DataConsistency` by default, or `NoConsistency`.

    Raises:
        ConfigurationError: if the settings are inconsistent.

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

    def cast(self, dtype: torch.dtype) -> MIAR:
        """Return a copy for inference whose layers compute in another precision; faster than autocast.

        Autocast casts every weight before each use, and many results back. The copy shares codebook and φ, whose sums
        must not be rounded, with this network; the closed forms keep the precision of the image.

        Args:
            dtype: precision of the copied weights, such as `torch.bfloat16`.

        Example:
            >>> network = MIAR(scales=(1, 2, 4), channels=(8, 8, 16), num_res_blocks=1, latent_channels=8,
            ...     num_codes=16, dim=16, depth=1, num_heads=2).eval()
            >>> network.cast(torch.bfloat16)(torch.rand(1, 1, 8, 8)).dtype
            torch.float32
        """
        with torch.inference_mode(False):  # tensors of inference mode could not be updated outside of it
            copy = deepcopy(self, {id(self.quantizer): self.quantizer})
            for part in copy.layers:
                part.to(dtype).requires_grad_(False)
        return copy

    def cast_from(self, source: MIAR) -> None:
        """Update this copy, made by ``source.cast``, to the weights of ``source``, in a few kernel launches."""
        targets, sources = ([p.detach() for part in x.layers for p in part.parameters()] for x in (self, source))
        torch._foreach_copy_(targets, sources)

    @property
    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The parts that may compute in lower precision, which excludes codebook and φ."""
        return self.lr_encoder, self.transformer, self.decoder

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the layers."""
        return self.decoder.conv_in.weight.dtype

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

    def observe(self, lr: Tensor, operator: SeparableOperator | None = None) -> Observation:
        """Estimate the noise of each slice and compute the linear estimate, damped by the noise.

        Args:
            lr: LR slices of any size, (B, 1, h, w).
            operator: operator of their degradation; ``self.degradation`` by default.
        """
        operator = operator or self.degradation.for_lr(lr)
        damping, weight = self.noise_model(operator.noise_level(lr))  # (B, 1, 1, 1)
        linear = self.front_end(lr, operator, damping)
        return Observation(lr, operator, linear, damping, self.noise_model.min_damping, weight)

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
        self, linear: Tensor, condition: Tensor, decoding: Decoding | None = None, with_entropy: bool = False
    ) -> Prediction:
        """Predict the tokens of tiles and decode them.

        Args:
            linear: linear estimates of the tiles, (B, 1, side, side).
            condition: see `Observation`, (B, 2, 1, 1).
            decoding: strategy and its settings; greedy by default.
            with_entropy: also return the entropy of the tokens.

        Raises:
            ConfigurationError: if the tiles have another size.
        """
        if linear.shape[1:] != (1, self.side, self.side):
            raise ConfigurationError(
                f"the images have shape {tuple(linear.shape[1:])} on the HR grid, but the network needs"
                f" {(1, self.side, self.side)}; use miar_monai.inference.inferer.BeamSearchInferer, which cuts other"
                " sizes into tiles."
            )
        features = self.features(linear, condition)
        context = self.transformer.context(features.f_lr)
        decoded = decode_tokens(self.transformer, self.quantizer, context, decoding or Decoding(), with_entropy)
        maps, entropy = self.decode(decoded.f_hat, features).to(linear.dtype), None
        if decoded.entropy is not None:
            entropy = F.interpolate(decoded.entropy.to(maps.dtype), maps.shape[2:], mode="bilinear")
        return Prediction(maps, entropy, decoded.tokens, decoded.score)

    def correct(self, maps: Tensor, observed: Observation) -> Tensor:
        """Correct output maps (B, 2, H, W) by the back end, in the precision of the LR slices."""
        return self.back_end(maps.to(observed.lr.dtype), observed)

    def finish(
        self,
        prediction: Prediction,
        observed: Observation,
        fidelity: float = 0.25,
        error_model: ErrorEstimator | None = None,
    ) -> Estimate:
        """Return the super-resolved images of a prediction: corrected, bounded and mixed.

        Voxels are not darker than the darkest of their LR slice, while local means are preserved. For inference only:
        clipped voxels have no gradient, so in training they would drift.

        Args:
            prediction: prediction for whole slices.
            observed: result of `observe`.
            fidelity: from 0, the perceptual estimate, to 1, the faithful estimate.
            error_model: predicts the error of the image, from a prediction with entropy.
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
            lr: LR slices, (B, 1, h, w), of one tile each, or of any size supported by ``predict``.
            decoding: strategy and its settings; greedy by default.
            fidelity: from 0, the perceptual estimate, to 1, the faithful estimate.
            operator: operator of the degradation; that of ``self.degradation`` by default.
            error_model: predicts the error of the images; see `finish`.
            predict: maps linear estimates (B, 1, H, W) and conditions (B, 2, 1, 1) to a prediction; `predict` by
                default.

        Raises:
            ConfigurationError: if ``lr`` has a size that ``predict`` does not support.
        """
        observed = self.observe(lr, operator)
        predict = predict or partial(self.predict, decoding=decoding, with_entropy=error_model is not None)
        return self.finish(predict(observed.linear, observed.condition), observed, fidelity, error_model)

    def forward(self, lr: Tensor) -> Tensor:
        """Super-resolve LR images (B, 1, h, w) of one tile each by greedy decoding: (B, 1, side, side)."""
        return self.super_resolve(lr).image
