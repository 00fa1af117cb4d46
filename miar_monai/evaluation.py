"""How good the super-resolved slices are, beside what simpler methods make of the same input.

One CSV row for each slice and method, and a table of method x metric, mean ± standard deviation over the slices.
"""

from __future__ import annotations

import csv
import logging
import os
import time
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys, ImageMetaKey
from torch import Tensor

from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError
from miar_monai.files import refuse_to_overwrite, whole_file
from miar_monai.io import volume_stem
from miar_monai.metrics import METRICS, Score, body_mask, create_metrics
from miar_monai.resampling import interpolation_matrix, resample

__all__ = ["EvaluationHandler", "SuperResolutionEvaluation"]

logger = logging.getLogger(__name__)

MILLISECONDS = "ms per slice"


class SuperResolutionEvaluation:
    """Compare super-resolved slices with the truth, beside nearest, bicubic and the damped linear inverse.

    MIAR has two rows: as it is, and made consistent with the LR slices in closed form (`Degradation.enforce`), which
    needs a degradation that is known.

    Everything is measured in network intensities, clamped to [0, 1] here and nowhere else. A metric whose weights or
    package are missing is named below the table, and the others go on.

    Args:
        degradation: what made the LR slices; gives the scale and the linear inverse.
        metrics: names from `miar_monai.metrics.METRICS`.
        body_threshold: intensity in [0, 1] that the body exceeds and the background does not.
        damping: of the linear inverse, see `Degradation.enforce`.
        device: where the metrics are computed.
        batch_size: slices computed together.

    Example:
        >>> evaluation = SuperResolutionEvaluation(Degradation(), ["PSNR", "SSIM"])
        >>> hr = torch.rand(2, 1, 32, 48)
        >>> evaluation(Degradation()(hr), hr, hr, subject="case", slices=[40, 41])
        >>> [row["method"] for row in evaluation.rows[::2]]
        ['nearest', 'bicubic', 'linear inverse', 'MIAR', 'MIAR, data-consistent']
    """

    def __init__(
        self,
        degradation: Degradation,
        metrics: Sequence[str] = tuple(METRICS),
        body_threshold: float = 0.05,
        damping: float = 1e-3,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
    ) -> None:
        self.degradation = degradation
        self.metrics = tuple(metrics)
        self.body_threshold = body_threshold
        self.damping = damping
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.rows: list[dict[str, str | int | float]] = []

    @cached_property
    def _created(self) -> tuple[dict[str, Score], list[str]]:
        return create_metrics(self.metrics, self.device)

    @property
    def scores(self) -> dict[str, Score]:
        """The metrics that can be had, by name."""
        return self._created[0]

    @property
    def missing(self) -> list[str]:
        """One sentence for each metric that cannot be had."""
        return self._created[1]

    def baselines(self, lr: Tensor) -> dict[str, Tensor]:
        """Return what the methods that learn nothing make of LR slices (N, 1, h, w): each (N, 1, H, W)."""
        scale = self.degradation.scale
        interpolated = {}
        for method, mode in (("nearest", "nearest-exact"), ("bicubic", "bicubic")):
            rows, columns = (interpolation_matrix(size, size * scale, mode).to(lr) for size in lr.shape[-2:])
            interpolated[method] = resample(lr, rows, columns)
        return {**interpolated, "linear inverse": self.degradation.restore(lr, self.damping)}

    @torch.no_grad()
    def __call__(
        self, lr: Tensor, sr: Tensor, hr: Tensor, subject: str, slices: Sequence[int], milliseconds: float | None = None
    ) -> None:
        """Add the rows of some slices of one subject.

        Args:
            lr: LR slices, (N, 1, h, w), in network intensities.
            sr: MIAR's slices, (N, 1, H, W).
            hr: true slices, (N, 1, H, W).
            subject: who it is; patients are counted by it.
            slices: index of each slice in its volume.
            milliseconds: time that MIAR took for a slice.

        Raises:
            ConfigurationError: if the sizes do not belong together.
        """
        scaled = (*lr.shape[:2], *(size * self.degradation.scale for size in lr.shape[2:]))
        if not sr.shape == hr.shape == scaled:
            raise ConfigurationError(
                f"{subject}: the LR slices {tuple(lr.shape)}, the SR slices {tuple(sr.shape)} and the true slices "
                f"{tuple(hr.shape)} do not belong together at scale {self.degradation.scale}; "
                "make the LR slices from the true ones by the degradation that the evaluation uses."
            )
        lr, sr, hr = (x.as_subclass(Tensor).to(self.device, torch.float32) for x in (lr, sr, hr))
        consistent = self.degradation.enforce(sr, lr, self.damping)
        for method, estimate in {**self.baselines(lr), "MIAR": sr, "MIAR, data-consistent": consistent}.items():
            values = self._measure(estimate.clamp(0, 1), hr.clamp(0, 1))
            if method == "MIAR" and milliseconds is not None:
                values[MILLISECONDS] = [milliseconds] * len(hr)
            for i, index in enumerate(slices):
                row = {name: column[i] for name, column in values.items()}
                self.rows.append({"subject": subject, "slice": index, "method": method, **row})

    def _measure(self, sr: Tensor, hr: Tensor) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {name: [] for name in self.scores}
        for some_sr, some_hr in zip(sr.split(self.batch_size), hr.split(self.batch_size), strict=True):
            body = body_mask(some_hr, self.body_threshold)
            for name, score in self.scores.items():
                values[name] += score(some_sr, some_hr, body).tolist()
        return values

    def table(self) -> str:
        """Return the Markdown table: method x metric, mean ± standard deviation over the slices.

        Infinite values (slices without an error) and slices without a body have no place in a mean; how many values
        were left out is said below the table, and so is every missing metric.
        """
        columns = [*self.scores] + [MILLISECONDS] * any(MILLISECONDS in row for row in self.rows)
        methods = list(dict.fromkeys(row["method"] for row in self.rows))
        notes = list(self.missing)
        lines = [f"| method | {' | '.join(map(_title, columns))} |", "|---" * (len(columns) + 1) + "|"]
        for method in methods:
            cells = []
            for column in columns:
                found = [row.get(column) for row in self.rows if row["method"] == method]
                values = np.array([value for value in found if value is not None], dtype=np.float64)
                finite = values[np.isfinite(values)]
                cells.append(_mean_and_deviation(finite, METRICS[column].decimals if column in METRICS else 0))
                if len(finite) < len(values):
                    notes.append(f"{column} of {method}: mean over the {len(finite)} of {len(values)} finite values.")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        slices = {(row["subject"], row["slice"]) for row in self.rows}
        patients = {subject for subject, _ in slices}
        head = (
            f"{_count(slices, 'slice')} of {_count(patients, 'patient')}; mean ± standard deviation over the slices, "
            f"intensities clamped to [0, 1], body: largest component above {self.body_threshold:g}."
        )
        return "\n".join([head, "", *lines, *(["", *(f"- {note}" for note in notes)] if notes else []), ""])

    def write(self, output_dir: str | os.PathLike[str], overwrite: bool = False) -> tuple[Path, Path]:
        """Write ``metrics.csv`` (a row for each slice and method) and ``metrics.md`` (the table).

        Args:
            output_dir: folder of both; made if needed.
            overwrite: replace existing files.

        Returns:
            The two paths.

        Raises:
            OutputError: if a file exists or cannot be written.
        """
        rows, table = Path(output_dir, "metrics.csv"), Path(output_dir, "metrics.md")
        with whole_file(rows, overwrite) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["subject", "slice", "method", *self.scores, MILLISECONDS], restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        with whole_file(table, overwrite) as part:
            part.write_text(self.table(), encoding="utf-8")
        return rows, table


