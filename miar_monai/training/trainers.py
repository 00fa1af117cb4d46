"""The two trainers, what they report, and what goes on around them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines import Evaluator, Trainer
from torch import Tensor, nn

from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.networks import MSVQVAE
from miar_monai.training.losses import ReconstructionLoss, adaptive_weight

__all__ = [
    "MIARTrainer",
    "TokenizerEvaluator",
    "TokenizerTrainer",
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
    """Stage 2: transformer, LR encoder and decoder against `miar_monai.training.losses.MIARObjective`.

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
