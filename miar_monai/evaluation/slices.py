"""How good the super-resolved slices are, beside what simpler methods make of the same input.

One CSV row for each slice and method, and a table of method x metric, mean ± standard deviation over the slices: one
for each contrast, if there are several, and one for all of them.
"""

from __future__ import annotations

import csv
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys, ImageMetaKey
from torch import Tensor

from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.io import volume_stem
from miar_monai.data.outputs import refuse_to_overwrite
from miar_monai.degradation import Degradation
from miar_monai.degradation.resampling import interpolation_matrix, resample
from miar_monai.errors import ConfigurationError
from miar_monai.evaluation.metrics import METRICS, Score, body_mask, create_metrics

__all__ = ["MILLISECONDS", "EvaluationHandler", "Row", "SuperResolutionEvaluation", "by_contrast"]

logger = logging.getLogger(__name__)

MILLISECONDS = "ms per slice"

Row = dict[str, Any]
"""What one method made of one slice: ``subject``, ``contrast`` (where known), ``slice``, ``method`` and the values."""


def by_contrast(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each contrast and, if there are several contrasts, all rows as ``"all contrasts"``.

    Rows without a contrast have the contrast ``""``.

    Example:
        >>> rows = [{"contrast": "t1", "slice": 0}, {"contrast": "t2", "slice": 0}]
        >>> {contrast: len(found) for contrast, found in by_contrast(rows).items()}
        {'t1': 1, 't2': 1, 'all contrasts': 2}
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("contrast", ""), []).append(row)
    return {**found, "all contrasts": list(rows)} if len(found) > 1 else found


