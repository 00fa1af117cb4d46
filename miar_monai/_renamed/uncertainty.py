"""The former name of `miar_monai.inference.error_model`."""

from miar_monai.inference.error_model import *  # noqa: F403
