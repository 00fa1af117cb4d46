"""The former name of `miar_monai.inference.inferer`."""

from miar_monai.inference.inferer import *  # noqa: F403
