"""The trainers of both stages, and the evaluator of the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines import Evaluator, Trainer
from torch import Tensor, nn

from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.evaluation.metrics import psnr
from miar_monai.networks import MSVQVAE
from miar_monai.training.losses import ReconstructionLoss, adaptive_weight

__all__ = ["MIARTrainer", "TokenizerEvaluator", "TokenizerTrainer"]

Losses = list[dict[str, Tensor]]
"""Losses by name, in a list with one item, as MONAI's handlers expect them from a decollated batch."""

Step = Callable[..., dict[str, Tensor]]
"""A training step: tensors of a batch in, losses by name out."""


class _StepTrainer(Trainer):
    """Base of both trainers: mixed precision, gradient clipping, and losses by name in ``state.output``."""

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
            amp=False,  # MONAI's flag adds only a gradient scaler, which bfloat16 does not need
            decollate=False,
        )
        self.bfloat16 = amp
        self.max_grad_norm = max_grad_norm
        self.cuda_graphs = cuda_graphs

    def graphed(self, step: Step) -> Step:
        """Return the step, replayed as one CUDA graph if this is enabled."""
        return CUDAGraphed(step) if self.cuda_graphs else step

    def run(self) -> None:  # type: ignore[override]  # as MONAI's Trainer
        """Train up to ``max_epochs``; a finished run that is resumed does nothing."""
        if self.state.epoch < self.state.max_epochs:  # ignite would restart a finished run
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
    """Stage 1: trains the tokenizer with reconstruction and quantizer losses and, from some epoch on, a GAN loss.

    Args:
        device: where to train.
        max_epochs: number of epochs.
        train_data_loader: batches with ``"image"``, HR slices (B, 1, H, W) in about [0, 1].
        network: the tokenizer, possibly wrapped for several GPUs.
        optimizer: optimizer of the tokenizer.
        reconstruction: image loss.
        discriminator, discriminator_optimizer: MONAI's `monai.networks.nets.PatchDiscriminator` and its optimizer.
        adversarial_weight: weight of the adversarial loss, on top of the adaptive one.
        adversarial_start_epoch: first epoch, from 1, with adversarial loss.
        train_handlers: handlers.
        epoch_length: number of iterations of an epoch.
        amp: use bfloat16.
        max_grad_norm: upper limit of the gradient norm.
        cuda_graphs: replay a step as one CUDA graph (`CUDAGraphed`). All batches must have the same size, the
            optimizers must be ``capturable``, and their learning rates tensors on the GPU.

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
        self._plain_step = self.graphed(partial(self._step, adversarial=False))
        self._adversarial_step = self.graphed(partial(self._step, adversarial=True))

    @property
    def tokenizer(self) -> MSVQVAE:
        """The tokenizer without a wrapper for several GPUs."""
        network: Any = getattr(self.network, "module", self.network)
        return network

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> Losses:  # type: ignore[override]
        images = self.to_device(batchdata["image"])
        self.network.train()
        if engine.state.iteration == 1:
            with torch.no_grad(), self.autocast():
                self.tokenizer.quantizer.initialize_codebook(self.tokenizer.encoder(images))
        adversarial = self.adversarial_weight > 0 and engine.state.epoch >= self.adversarial_start_epoch
        return [self._adversarial_step(images) if adversarial else self._plain_step(images)]

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
                parts["generator_loss"] = self._adversarial_loss(
                    reconstruction, target_is_real=True, for_discriminator=False
                )
                weight = adaptive_weight(
                    parts["reconstruction_loss"], parts["generator_loss"], self.tokenizer.decoder.conv_out.weight
                )
                parts["loss"] = parts["loss"] + self.adversarial_weight * weight * parts["generator_loss"]
        self.optimize(parts["loss"], self.optimizer)
        if adversarial:
            with self.autocast():
                parts["discriminator_loss"] = 0.5 * (
                    self._adversarial_loss(images, target_is_real=True, for_discriminator=True)
                    + self._adversarial_loss(reconstruction.detach(), target_is_real=False, for_discriminator=True)
                )
            self.optimize(parts["discriminator_loss"], self.discriminator_optimizer)
        return {name: part.detach() for name, part in parts.items()}

    def _adversarial_loss(self, images: Tensor, target_is_real: bool, for_discriminator: bool) -> Tensor:
        self.discriminator.requires_grad_(for_discriminator)
        logits = self.discriminator(images)[-1].float()
        # MONAI's hinge loss applies tanh to the logits, and copies targets to the GPU, which CUDA graphs do not allow
        return F.relu(1 - logits if target_is_real else 1 + logits).mean()


class MIARTrainer(_StepTrainer):
    """Trains a network by an objective: stage 2 of a MIAR by `MIARObjective`, or an `Estimator`.

    Args:
        device: where to train.
        max_epochs: number of epochs.
        train_data_loader: batches with the ``batch_keys``.
        objective: maps these tensors to named losses, possibly wrapped for several GPUs. Its method ``prepare``, if it
            has one, is called before the first step.
        optimizer: optimizer of the network's trainable parameters.
        batch_keys: keys of the arguments of the objective, in their order; those that a batch lacks are left out.
        train_handlers, epoch_length, amp, max_grad_norm, cuda_graphs: as for `TokenizerTrainer`.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch_keys: Sequence[str] = ("image", "label", "degradation"),
        **options: Any,
    ) -> None:
        super().__init__(device, max_epochs, train_data_loader, **options)
        self.batch_keys = tuple(batch_keys)
        self.objective = objective
        self.optimizer = optimizer
        self._graphed_step = self.graphed(self._step)
        if hasattr(self.plain_objective, "prepare"):
            self.add_event_handler(Events.STARTED, self.plain_objective.prepare)

    @property
    def plain_objective(self) -> Any:
        """The objective without a wrapper for several GPUs."""
        return getattr(self.objective, "module", self.objective)

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> Losses:  # type: ignore[override]
        self.objective.train()
        return [self._graphed_step(*self._tensors(batchdata))]

    def losses(self, batchdata: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of a batch by name, without a step."""
        with self.autocast():
            parts: dict[str, Tensor] = self.plain_objective(*self._tensors(batchdata))
        return parts

    def _tensors(self, batchdata: dict[str, Tensor]) -> list[Tensor]:
        return [self.to_device(batchdata[key]) for key in self.batch_keys if key in batchdata]

    def _step(self, *batch: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            parts = self.objective(*batch)
        self.optimize(parts["loss"], self.optimizer)
        return {name: part.detach() for name, part in parts.items()}


class TokenizerEvaluator(Evaluator):
    """Validates a tokenizer: PSNR for each number of scales and without the quantizer, and codes in use at each scale.

    Results are in ``state.metrics``: ``psnr`` (all scales; also the key metric), ``psnr_prefix_<k>``,
    ``psnr_unquantized``, ``codes_scale_<k>`` (distinct codes seen), ``codes_used`` (share of all codes).

    Args:
        device: where to run.
        val_data_loader: batches with ``"image"``, HR slices (B, 1, H, W) in about [0, 1].
        network: the tokenizer.
        val_handlers: handlers.
        amp: use bfloat16.
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
        self._psnr: dict[str, list[Tensor]] = {}
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
            self._psnr.setdefault(name, []).append(psnr(image.float().clamp(0, 1), images.clamp(0, 1)))
        self._usage = self._usage + network.quantizer.usage(tokens)
        return {"image": images, "pred": decoded["psnr"].float(), "label": images}

    def _summarize(self) -> None:
        # an empty slice may be exact, with an infinite PSNR
        metrics = {name: torch.cat(values).clamp(max=120).mean().item() for name, values in self._psnr.items()}
        in_use = torch.as_tensor(self._usage) > 0  # (K, S, V)
        metrics |= {f"codes_scale_{k}": int(n) for k, n in enumerate(in_use.sum(dim=(1, 2)))}
        metrics["codes_used"] = in_use.any(dim=0).float().mean().item()
        self.state.metrics |= metrics
        if metrics["psnr"] > self.state.best_metric:
            self.state.best_metric, self.state.best_metric_epoch = metrics["psnr"], self.state.epoch
