"""Training: trainers of both stages, their handlers, losses and checkpoints."""

from miar_monai.training.bounds import record_bounds
from miar_monai.training.handlers import (
    EMA,
    EpochSeed,
    LossLogger,
    TimeBudget,
    WarmupCosine,
    attach_ema,
    compile_networks,
)
from miar_monai.training.trainers import MIARTrainer, TokenizerEvaluator, TokenizerTrainer

__all__ = [
    "EMA",
    "EpochSeed",
    "LossLogger",
    "MIARTrainer",
    "TimeBudget",
    "TokenizerEvaluator",
    "TokenizerTrainer",
    "WarmupCosine",
    "attach_ema",
    "compile_networks",
    "record_bounds",
]
