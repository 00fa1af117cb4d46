"""The two trainers, what they report, and what goes on around them."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.data.utils import set_rnd
from monai.engines import Evaluator, Trainer
from torch import Tensor, nn

from miar_monai.decoding import check_range
from miar_monai.errors import ConfigurationError
from miar_monai.graphs import CUDAGraphed
from miar_monai.losses import ReconstructionLoss, adaptive_weight
from miar_monai.networks import MSVQVAE
from miar_monai.networks.autoencoder import ResidualBlock
from miar_monai.networks.lr_encoder import PlainBlock
from miar_monai.networks.transformer import MIARBlock

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
]

logger = logging.getLogger(__name__)

Losses = list[dict[str, Tensor]]
"""Losses by name, in a list of one, as MONAI's handlers expect of a batch that was taken apart."""

Step = Callable[..., dict[str, Tensor]]
"""A training step: tensors of a batch in, losses by name out."""


class _StepTrainer(Trainer):
    """What both stages share: mixed precision, clipped optimizer steps, losses by name in ``state.output``."""

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        train_handlers: Sequence | None = None,
        epoch_length: int | None = None,
        amp: bool = False,
        max_grad_norm: float = 1.0,
        cuda_graphs: bool = False,
        key_train_metric: dict | None = None,
    ) -> None:
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            handlers=train_handlers,
            key_metric=key_train_metric,
            amp=False,  # bfloat16 needs no gradient scaler, which is all that MONAI's flag would add here
            decollate=False,
        )
        self.bfloat16 = amp
        self.max_grad_norm = max_grad_norm
        self.cuda_graphs = cuda_graphs

    def graphed(self, step: Step) -> Step:
        """Return the step, to be replayed as one CUDA graph if the settings say so."""
        return CUDAGraphed(step) if self.cuda_graphs else step

    def run(self) -> None:  # type: ignore[override]  # as MONAI's Trainer
        """Train up to ``max_epochs``; nothing is left to do for a run that was resumed at its end."""
        if self.state.epoch < self.state.max_epochs:  # ignite would start a finished run anew
            super().run()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.state.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def to_device(self, x: Tensor) -> Tensor:
        return x.to(self.state.device, non_blocking=True)

    def optimize(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        optimizer.step()


class TokenizerTrainer(_StepTrainer):
    """Stage 1: the tokenizer against reconstruction, quantizer and, from an epoch on, adversarial losses.

    Args:
        device: where to train.
        max_epochs: number of epochs.
        train_data_loader: batches with ``"image"``, HR slices (B, 1, H, W) in about [0, 1].
        network: the tokenizer, perhaps wrapped for several GPUs.
        optimizer: of the tokenizer.
        reconstruction: image loss.
        discriminator, discriminator_optimizer: MONAI's `monai.networks.nets.PatchDiscriminator` and its optimizer.
        adversarial_weight: weight of the adversarial loss, on top of the adaptive one.
        adversarial_start_epoch: first epoch, from 1, in which the discriminator takes part.
        train_handlers, epoch_length, amp (bfloat16), max_grad_norm: as the names say.
        cuda_graphs: replay a step as one CUDA graph (`CUDAGraphed`). Batches must be of one size, the optimizers
            ``capturable``, and their learning rates tensors on the GPU.

    Reference:
        Paper Sec. 4.1.2; Esser et al., Taming Transformers, 2021 (losses).
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        reconstruction: ReconstructionLoss,
        discriminator: nn.Module,
        discriminator_optimizer: torch.optim.Optimizer,
        adversarial_weight: float = 0.4,
        adversarial_start_epoch: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(device, max_epochs, train_data_loader, **options)
        self.network = network
        self.optimizer = optimizer
        self.reconstruction = reconstruction
        self.discriminator = discriminator
        self.discriminator_optimizer = discriminator_optimizer
        self.adversarial_weight = adversarial_weight
        self.adversarial_start_epoch = adversarial_start_epoch
        self.reconstruct = self.graphed(partial(self._step, adversarial=False))
        self.reconstruct_and_compete = self.graphed(partial(self._step, adversarial=True))

    @property
    def tokenizer(self) -> MSVQVAE:
        """The tokenizer itself, without a wrapper for several GPUs."""
        network: Any = getattr(self.network, "module", self.network)
        return network

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> Losses:  # type: ignore[override]
        images = self.to_device(batchdata["image"])
        self.network.train()
        if engine.state.iteration == 1:
            with torch.no_grad(), self.autocast():
                self.tokenizer.quantizer.initialize_codebook(self.tokenizer.encoder(images))
        adversarial = self.adversarial_weight > 0 and engine.state.epoch >= self.adversarial_start_epoch
        return [self.reconstruct_and_compete(images) if adversarial else self.reconstruct(images)]

    def _step(self, images: Tensor, adversarial: bool) -> dict[str, Tensor]:
        with self.autocast():
            output = self.network(images)
            reconstruction = output.reconstruction.float()
            parts = {
                "reconstruction_loss": self.reconstruction(reconstruction, images),
                "quantizer_loss": output.quantizer_loss,
            }
            parts["loss"] = parts["reconstruction_loss"] + parts["quantizer_loss"]
            if adversarial:
                parts["generator_loss"] = self._judge(reconstruction, target_is_real=True, for_discriminator=False)
                weight = adaptive_weight(
                    parts["reconstruction_loss"], parts["generator_loss"], self.tokenizer.decoder.conv_out.weight
                )
                parts["loss"] = parts["loss"] + self.adversarial_weight * weight * parts["generator_loss"]
        self.optimize(parts["loss"], self.optimizer)
        if adversarial:
            with self.autocast():
                parts["discriminator_loss"] = 0.5 * (
                    self._judge(images, target_is_real=True, for_discriminator=True)
                    + self._judge(reconstruction.detach(), target_is_real=False, for_discriminator=True)
                )
            self.optimize(parts["discriminator_loss"], self.discriminator_optimizer)
        return {name: part.detach() for name, part in parts.items()}

    def _judge(self, images: Tensor, target_is_real: bool, for_discriminator: bool) -> Tensor:
        self.discriminator.requires_grad_(for_discriminator)
        logits = self.discriminator(images)[-1].float()
        # MONAI's hinge squashes the logits first, and copies its targets to the GPU, which no CUDA graph allows
        return F.relu(1 - logits if target_is_real else 1 + logits).mean()


class MIARTrainer(_StepTrainer):
    """Stage 2: transformer, LR encoder and decoder against `miar_monai.losses.MIARObjective`.

    Args:
        device: where to train.
        max_epochs: number of epochs.
        train_data_loader: batches with ``"image"``, LR slices (B, 1, h, w), ``"label"``, HR slices (B, 1, H, W), and
            perhaps ``"degradation"``, by which of the objective's degradations each came about, (B,).
        objective: the objective, perhaps wrapped for several GPUs.
        optimizer: of the network's trainable parameters.
        train_handlers, epoch_length, amp (bfloat16), max_grad_norm: as the names say.
        cuda_graphs: as for `TokenizerTrainer`.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        **options: Any,
    ) -> None:
        super().__init__(device, max_epochs, train_data_loader, **options)
        self.objective = objective
        self.optimizer = optimizer
        self.learn = self.graphed(self._step)
        module: Any = getattr(objective, "module", objective)  # without a wrapper for several GPUs
        self.add_event_handler(Events.STARTED, module.start)

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> Losses:  # type: ignore[override]
        batch = [self.to_device(batchdata[key]) for key in ("image", "label", "degradation") if key in batchdata]
        self.objective.train()
        return [self.learn(*batch)]

    def _step(self, *batch: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            parts = self.objective(*batch)
        self.optimize(parts["loss"], self.optimizer)
        return {name: part.detach() for name, part in parts.items()}


class TokenizerEvaluator(Evaluator):
    """Validates a tokenizer: PSNR of each prefix of scales and with the quantizer bypassed, codes in use at each scale.

    Results are in ``state.metrics``: ``psnr`` (all scales; also the key metric), ``psnr_prefix_<k>``,
    ``psnr_unquantized``, ``codes_scale_<k>`` (distinct codes seen), ``codes_used`` (share of all codes).

    Args:
        device: where to run.
        val_data_loader: batches with ``"image"``, HR slices (B, 1, H, W) in about [0, 1].
        network: the tokenizer.
        val_handlers: handlers.
        amp: bfloat16.
        epoch_length: number of batches; all by default.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Iterable,
        network: MSVQVAE,
        val_handlers: Sequence | None = None,
        amp: bool = False,
        epoch_length: int | None = None,
    ) -> None:
        self.network = network
        self.bfloat16 = amp
        super().__init__(device=device, val_data_loader=val_data_loader, epoch_length=epoch_length, decollate=False)
        self.state.key_metric_name = "psnr"
        self.add_event_handler(Events.EPOCH_STARTED, self._start)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._summarize)
        self._register_handlers(val_handlers or [])

    def _start(self) -> None:
        self._squared_errors: dict[str, list[Tensor]] = {}
        self._usage: Tensor | int = 0

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batchdata["image"].to(self.state.device)
        network, schedule = self.network.eval(), self.network.schedule
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            tokens = network.encode(images)
            decoded = {f"psnr_prefix_{k}": network.decode(tokens, k) for k in range(1, schedule.num_scales)}
            decoded["psnr"] = network.decode(tokens)
            decoded["psnr_unquantized"] = network.reconstruct_unquantized(images)
        for name, image in decoded.items():
            error = (image.float().clamp(0, 1) - images.clamp(0, 1)).square().mean(dim=(1, 2, 3))
            self._squared_errors.setdefault(name, []).append(error)
        self._usage = self._usage + network.quantizer.usage(tokens)
        return {"image": images, "pred": decoded["psnr"].float(), "label": images}

    def _summarize(self) -> None:
        metrics = {
            name: (-10 * torch.cat(errors).clamp(min=1e-12).log10()).mean().item()
            for name, errors in self._squared_errors.items()
        }
        seen = torch.as_tensor(self._usage) > 0  # (K, S, V)
        metrics |= {f"codes_scale_{k}": int(n) for k, n in enumerate(seen.sum(dim=(1, 2)))}
        metrics["codes_used"] = seen.any(dim=0).float().mean().item()
        self.state.metrics |= metrics
        if metrics["psnr"] > self.state.best_metric:
            self.state.best_metric, self.state.best_metric_epoch = metrics["psnr"], self.state.epoch


class EpochSeed:
    """Seeds everything random at the start of each epoch from the seed and the epoch's number.

    A run that is resumed at an epoch's start then sees the same numbers as one that never stopped, with worker
    processes too: the data loader starts anew, and its workers take their seeds from here (``persistent_workers``
    would keep the old ones).

    Args:
        seed: seed of the run; processes of one job add their rank.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Seed Python, NumPy, torch and the dataset's random transforms, and start the data loader anew."""
        seed = self.seed + 1000 * engine.state.epoch + engine.state.rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        set_rnd(engine.data_loader.dataset, seed)
        engine.set_data(engine.data_loader)


class LossLogger:
    """Averages the losses that a trainer returns, and reports them every few iterations.

    The means go to the log, to ``engine.state.metrics`` (from where `monai.handlers` send them to MLflow), and as a
    curve to TensorBoard files in ``output_dir``.

    Args:
        interval: iterations between two reports.
        output_dir: folder of the TensorBoard files; none are written without it.
        validator: an evaluator whose metrics belong into these files, at the trainer's iterations.
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
            self._sums[name] = total + value, count + 1  # stays on the device: no synchronization

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
    """Ends a training after some minutes, with a checkpoint, as borrowed GPUs demand.

    A validation counts too: it ends with the batch at which the time is over, and its metrics are of the slices that it
    came to; it does not begin when the time is over before. `WarmupCosine` follows the clock, so that the learning rate
    has come down by then. Two networks that are compared can so be given the same time instead of the same number of
    steps.

    Args:
        minutes: of training and validation; None for no limit.
        free_iterations: number of iterations before the clock starts, where these compile networks.
        validator: the evaluator that validates between epochs.

    Raises:
        ConfigurationError: if the minutes are not positive, or if several processes train together: their clocks would
            not agree on the last step.
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

    @property
    def progress(self) -> float:
        """Share of the time that is used up: 0 before the clock starts and without a limit."""
        if self.minutes is None or self._start is None:
            return 0.0
        return (time.monotonic() - self._start) / (60 * self.minutes)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the handler that validates."""
        self._start, self._iterations = None, 0
        engine.add_event_handler(Events.STARTED, self._start_clock)
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

    def _start_clock(self) -> None:
        if self._iterations == self.free_iterations:
            self._start = time.monotonic()

    def _end_after_epoch(self, engine: Engine) -> None:
        if self.progress >= 1:
            engine.state.max_epochs = engine.state.epoch

    def _skip_validation(self, validator: Engine) -> None:
        if self.progress >= 1:
            logger.info("the time is over: there is no validation at the end")
            validator.terminate()

    def _end_validation(self, validator: Engine) -> None:
        done, count = validator.state.iteration, validator.state.epoch_length or 0
        if self.progress >= 1 and done % count:
            logger.info("the time is over: the metrics are those of %d batches of %d", done % count, count)
            validator.terminate_epoch()


class WarmupCosine(torch.optim.lr_scheduler.LambdaLR):
    """Learning rate for each iteration: linear up during the warm-up, then half a cosine down to ``final_lr``.

    With ``final_lr`` equal to the optimizer's rate, it stays fixed after the warm-up, as in the paper.

    Args:
        optimizer: the optimizer; its rate is the highest.
        warmup_steps: iterations of the warm-up.
        total_steps: iterations of the whole run.
        final_lr: rate at the end.
        budget: if it has a limit, the rate is at its end when the time is up, if not before.

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

    Blocks of the same shape are compiled once, which takes a fraction of the time that whole networks take.
    """
    if enabled:
        torch._dynamo.config.recompile_limit = 64  # blocks of different widths share their code
    for network in networks if enabled else ():
        for module in network.modules():
            if isinstance(module, ResidualBlock | PlainBlock | MIARBlock):
                module.compile()


class EMA(EMAHandler):
    """ignite's moving average of the weights, with one kernel for all of them instead of two for each.

    Buffers are those of the network itself, as with ``handle_buffers="copy"``.
    """

    @torch.no_grad()
    def _update_ema_model(self, engine: Engine, name: str) -> None:
        averages: list[Tensor] = [*self.ema_model.parameters()]
        weights: list[Tensor] = [*self.model.parameters()]
        torch._foreach_lerp_(averages, weights, getattr(engine.state, name))
        for shared, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            shared.data = buffer.data


def attach_ema(ema: EMAHandler, trainer: Trainer) -> None:
    """Attach a moving average to a trainer; its warm-up goes on where a resumed run stopped.

    Args:
        ema: the moving average; its network is saved by `attach_checkpoints`, its own count of iterations is not.
        trainer: the trainer.
    """
    ema.attach(trainer)

    @trainer.on(Events.STARTED)
    def _() -> None:
        if ema.momentum_scheduler is not None:
            ema.momentum_scheduler.event_index = trainer.state.iteration
