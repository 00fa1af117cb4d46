"""The former name of `miar_monai.inference.bundle` and `miar_monai.cli.build_bundles`."""

from miar_monai.cli.build_bundles import *  # noqa: F403
from miar_monai.inference.bundle import *  # noqa: F403
