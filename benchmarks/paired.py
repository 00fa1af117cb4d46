"""Paired differences between two methods on the same slices, with confidence intervals over patients.

Patients are the random sample. The intervals are a paired t-interval over their mean differences, and a hierarchical
bootstrap that draws patients and then slices of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from miar_monai.evaluation import Row
from miar_monai.evaluation.metrics import METRICS
from miar_monai.evaluation.tables import markdown_table

__all__ = [
    "EXPLANATION",
    "INTERVALS",
    "Paired",
    "difference",
    "differences_table",
    "headline_table",
    "jackknife",
    "level",
    "log_ratio",
    "paired",
    "pairs",
    "result_cells",
]

CONFIDENCE = 0.95
RESAMPLES = 4000
INTERVALS = ("paired t", "bootstrap", "patients")
"""Titles of the columns that follow an estimate."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""From the means of two methods, (..., 2), to a comparison, (...)."""

EXPLANATION = """\
Mean over the patients of the difference of their means over slices. In brackets 95 % intervals: of a paired t-test over
the patients, and of a hierarchical bootstrap (patients, then slices of each; percentiles, too narrow for few patients).
An interval that includes 0 (a ratio: 1) means that these patients do not show which of the two methods is better; it
does not mean that they are equal."""


class Paired(NamedTuple):
    """A comparison of two methods."""

    estimate: float
    t_interval: tuple[float, float]
    """95 %, paired t over the patients; NaN for a single patient."""
    bootstrap: tuple[float, float]
    """95 %, hierarchical bootstrap; NaN for a single patient."""
    patients: int

    def exp(self) -> Paired:
        """Return the ratio of a comparison of logarithms."""
        low, high = np.exp(self.t_interval), np.exp(self.bootstrap)
        return Paired(float(np.exp(self.estimate)), tuple(low.tolist()), tuple(high.tolist()), self.patients)


def difference(means: np.ndarray) -> np.ndarray:
    """Return the means of the first method minus those of the second."""
    return means[..., 0] - means[..., 1]


def level(means: np.ndarray) -> np.ndarray:
    """Return the means of the first method alone."""
    return means[..., 0]


def log_ratio(means: np.ndarray) -> np.ndarray:
    """Return the logarithm of the ratio of the first method's means to the second's."""
    return np.log(means[..., 0] / means[..., 1])


def pairs(rows: Sequence[Row], first: str, second: str, metric: str) -> list[np.ndarray]:
    """Return both methods' values of a metric on the slices of each patient, (slices, 2).

    Slices with a value that is not finite are left out, as are patients without other slices.

    Args:
        rows: of a `miar_monai.evaluation.SuperResolutionEvaluation`, in their original order.
        first: a method.
        second: another method.
        metric: a column.
    """
    of_first, of_second = ([row for row in rows if row["method"] == method] for method in (first, second))
    found: dict[str, list[tuple[float, float]]] = {}
    for a, b in zip(of_first, of_second, strict=True):
        if any(a.get(key) != b.get(key) for key in ("subject", "contrast", "slice")):
            raise ValueError(f"{first} and {second} were not measured on the same slices in the same order")
        if np.isfinite([a[metric], b[metric]]).all():
            found.setdefault(a["subject"], []).append((a[metric], b[metric]))
    return [np.array(values, dtype=np.float64) for values in found.values()]


def paired(patients: Sequence[np.ndarray], statistic: Statistic = difference, seed: int = 0) -> Paired:
    """Compare two methods: the mean over patients of a statistic of their means over slices.

    Args:
        patients: the values of both methods on the slices of each patient, (slices, 2).
        statistic: `difference`, `log_ratio` or `level`.
        seed: seed of the bootstrap.

    Example:
        >>> values = [np.array([[31.0, 30.0], [33.0, 32.0]]), np.array([[28.0, 25.0]])]
        >>> result = paired(values)
        >>> result.estimate, [round(float(bound), 1) for bound in result.t_interval]
        (2.0, [-10.7, 14.7])
    """
    values = np.array([statistic(slices.mean(axis=0)) for slices in patients])
    number = len(values)
    if number < 2:
        undefined = (float("nan"), float("nan"))
        return Paired(float(values.mean()) if number else float("nan"), undefined, undefined, number)
    estimate = values.mean()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1) * stats.sem(values)
    resampled = _resampled(patients, statistic, np.random.default_rng(seed))
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Paired(float(estimate), (float(estimate - half), float(estimate + half)), (float(low), float(high)), number)


