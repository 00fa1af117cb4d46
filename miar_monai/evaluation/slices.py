"""Quality of super-resolved slices, compared with simple baselines on the same input.

Results are one CSV row for each slice and method, and tables of means by method and metric: one for each contrast, if
there are several, and one for all of them.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from miar_monai.data.atomic_write import atomic_file
from miar_monai.degradation import Degradation
from miar_monai.degradation.resampling import interpolation_matrix, resample
from miar_monai.errors import ConfigurationError
from miar_monai.evaluation.metrics import METRICS, Score, body_mask, create_metrics
from miar_monai.evaluation.tables import MILLISECONDS, Row, by_contrast, results_section

__all__ = ["SuperResolutionEvaluation"]


class SuperResolutionEvaluation:
    """Compares MIAR and three baselines (nearest, bicubic, damped linear inverse) with the true slices.

    A call adds rows for these methods. MIAR has two rows: its result, and the result after data consistency with the LR
    slices in closed form (`SeparableOperator.prox`), which requires a known degradation. `add` adds any other methods.

    All metrics are computed in network intensities, clamped to [0, 1] here. Metrics whose weights or package are
    missing are left out and listed below the table.

    Args:
        degradation: the degradation of the LR slices; defines the scale and the linear inverse.
        metrics: names from `miar_monai.evaluation.metrics.METRICS`.
        body_threshold: intensity in [0, 1] that the body exceeds and the background does not.
        damping: damping of the linear inverse, see `SeparableOperator.prox`.
        device: device of the metrics.
        batch_size: number of slices in a batch of the metrics.

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
        """The available metrics by name."""
        return self._created[0]

    @property
    def missing(self) -> list[str]:
        """A sentence for each metric that is not available."""
        return self._created[1]

    @property
    def baseline_methods(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The baselines by name: each maps LR slices (N, 1, h, w) to (N, 1, H, W)."""
        return {
            "nearest": lambda lr: self._interpolate(lr, "nearest-exact"),
            "bicubic": lambda lr: self._interpolate(lr, "bicubic"),
            "linear inverse": lambda lr: self.degradation.for_lr(lr).restore(lr, self.damping),
        }

    def baselines(self, lr: Tensor) -> dict[str, Tensor]:
        """Return the results of the baselines for LR slices (N, 1, h, w): each (N, 1, H, W)."""
        return {name: method(lr) for name, method in self.baseline_methods.items()}

    def _interpolate(self, lr: Tensor, mode: str) -> Tensor:
        sizes = zip(lr.shape[-2:], self.degradation.for_lr(lr).hr_shape, strict=True)
        rows, columns = (interpolation_matrix(*size, mode).to(lr) for size in sizes)
        return resample(lr, rows, columns)

    def make_consistent(self, sr: Tensor, lr: Tensor) -> Tensor:
        """Return the images closest to ``sr``, (N, 1, H, W), that degrade to ``lr``, (N, 1, h, w), up to damping."""
        return self.degradation.for_lr(lr).prox(sr, lr, self.damping)

    @torch.no_grad()
    def estimates(self, lr: Tensor, sr: Tensor) -> dict[str, Tensor]:
        """Return the compared slices by method, (N, 1, H, W): the baselines, MIAR, and MIAR made data-consistent.

        Args:
            lr: LR slices, (N, 1, h, w), in network intensities.
            sr: MIAR's slices, (N, 1, H, W).
        """
        lr, sr = (self._as_measured(x) for x in (lr, sr))
        return {**self.baselines(lr), "MIAR": sr, "MIAR, data-consistent": self.make_consistent(sr, lr)}

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
            subject: identifies the patient.
            slices: index of each slice in its volume.
            milliseconds: MIAR's time per slice.
            contrast: contrast of the volume, if the data set has several.

        Raises:
            ConfigurationError: if the sizes are inconsistent.
        """
        expected = (*lr.shape[:2], *self.degradation.for_lr(lr).hr_shape)
        if not sr.shape == hr.shape == expected:
            raise ConfigurationError(
                f"{subject}: the LR slices {tuple(lr.shape)}, the SR slices {tuple(sr.shape)} and the true slices "
                f"{tuple(hr.shape)} are inconsistent at scale {self.degradation.scale}; "
                "make the LR slices from the true ones by the degradation of the evaluation."
            )
        times = {} if milliseconds is None else {"MIAR": milliseconds}
        self.add(self.estimates(lr, sr), hr, subject, slices, contrast, times)

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
            estimates: results by method, (N, 1, H, W), in network intensities.
            hr: true slices, (N, 1, H, W).
            subject: identifies the patient.
            slices: index of each slice in its volume.
            contrast: contrast of the volume, if the data set has several.
            milliseconds: time per slice of the timed methods.

        Raises:
            ConfigurationError: if the shapes of an estimate and of the true slices differ, or the number of indices
                does.

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
                    f"there are {len(slices)} indices: equal shapes and an index for each slice are needed; check that "
                    "the method is for this scale."
                )
        plain = {method: self._as_measured(estimate) for method, estimate in estimates.items()}
        volume = {"subject": subject, "contrast": contrast} if contrast else {"subject": subject}
        for method, values in self._measure(plain, self._as_measured(hr)).items():
            if milliseconds is not None and method in milliseconds:
                values[MILLISECONDS] = [milliseconds[method]] * len(hr)
            for i, index in enumerate(slices):
                row = {name: column[i] for name, column in values.items()}
                self.rows.append({**volume, "slice": index, "method": method, **row})

    def _as_measured(self, images: Tensor) -> Tensor:
        """Return a plain float32 tensor on the device of the metrics."""
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
        """Return the table of methods and metrics in Markdown: mean ± standard deviation over slices, medians of times.

        With several contrasts, there is one table per contrast and one for all. Means are over finite values: the PSNR
        of identical slices is infinite, and body metrics need a body. Notes below the table list values and metrics
        that are left out.
        """
        sections, lines = by_contrast(self.rows), []
        for contrast, rows in sections.items():
            if len(sections) > 1:
                lines += [f"### {contrast}", ""]
            lines += [*results_section(rows, list(self.scores), self.body_threshold), ""]
        if self.missing:
            lines += [*(f"- {sentence}" for sentence in self.missing), ""]
        return "\n".join(lines)

    def write(self, output_dir: str | os.PathLike[str], overwrite: bool = False) -> tuple[Path, Path]:
        """Write ``metrics.csv`` (a row for each slice and method) and ``metrics.md`` (the table).

        Args:
            output_dir: folder of both; created if needed.
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
            path: the file; its folder is created if needed.
            overwrite: replace an existing file.

        Returns:
            ``path``.

        Raises:
            OutputError: if the file exists or cannot be written.
        """
        names = ["subject", "contrast", "slice", "method", *self.scores, MILLISECONDS]
        if not any("contrast" in row for row in self.rows):
            names.remove("contrast")
        with atomic_file(path, overwrite) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        return Path(path)
