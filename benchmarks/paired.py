"""Differences between two methods that were measured on the same slices of the same patients, with intervals.

The patients are what was drawn at random, so an interval is about patients: a paired t-interval over their mean
differences, and a hierarchical bootstrap, which draws patients and then slices of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from miar_monai.evaluation import Row
from miar_monai.evaluation.metrics import METRICS

__all__ = ["EXPLANATION", "Paired", "difference", "differences_table", "headline_table", "log_ratio", "paired", "pairs"]

CONFIDENCE = 0.95
RESAMPLES = 4000
Statistic = Callable[[np.ndarray], np.ndarray]
"""From the means of two methods, (..., 2), to what compares them, (...)."""

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
        """Return the comparison as a ratio, if it was of logarithms."""
        low, high = np.exp(self.t_interval), np.exp(self.bootstrap)
        return Paired(float(np.exp(self.estimate)), tuple(low.tolist()), tuple(high.tolist()), self.patients)


def difference(means: np.ndarray) -> np.ndarray:
    """Return the first method's means less the second's."""
    return means[..., 0] - means[..., 1]


def log_ratio(means: np.ndarray) -> np.ndarray:
    """Return the logarithm of the first method's means over the second's."""
    return np.log(means[..., 0] / means[..., 1])


def pairs(rows: Sequence[Row], first: str, second: str, metric: str) -> list[np.ndarray]:
    """Return both methods' values of a metric on the slices of each patient, (slices, 2).

    Slices on which a value is not finite are left out, and so is a patient who has no others.

    Args:
        rows: of a `miar_monai.evaluation.SuperResolutionEvaluation`, in the order in which they were added.
        first: a method.
        second: another.
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
    """Compare two methods: the mean over patients of what the statistic says of their means over slices.

    Args:
        patients: the values of both methods on the slices of each patient, (slices, 2).
        statistic: `difference`, or `log_ratio`.
        seed: of the bootstrap.

    Example:
        >>> values = [np.array([[31.0, 30.0], [33.0, 32.0]]), np.array([[28.0, 25.0]])]
        >>> result = paired(values)
        >>> result.estimate, [round(float(bound), 1) for bound in result.t_interval]
        (2.0, [-10.7, 14.7])
    """
    values = np.array([statistic(slices.mean(axis=0)) for slices in patients])
    number = len(values)
    if number < 2:
        unknown = (float("nan"), float("nan"))
        return Paired(float(values.mean()) if number else float("nan"), unknown, unknown, number)
    estimate = values.mean()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1) * stats.sem(values)
    resampled = _resampled(patients, statistic, np.random.default_rng(seed))
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Paired(float(estimate), (float(estimate - half), float(estimate + half)), (float(low), float(high)), number)


def _resampled(patients: Sequence[np.ndarray], statistic: Statistic, generator: np.random.Generator) -> np.ndarray:
    """Return the estimates of hierarchical bootstrap samples, (RESAMPLES,)."""
    drawn = generator.integers(len(patients), size=(RESAMPLES, len(patients)))
    values = np.empty(drawn.shape)
    for index, slices in enumerate(patients):
        chosen = drawn == index
        which = generator.integers(len(slices), size=(np.count_nonzero(chosen), len(slices)))
        values[chosen] = statistic(slices[which].mean(axis=1))
    return values.mean(axis=1)


def differences_table(rows: Sequence[Row], ours: Sequence[str], peer: str, metrics: Sequence[str]) -> list[str]:
    """Return the lines of the Markdown table of some methods minus a peer, in each metric.

    Args:
        rows: measured rows.
        ours: the methods.
        peer: the method that is subtracted.
        metrics: columns.
    """
    lines = [f"| minus {peer} | metric | difference | paired t | bootstrap | patients |", "|---" * 6 + "|"]
    for method in ours:
        for metric in metrics:
            lines.append(_line(method, metric, paired(pairs(rows, method, peer, metric)), METRICS[metric].decimals))
    return lines


def headline_table(rows: Sequence[Row], ours: Sequence[str], peer: str) -> list[str]:
    """Return the lines of a table of the ratio of LPIPS (its geometric mean over patients) and the difference of PSNR.

    Args:
        rows: measured rows, with PSNR and LPIPS.
        ours: the methods.
        peer: what they are compared with.
    """
    lines = ["| method | what | estimate | paired t | bootstrap | patients |", "|---" * 6 + "|"]
    for method in ours:
        ratio = paired(pairs(rows, method, peer, "LPIPS"), log_ratio).exp()
        psnr = paired(pairs(rows, method, peer, "PSNR"))
        lines.append(_line(method, f"LPIPS, times that of {peer}", ratio, 2, sign=""))
        lines.append(_line(method, f"PSNR, minus that of {peer} (dB)", psnr, 2))
    return lines


def _line(method: str, what: str, result: Paired, decimals: int, sign: str = "+") -> str:
    def number(value: float) -> str:
        return "–" if np.isnan(value) else f"{value:{sign}.{decimals}f}"

    def interval(low: float, high: float) -> str:
        return "–" if np.isnan(low) else f"[{number(low)}, {number(high)}]"

    cells = (method, what, number(result.estimate), interval(*result.t_interval), interval(*result.bootstrap))
    return f"| {' | '.join(cells)} | {result.patients} |"
