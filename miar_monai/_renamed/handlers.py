"""The former name of `miar_monai.inference.case_reporter`."""

from miar_monai.inference.case_reporter import *  # noqa: F403
