"""The former name of `miar_monai.data.io`."""

from miar_monai.data.io import *  # noqa: F403