class SuperResolutionEvaluation:
    """Compare super-resolved slices with the truth, beside nearest, bicubic and the damped linear inverse.

    A call measures these and MIAR, which has two rows: as it is, and made consistent with the LR slices in closed form
    (`SeparableOperator.prox`), which needs a degradation that is known. `add` measures any other methods.

    Everything is measured in network intensities, clamped to [0, 1] here and nowhere else. A metric whose weights or
    package are missing is named below the table, and the others go on.

    Args:
        degradation: what made the LR slices; gives the scale and the linear inverse.
        metrics: names from `miar_monai.evaluation.metrics.METRICS`.
        body_threshold: intensity in [0, 1] that the body exceeds and the background does not.
        damping: of the linear inverse, see `SeparableOperator.prox`.
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
        self.rows: list[Row] = []

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

    @property
    def baseline_methods(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The methods that learn nothing, by name: each maps LR slices (N, 1, h, w) to (N, 1, H, W)."""
        return {
            "nearest": lambda lr: self._interpolate(lr, "nearest-exact"),
            "bicubic": lambda lr: self._interpolate(lr, "bicubic"),
            "linear inverse": lambda lr: self.degradation.for_lr(lr).restore(lr, self.damping),
        }

    def baselines(self, lr: Tensor) -> dict[str, Tensor]:
        """Return what the methods that learn nothing make of LR slices (N, 1, h, w): each (N, 1, H, W)."""
        return {name: method(lr) for name, method in self.baseline_methods.items()}

    def _interpolate(self, lr: Tensor, mode: str) -> Tensor:
        sizes = zip(lr.shape[-2:], self.degradation.for_lr(lr).hr_shape, strict=True)
        rows, columns = (interpolation_matrix(*size, mode).to(lr) for size in sizes)
        return resample(lr, rows, columns)

    def make_consistent(self, sr: Tensor, lr: Tensor) -> Tensor:
        """Return the images closest to ``sr``, (N, 1, H, W), that degrade to ``lr``, (N, 1, h, w), but for damping."""
        return self.degradation.for_lr(lr).prox(sr, lr, self.damping)

    @torch.no_grad()
    def __call__(
        self,
        lr: Tensor,
        sr: Tensor,
        hr: Tensor,
        subject: str,
        slices: Sequence[int],
        milliseconds: float | None = None,
        contrast: str | None = None,
    ) -> None:
        """Add the rows of some slices of one volume: the baselines, MIAR, and MIAR made data-consistent.

        Args:
            lr: LR slices, (N, 1, h, w), in network intensities.
            sr: MIAR's slices, (N, 1, H, W).
            hr: true slices, (N, 1, H, W).
            subject: who it is; patients are counted by it.
            slices: index of each slice in its volume.
            milliseconds: time that MIAR took for a slice.
            contrast: of the volume, if the dataset has several.

        Raises:
            ConfigurationError: if the sizes do not belong together.
        """
        scaled = (*lr.shape[:2], *self.degradation.for_lr(lr).hr_shape)
        if not sr.shape == hr.shape == scaled:
            raise ConfigurationError(
                f"{subject}: the LR slices {tuple(lr.shape)}, the SR slices {tuple(sr.shape)} and the true slices "
                f"{tuple(hr.shape)} do not belong together at scale {self.degradation.scale}; "
                "make the LR slices from the true ones by the degradation that the evaluation uses."
            )
        lr, sr = (self._as_measured(x) for x in (lr, sr))
        estimates = {**self.baselines(lr), "MIAR": sr, "MIAR, data-consistent": self.make_consistent(sr, lr)}
        times = {} if milliseconds is None else {"MIAR": milliseconds}
        self.add(estimates, hr, subject, slices, contrast, times)

    @torch.no_grad()
    def add(
        self,
        estimates: Mapping[str, Tensor],
        hr: Tensor,
        subject: str,
        slices: Sequence[int],
        contrast: str | None = None,
        milliseconds: Mapping[str, float] | None = None,
    ) -> None:
        """Add a row for each method and slice of some slices of one volume.

        Args:
            estimates: what each method made of them, (N, 1, H, W), in network intensities.
            hr: true slices, (N, 1, H, W).
            subject: who it is; patients are counted by it.
            slices: index of each slice in its volume.
            contrast: of the volume, if the dataset has several.
            milliseconds: time that a slice took, of the methods for which it is known.

        Raises:
            ConfigurationError: if an estimate has another size than the true slices, or their number is another.

        Example:
            >>> evaluation = SuperResolutionEvaluation(Degradation(), ["PSNR"])
            >>> hr = torch.full((1, 1, 16, 16), 0.5)
            >>> evaluation.add({"brighter": hr + 0.1}, hr, "case", [40], contrast="t2")
            >>> evaluation.rows[0]["contrast"], evaluation.rows[0]["method"], round(evaluation.rows[0]["PSNR"], 2)
            ('t2', 'brighter', 20.0)
        """
        for method, estimate in estimates.items():
            if estimate.shape != hr.shape or len(hr) != len(slices):
                raise ConfigurationError(
                    f"{subject}: {method} has slices {tuple(estimate.shape)}, the truth {tuple(hr.shape)}, and "
                    f"{len(slices)} are named: equal shapes and a name for each slice are needed; "
                    "check that the method belongs to this scale."
                )
        plain = {method: self._as_measured(estimate) for method, estimate in estimates.items()}
        where = {"subject": subject} | ({"contrast": contrast} if contrast else {})
        for method, values in self._measure(plain, self._as_measured(hr)).items():
            if milliseconds is not None and method in milliseconds:
                values[MILLISECONDS] = [milliseconds[method]] * len(hr)
            for i, index in enumerate(slices):
                row = {name: column[i] for name, column in values.items()}
                self.rows.append({**where, "slice": index, "method": method, **row})

    def _as_measured(self, images: Tensor) -> Tensor:
        """Return a plain tensor on the metrics' device."""
        return images.as_subclass(Tensor).to(self.device, torch.float32)

    def _measure(self, estimates: Mapping[str, Tensor], hr: Tensor) -> dict[str, dict[str, list[float]]]:
        """Return the values of all slices for each method and metric."""
        values: dict[str, dict[str, list[float]]] = {method: {name: [] for name in self.scores} for method in estimates}
        for start in range(0, len(hr), self.batch_size):
            batch = slice(start, start + self.batch_size)
            some_hr = hr[batch].clamp(0, 1)
            body = body_mask(some_hr, self.body_threshold)
            for method, sr in estimates.items():
                for name, score in self.scores.items():
                    values[method][name] += score(sr[batch].clamp(0, 1), some_hr, body).tolist()
        return values

    def table(self) -> str:
        """Return the Markdown table: method x metric, mean ± standard deviation over the slices, medians of times.

        Several contrasts have a table each, and one for all. Infinite values (slices without an error) and slices
        without a body have no place in a mean; how many values were left out is said below the table, and so is every
        missing metric.
        """
        sections = by_contrast(self.rows)
        parts = []
        for contrast, rows in sections.items():
            parts += [f"### {contrast}", ""] * (len(sections) > 1) + [*self._section(rows), ""]
        missing = [f"- {sentence}" for sentence in self.missing]
        return "\n".join(parts + missing + [""] * bool(missing))

    def _section(self, rows: Sequence[Row]) -> list[str]:
        """Return the lines of the table of some rows."""
        columns = [*self.scores] + [MILLISECONDS] * any(MILLISECONDS in row for row in rows)
        notes = []
        lines = [f"| method | {' | '.join(map(_title, columns))} |", "|---" * (len(columns) + 1) + "|"]
        numbers = Counter(row["method"] for row in rows)
        for method in numbers:
            cells = []
            for column in columns:
                found = [row[column] for row in rows if row["method"] == method and column in row]
                finite = np.array([value for value in found if np.isfinite(value)], dtype=np.float64)
                cells.append(_cell(finite, column))
                if len(finite) < len(found):
                    notes.append(f"- {column} of {method}: mean over the {len(finite)} of {len(found)} finite values.")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        # each slice has a row a method; its index says less, since a patient may have several volumes
        slices, patients = max(numbers.values(), default=0), {row["subject"] for row in rows}
        contrasts = sorted({row["contrast"] for row in rows if "contrast" in row})
        head = (
            f"{_count(slices, 'slice')} of {_count(len(patients), 'patient')}"
            f"{''.join(f', {contrast}' for contrast in contrasts)}; mean ± standard deviation over the slices, "
            f"intensities clamped to [0, 1], body: largest component above {self.body_threshold:g}."
        )
        return [head, "", *lines, *(["", *notes] if notes else [])]

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
        table = Path(output_dir, "metrics.md")
        rows = self.write_rows(Path(output_dir, "metrics.csv"), overwrite)
        with atomic_file(table, overwrite) as part:
            part.write_text(self.table(), encoding="utf-8")
        return rows, table

    def write_rows(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a CSV file with a row for each slice and method.

        Args:
            path: the file; its folder is made if needed.
            overwrite: replace an existing file.

        Returns:
            ``path``.

        Raises:
            OutputError: if the file exists or cannot be written.
        """
        contrast = ["contrast"] * any("contrast" in row for row in self.rows)
        names = ["subject", *contrast, "slice", "method", *self.scores, MILLISECONDS]
        with atomic_file(path, overwrite) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        return Path(path)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _title(column: str) -> str:
    if column not in METRICS:
        return column
    return f"{column} {'↑' if METRICS[column].higher_is_better else '↓'}"


def _cell(values: np.ndarray, column: str) -> str:
    if not len(values):
        return "–"
    if column == MILLISECONDS:  # the first batch takes longer, and so do some others, for reasons of the machine
        return f"{np.median(values):.1f}"
    decimals = METRICS[column].decimals
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
            milliseconds = 1e3 * self._seconds / num_slices
            self.evaluation(lr, sr, hr, subject, range(len(hr)), milliseconds, batch.get("contrast"))

    def _write(self, engine: Engine) -> None:
        rows, table = self.evaluation.write(self.output_dir, self.overwrite)
        logger.info("%s\n%s\n%s", rows, table, table.read_text(encoding="utf-8"))
