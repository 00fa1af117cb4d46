"""Checkpoints, from which a killed training run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, DiskSaver
from monai.engines import Trainer

from miar_monai.errors import CheckpointError, OutputError
from miar_monai.networks.weights import first_line

__all__ = ["attach_checkpoints"]

logger = logging.getLogger(__name__)


def attach_checkpoints(
    trainer: Trainer, objects: Mapping[str, Any], directory: str | Path, resume: bool = False, interval: int = 1
) -> None:
    """Save a training run every ``interval`` epochs, and optionally resume it.

    Files are written under a temporary name and renamed; the newest two are kept.

    Args:
        trainer: the trainer; its epoch and iteration are part of the checkpoint.
        objects: all objects with a state: networks, optimizers, schedulers, moving averages.
        directory: folder of the checkpoints, created if needed.
        resume: continue from the newest checkpoint in the folder, if there is one.
        interval: number of epochs between two checkpoints.

    Raises:
        OutputError: if the folder holds a run and ``resume`` is false, or cannot be written.
        CheckpointError: if the newest checkpoint is damaged or does not fit.
    """
    directory = Path(directory)
    found = sorted(directory.glob("checkpoint_*.pt"), key=_epoch)
    if found and not resume:
        raise OutputError(
            f"{directory} holds the checkpoint of another run ({found[-1].name}); add --resume True to continue it,"
            " or choose another --output_dir."
        )
    to_save = {"trainer": trainer, **objects}
    if found:
        max_epochs = trainer.state.max_epochs
        try:
            # tensors and numbers only; a CUDA graph needs its learning rate on the device
            state = torch.load(found[-1], map_location=trainer.state.device, weights_only=True)
            Checkpoint.load_objects(to_save, state)
        except Exception as error:
            raise CheckpointError(
                f"{found[-1]} cannot be continued ({first_line(error)}); it belongs to another configuration or is"
                " damaged: use the configuration it was made with, or delete it."
            ) from error
        trainer.state.max_epochs = max_epochs
        logger.info("continuing after epoch %d of %s", trainer.state.epoch, found[-1])
    try:
        saver = DiskSaver(str(directory), create_dir=True, require_empty=False)
    except OSError as error:
        raise OutputError(f"{directory} cannot be written ({error}); choose another --output_dir.") from error
    checkpoint = Checkpoint(
        to_save,
        saver,
        filename_prefix="checkpoint",
        filename_pattern="{filename_prefix}_{global_step}.{ext}",
        n_saved=2,
        global_step_transform=lambda engine, _: engine.state.epoch,
    )
    # ignite keeps the list of its files in this attribute; with it, older checkpoints of this run are removed in time
    checkpoint.load_state_dict({"_saved": [(_epoch(path), path.name) for path in found[-2:]]})
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=interval) | Events.COMPLETED, checkpoint)


def _epoch(path: Path) -> int:
    """Return the epoch in the name of a checkpoint, checkpoint_<epoch>.pt."""
    return int(path.stem.rsplit("_", 1)[1])
