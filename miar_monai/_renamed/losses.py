"""The former name of `miar_monai.training.losses`."""

from miar_monai.training.losses import *  # noqa: F403
