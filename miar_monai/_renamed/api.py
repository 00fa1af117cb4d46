"""The former name of `miar_monai.inference.resolver`."""

from miar_monai.inference.resolver import *  # noqa: F403
