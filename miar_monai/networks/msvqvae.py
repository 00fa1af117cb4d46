"""The tokenizer of stage 1, between images and multi-scale tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from miar_monai.errors import ConfigurationError
from miar_monai.networks.autoencoder import CosineEncoder, Decoder, Encoder
from miar_monai.networks.quantizer import MultiScaleQuantizer
from miar_monai.networks.schedule import ScaleSchedule

__all__ = ["MSVQVAE", "MSVQVAEOutput"]


class MSVQVAEOutput(NamedTuple):
    """Result of `MSVQVAE.forward`."""

    reconstruction: Tensor
    """(B, 1, H, W)."""
    quantizer_loss: Tensor
    """Commitment and φ loss: scalar."""
    tokens: Tensor
    """(B, L · S), int64."""


class MSVQVAE(nn.Module):
    """Multi-scale residual VQ-VAE: encoder, `MultiScaleQuantizer`, decoder.

    The defaults are the paper's: f = 8, 4096 codes of 32 channels, ten scales up to 32 × 32 for 256 × 256 images.

    Args:
        scales: sides of the token maps, coarse to fine; images have side f · scales[-1].
        channels: width of each level of the encoder and the decoder, fine to coarse.
        num_res_blocks: residual blocks per level.
        patch_size: side of the pixel patches of the finest level; f = patch_size · 2^(levels - 1).
        latent_channels: C, length of a code.
        num_codes: V, size of a codebook.
        in_channels: channels of the image.
        encoder: ``"learned"`` (the paper's: a convolutional network with a cosine transform as shortcut) or
            ``"cosine"`` (that transform alone). With fixed latents the codebook converges in minutes; a learned encoder
            changes faster than its codes can follow and needs long training.
        decay, restart_below, dropout, dropout_start, num_codebooks: see `MultiScaleQuantizer`.

    Raises:
        ConfigurationError: if ``encoder`` is unknown.

    Reference:
        Paper Sec. 3.1 and appendix A; Tian et al., Visual Autoregressive Modeling, 2024, Sec. 3.2.

    Example:
        >>> tokenizer = MSVQVAE(scales=(1, 2, 4), channels=(8, 16), latent_channels=8, num_codes=16).eval()
        >>> x = torch.rand(2, 1, 16, 16)
        >>> tokens = tokenizer.encode(x)
        >>> tokens.shape, tokenizer.decode(tokens).shape
        (torch.Size([2, 21]), torch.Size([2, 1, 16, 16]))
    """

    def __init__(
        self,
        scales: Sequence[int] = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        channels: Sequence[int] = (64, 128, 256),
        num_res_blocks: int = 2,
        patch_size: int = 2,
        latent_channels: int = 32,
        num_codes: int = 4096,
        in_channels: int = 1,
        decay: float = 0.99,
        restart_below: float = 0.03,
        dropout: float = 0.1,
        dropout_start: int = 3,
        num_codebooks: int = 1,
        encoder: str = "learned",
    ) -> None:
        super().__init__()
        self.encoder: Encoder | CosineEncoder
        if encoder == "learned":
            self.encoder = Encoder(in_channels, latent_channels, channels, num_res_blocks, patch_size)
        elif encoder == "cosine":
            self.encoder = CosineEncoder(in_channels, latent_channels, patch_size * 2 ** (len(channels) - 1))
        else:
            raise ConfigurationError(
                f"encoder is {encoder!r}, but it must be 'learned' or 'cosine'; correct the setting."
            )
        self.quantizer = MultiScaleQuantizer(
            scales,
            num_codes,
            latent_channels,
            decay=decay,
            restart_below=restart_below,
            dropout=dropout,
            dropout_start=dropout_start,
            num_codebooks=num_codebooks,
        )
        self.decoder = Decoder(in_channels, latent_channels, channels, num_res_blocks, patch_size)

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales of the latent grid."""
        return self.quantizer.schedule

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Encode images (B, 1, H, W) as tokens (B, L · S), without updating the codebook."""
        return self.quantizer.encode(self.encoder(x))

    def decode(self, tokens: Tensor, num_scales: int | None = None) -> Tensor:
        """Decode tokens (B, L · S), or only those of the first ``num_scales`` scales, to images (B, 1, H, W)."""
        return self.decoder(self.quantizer.decode(tokens, num_scales))

    def forward(self, x: Tensor) -> MSVQVAEOutput:
        """Reconstruct images (B, 1, H, W); in training mode also update the codebook."""
        quantized = self.quantizer(self.encoder(x))
        return MSVQVAEOutput(self.decoder(quantized.f_hat), quantized.loss, quantized.tokens)

    def reconstruct_unquantized(self, x: Tensor) -> Tensor:
        """Reconstruct images without quantization, to measure the quantization error of `forward`."""
        return self.decoder(self.encoder(x))