def jackknife(estimate: float, without: Sequence[float]) -> Paired:
    """Return an estimate that is no mean over patients, with the interval of the jackknife, and no bootstrap.

    Args:
        estimate: from all patients.
        without: the same from all patients but one, for each patient.

    Reference:
        Efron and Stein, The Jackknife Estimate of Variance, 1981.

    Example:
        >>> values = np.array([1.0, 2.0, 6.0])
        >>> result = jackknife(values.mean(), [np.delete(values, i).mean() for i in range(3)])
        >>> result.t_interval == paired(values[:, None, None], level).t_interval  # of a mean
        True
    """
    number, undefined = len(without), (float("nan"), float("nan"))
    if number < 2:
        return Paired(estimate, undefined, undefined, number)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1) * (number - 1) * stats.sem(without)
    return Paired(estimate, (float(estimate - half), float(estimate + half)), undefined, number)


def _resampled(patients: Sequence[np.ndarray], statistic: Statistic, generator: np.random.Generator) -> np.ndarray:
    """Return the estimates of hierarchical bootstrap samples, (RESAMPLES,)."""
    drawn = generator.integers(len(patients), size=(RESAMPLES, len(patients)))
    values = np.empty(drawn.shape)
    for index, slices in enumerate(patients):
        chosen = drawn == index
        which = generator.integers(len(slices), size=(np.count_nonzero(chosen), len(slices)))
        values[chosen] = statistic(slices[which].mean(axis=1))
    return values.mean(axis=1)


def differences_table(rows: Sequence[Row], ours: Sequence[str], peer: str, metrics: Sequence[str]) -> str:
    """Return the Markdown table of some methods minus a peer, in each metric.

    Args:
        rows: measured rows.
        ours: the methods.
        peer: the method that is subtracted.
        metrics: columns.
    """
    cells = [
        result_cells(method, metric, paired(pairs(rows, method, peer, metric)), METRICS[metric].decimals)
        for method in ours
        for metric in metrics
    ]
    return markdown_table((f"minus {peer}", "metric", "difference", *INTERVALS), cells)


def headline_table(rows: Sequence[Row], ours: Sequence[str], peer: str) -> str:
    """Return a Markdown table of the ratio of LPIPS (its geometric mean over patients) and the difference of PSNR.

    Args:
        rows: measured rows, with PSNR and LPIPS.
        ours: the methods.
        peer: the method they are compared with.
    """
    cells = []
    for method in ours:
        ratio = paired(pairs(rows, method, peer, "LPIPS"), log_ratio).exp()
        psnr = paired(pairs(rows, method, peer, "PSNR"))
        cells.append(result_cells(method, f"LPIPS, times that of {peer}", ratio, 2, sign=""))
        cells.append(result_cells(method, f"PSNR, minus that of {peer} (dB)", psnr, 2))
    return markdown_table(("method", "quantity", "estimate", *INTERVALS), cells)


def result_cells(method: str, quantity: str, result: Paired, decimals: int, sign: str = "+") -> tuple[str, ...]:
    """Return the cells of a comparison: method, quantity, estimate, both intervals, and number of patients.

    Args:
        method: first cell.
        quantity: second cell.
        result: the comparison.
        decimals: of its numbers.
        sign: format of their sign.
    """

    def number(value: float) -> str:
        return "–" if np.isnan(value) else f"{value:{sign}.{decimals}f}"

    def interval(low: float, high: float) -> str:
        return "–" if np.isnan(low) else f"[{number(low)}, {number(high)}]"

    intervals = interval(*result.t_interval), interval(*result.bootstrap)
    return method, quantity, number(result.estimate), *intervals, str(result.patients)
