"""The networks of MIAR: tokenizer, transformer, and the complete super-resolution network."""

from miar_monai.networks.miar import MIAR
from miar_monai.networks.msvqvae import MSVQVAE
from miar_monai.networks.transformer import MIARTransformer

__all__ = ["MIAR", "MSVQVAE", "MIARTransformer"]
