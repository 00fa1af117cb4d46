"""The networks: the estimator, and MIAR with its tokenizer and transformer."""

from miar_monai.networks.base import SuperResolutionNetwork
from miar_monai.networks.estimator import Estimator
from miar_monai.networks.miar import MIAR
from miar_monai.networks.msvqvae import MSVQVAE
from miar_monai.networks.transformer import MIARTransformer

__all__ = ["MIAR", "MSVQVAE", "Estimator", "MIARTransformer", "SuperResolutionNetwork"]
