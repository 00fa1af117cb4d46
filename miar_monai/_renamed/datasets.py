"""The former name of `miar_monai.data.datasets`."""

from miar_monai.data.datasets import *  # noqa: F403
