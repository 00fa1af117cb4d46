"""Handlers of training: seeds, logs, a time limit, the learning rate, moving averages."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.data.utils import set_rnd
from monai.engines import Trainer
from torch import Tensor, nn

from miar_monai.errors import ConfigurationError, check_range
from miar_monai.networks.autoencoder import ResidualBlock
from miar_monai.networks.lr_encoder import PlainBlock
from miar_monai.networks.transformer import MIARBlock

__all__ = ["EMA", "EpochSeed", "LossLogger", "TimeBudget", "WarmupCosine", "attach_ema", "compile_networks"]

logger = logging.getLogger(__name__)


class EpochSeed:
    """Seeds all random number generators at the start of each epoch, from the seed and the number of the epoch.

    A run that is resumed at the start of an epoch then gets the same random numbers as an uninterrupted one, also in
    worker processes: the data loader is restarted, and its workers derive their seeds from here (``persistent_workers``
    would keep the old ones).

    Args:
        seed: seed of the run; the rank of a process is added.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Seed Python, NumPy, torch and the random transforms of the data set, and restart the data loader."""
        seed = self.seed + 1000 * engine.state.epoch + engine.state.rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        set_rnd(engine.data_loader.dataset, seed)
        engine.set_data(engine.data_loader)


class LossLogger:
    """Averages the losses of a trainer on its device, and reports the means every few iterations.

    The means go to the log, to ``engine.state.metrics`` (where the MLflow handler of MONAI reads them), and to
    TensorBoard files.

    Args:
        interval: number of iterations between two reports.
        output_dir: folder of the TensorBoard files, or None.
        validator: an evaluator whose metrics are added to these files at the iterations of the trainer.
    """

    def __init__(
        self, interval: int = 50, output_dir: str | Path | None = None, validator: Engine | None = None
    ) -> None:
        self.interval = interval
        self.output_dir = output_dir
        self.validator = validator

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        self._sums: dict[str, tuple[Tensor | float, int]] = {}
        self._writer: Any = None
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval) | Events.EPOCH_COMPLETED, self._report)
        if self.validator is not None:
            self.validator.add_event_handler(
                Events.EPOCH_COMPLETED, lambda evaluator: self._write(evaluator.state.metrics, engine.state.iteration)
            )

    def _open(self, engine: Engine) -> None:
        if self.output_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.output_dir))

    def _add(self, engine: Any) -> None:
        for name, value in engine.state.output[0].items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1  # stays on the device, without synchronization

    def _report(self, engine: Engine) -> None:
        if not self._sums:
            return
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        engine.state.metrics |= means
        state = engine.state
        text = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        logger.info("epoch %d/%d, iteration %d: %s", state.epoch, state.max_epochs, state.iteration, text)
        self._write(means, state.iteration)

    def _write(self, values: Mapping[str, float], iteration: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)
            self._writer.flush()


class TimeBudget:
    """Ends a training after a number of minutes, with a checkpoint.

    Validation counts, too: it ends with the batch at which the time is over, and its metrics are those of the slices
    until then; it is skipped if the time is over before. `WarmupCosine` follows the clock, so that the learning rate
    reaches its final value. So networks can be compared at equal time instead of an equal number of steps. Checkpoints
    hold the time that has passed, so that a resumed run has the rest; without a rest, it ends before its first step.

    Args:
        minutes: limit for training and validation, or None.
        free_iterations: number of iterations before the clock starts, for compilation.
        validator: the evaluator that validates between epochs.

    Raises:
        SettingError: if the minutes are not positive.
        ConfigurationError: if several processes train together, since their clocks would not agree on the last step.
    """

    def __init__(self, minutes: float | None = None, free_iterations: int = 0, validator: Engine | None = None) -> None:
        if minutes is not None:
            check_range("max_minutes", minutes, 1e-3, float("inf"))
            if idist.get_world_size() > 1:
                raise ConfigurationError(
                    "max_minutes is set, but several processes train together, whose clocks would not agree on the last"
                    " step; set max_epochs and epoch_length instead."
                )
        self.minutes = minutes
        self.free_iterations = free_iterations
        self.validator = validator
        self._start: float | None = None
        self._earlier = 0.0  # seconds, before the run was resumed

    @property
    def progress(self) -> float:
        """Fraction of the time that has passed; 0 without a limit."""
        if self.minutes is None:
            return 0.0
        return self._seconds / (60 * self.minutes)

    @property
    def _seconds(self) -> float:
        return self._earlier + (0.0 if self._start is None else time.monotonic() - self._start)

    def state_dict(self) -> dict[str, float]:
        """Return the time that has passed."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue after the time that had passed."""
        self._earlier = float(state["seconds"])

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the handler that validates."""
        self._start, self._iterations = None, 0
        engine.add_event_handler(Events.STARTED, self._start_run)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_after_epoch)
        if self.validator is not None:
            self.validator.add_event_handler(Events.STARTED, self._skip_validation)
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._end_validation)

    def __call__(self, engine: Engine) -> None:
        """Start the clock, or end the training."""
        self._iterations += 1
        self._start_clock()
        if self.progress >= 1:
            self._end_after_epoch(engine)
            engine.terminate_epoch()

    def _start_run(self, engine: Engine) -> None:
        self._start_clock()
        if self.progress >= 1:
            logger.info("the time was over before: the resumed training ends at once")
            engine.terminate()

    def _start_clock(self) -> None:
        if self._iterations == self.free_iterations:
            self._start = time.monotonic()

    def _end_after_epoch(self, engine: Engine) -> None:
        if self.progress >= 1:
            engine.state.max_epochs = engine.state.epoch

    def _skip_validation(self, validator: Engine) -> None:
        if self.progress >= 1:
            logger.info("the time is over: the last validation is skipped")
            validator.terminate()

    def _end_validation(self, validator: Engine) -> None:
        done, count = validator.state.iteration, validator.state.epoch_length or 0
        if self.progress >= 1 and done % count:
            logger.info("the time is over: the metrics are those of %d of %d batches", done % count, count)
            validator.terminate_epoch()


class WarmupCosine(torch.optim.lr_scheduler.LambdaLR):
    """Learning rate per iteration: a linear warm-up, then half a cosine down to ``final_lr``.

    With ``final_lr`` equal to the rate of the optimizer, it is constant after the warm-up, as in the paper.

    Args:
        optimizer: the optimizer, with the highest rate.
        warmup_steps: number of iterations of the warm-up.
        total_steps: number of iterations of the run.
        final_lr: rate at the end.
        budget: a time limit; the rate reaches its end when the time is over, if not before.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> WarmupCosine(optimizer, warmup_steps=10, total_steps=100, final_lr=0.1).get_last_lr()
        [0.1]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_steps: int,
        total_steps: int,
        final_lr: float,
        budget: TimeBudget | None = None,
    ) -> None:
        lowest = final_lr / float(optimizer.param_groups[0]["lr"])

        def factor(step: int) -> float:
            progress = max(step - warmup_steps, 0) / max(total_steps - warmup_steps, 1)
            progress = min(max(progress, budget.progress if budget else 0.0), 1.0)
            cosine = lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2
            return min((step + 1) / max(warmup_steps, 1), cosine)

        super().__init__(optimizer, factor)


