"""The former name of `miar_monai.data.geometry`."""

from miar_monai.data.geometry import *  # noqa: F403
