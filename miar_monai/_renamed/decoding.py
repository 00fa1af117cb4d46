"""The former name of `miar_monai.networks.decoding`."""

from miar_monai.errors import check_range, check_whole  # noqa: F401
from miar_monai.networks.decoding import *  # noqa: F403