def compile_networks(enabled: bool, *networks: nn.Module) -> None:
    """Compile the blocks of networks in place with `torch.compile`, if enabled; state dicts keep their names.

    Blocks of the same shape are compiled once, which is much faster than compiling whole networks.
    """
    if not enabled:
        return
    torch._dynamo.config.recompile_limit = 64  # blocks of different widths share their code
    for network in networks:
        for module in network.modules():
            if isinstance(module, ResidualBlock | PlainBlock | MIARBlock):
                module.compile()


class EMA(EMAHandler):
    """ignite's moving average of the weights, with one kernel for all tensors instead of two for each.

    Buffers are those of the network, as with ``handle_buffers="copy"``.
    """

    @torch.no_grad()
    def _update_ema_model(self, engine: Engine, name: str) -> None:
        averages: list[Tensor] = [*self.ema_model.parameters()]
        weights: list[Tensor] = [*self.model.parameters()]
        torch._foreach_lerp_(averages, weights, getattr(engine.state, name))
        for shared, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            shared.data = buffer.data


def attach_ema(ema: EMAHandler, trainer: Trainer) -> None:
    """Attach a moving average to a trainer; in a resumed run its warm-up continues.

    Args:
        ema: the moving average; `attach_checkpoints` saves its network, but not its count of iterations.
        trainer: the trainer.
    """
    ema.attach(trainer)

    @trainer.on(Events.STARTED)
    def _() -> None:
        if ema.momentum_scheduler is not None:
            ema.momentum_scheduler.event_index = trainer.state.iteration