def _count(things: Collection[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _title(column: str) -> str:
    if column not in METRICS:
        return column
    return f"{column} {'↑' if METRICS[column].higher_is_better else '↓'}"


def _mean_and_deviation(values: np.ndarray, decimals: int) -> str:
    if not len(values):
        return "–"
    deviation = f" ± {values.std(ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{values.mean():.{decimals}f}{deviation}"


class EvaluationHandler:
    """Evaluate every slice of every volume that a `monai.engines.SupervisedEvaluator` super-resolves.

    The volumes are taken at the end of an iteration, when MONAI has taken the batch apart: ``engine.state.output`` is
    a list of dictionaries with ``image`` (LR), ``label`` (truth) and ``pred`` (SR), each (1, X, Y, Z) in network
    intensities, so a postprocessing that goes back to the input's units must leave these three as they are.

    Args:
        evaluation: measures and collects.
        output_dir: where ``metrics.csv`` and ``metrics.md`` are written at the end.
        overwrite: replace existing files; otherwise their presence stops the run before it starts.
    """

    def __init__(
        self, evaluation: SuperResolutionEvaluation, output_dir: str | os.PathLike[str], overwrite: bool = False
    ) -> None:
        self.evaluation = evaluation
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite
        self._started = self._seconds = 0.0

    def attach(self, engine: Engine) -> None:
        """Register with an engine.

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
            for name in ("metrics.csv", "metrics.md"):
                refuse_to_overwrite(self.output_dir / name)
        self.evaluation.rows.clear()
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
            self.evaluation(lr, sr, hr, subject, range(len(hr)), 1e3 * self._seconds / num_slices)

    def _write(self, engine: Engine) -> None:
        rows, table = self.evaluation.write(self.output_dir, self.overwrite)
        logger.info("%s\n%s\n%s", rows, table, table.read_text(encoding="utf-8"))
