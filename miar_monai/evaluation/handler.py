"""Evaluation of the volumes of an evaluator."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys, ImageMetaKey

from miar_monai.data.io import volume_stem
from miar_monai.data.outputs import refuse_to_overwrite
from miar_monai.evaluation.page import SlicePictures, write_results_page
from miar_monai.evaluation.slices import SuperResolutionEvaluation

__all__ = ["EvaluationHandler"]

logger = logging.getLogger(__name__)


class EvaluationHandler:
    """Evaluates all slices of the volumes of a `monai.engines.SupervisedEvaluator`.

    It reads the decollated batch at the end of an iteration: dictionaries with ``image`` (LR), ``label`` (truth) and
    ``pred`` (SR), each (1, X, Y, Z), which must still be in network intensities after the postprocessing.

    Args:
        evaluation: collects the rows.
        output_dir: folder of ``metrics.csv``, ``metrics.md`` and ``metrics.html``, written at the end.
        overwrite: replace existing files; without it, existing files stop the run before it starts.
        notes: sentences below the heading of the page, such as `miar_monai.inference.bundle.model_notes`.
    """

    def __init__(
        self,
        evaluation: SuperResolutionEvaluation,
        output_dir: str | os.PathLike[str],
        overwrite: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self.evaluation = evaluation
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite
        self.notes = notes
        self.pictures = SlicePictures()
        self._started = self._seconds = 0.0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator.

        Args:
            engine: a `monai.engines.SupervisedEvaluator`.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_clock)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._stop_clock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._evaluate)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        if not self.overwrite:
            for name in ("metrics.csv", "metrics.md", "metrics.html"):
                refuse_to_overwrite(self.output_dir / name)
        self.evaluation.rows.clear()
        self.pictures = SlicePictures()
        for sentence in self.evaluation.missing:
            logger.warning(sentence)

    def _start_clock(self, engine: Engine) -> None:
        self._started = time.perf_counter()

    def _stop_clock(self, engine: Engine) -> None:
        output: Any = engine.state.output
        if output[CommonKeys.PRED].is_cuda:
            torch.cuda.synchronize()
        self._seconds = time.perf_counter() - self._started

    def _evaluate(self, engine: Engine) -> None:
        batches: Any = engine.state.batch
        outputs: Any = engine.state.output
        num_slices = sum(output[CommonKeys.PRED].shape[-1] for output in outputs)
        for batch, output in zip(batches, outputs, strict=True):
            lr, hr, sr = (output[key].movedim(-1, 0) for key in (CommonKeys.IMAGE, CommonKeys.LABEL, CommonKeys.PRED))
            subject = batch.get("subject") or volume_stem(output[CommonKeys.LABEL].meta[ImageMetaKey.FILENAME_OR_OBJ])
            milliseconds = 1e3 * self._seconds / num_slices
            contrast = batch.get("contrast")
            self.evaluation(lr, sr, hr, subject, range(len(hr)), milliseconds, contrast)
            middle = len(hr) // 2
            one_lr, one_sr, one_hr = (slices[middle : middle + 1] for slices in (lr, sr, hr))
            estimates = self.evaluation.estimates(one_lr, one_sr)
            del estimates["nearest"]  # browsers enlarge the LR slice in this way: it would be there twice
            self.pictures.add(subject, contrast, middle, one_lr, estimates, one_hr)

    def _write(self, engine: Engine) -> None:
        rows, table = self.evaluation.write(self.output_dir, self.overwrite)
        page = write_results_page(
            self.output_dir / "metrics.html",
            "Evaluation of MIAR",
            self.evaluation.rows,
            list(self.evaluation.scores),
            self.pictures,
            [*self.notes, *self.evaluation.missing],
            self.overwrite,
        )
        logger.info("%s\n%s\n%s\n%s", rows, page, table, table.read_text(encoding="utf-8"))
