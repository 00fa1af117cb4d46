"""The former name of `miar_monai.inference.processes`."""

from miar_monai.inference.processes import *  # noqa: F403
