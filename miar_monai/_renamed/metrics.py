"""The former name of `miar_monai.evaluation.metrics`."""

from miar_monai.evaluation.metrics import *  # noqa: F403
