"""The former name of `miar_monai.training.checkpoints` and `miar_monai.networks.weights`."""

from miar_monai.networks.weights import *  # noqa: F403
from miar_monai.training.checkpoints import *  # noqa: F403
