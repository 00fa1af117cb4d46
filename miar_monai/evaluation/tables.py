"""Tables of measured slices: rows by slice and method, and their means in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from miar_monai.evaluation.metrics import METRICS

__all__ = [
    "MILLISECONDS",
    "Row",
    "by_contrast",
    "column_title",
    "columns_of",
    "finite_values",
    "markdown_table",
    "results_section",
    "results_table",
    "summary",
]

MILLISECONDS = "ms per slice"

Row = dict[str, Any]
"""The values of one slice and method: ``subject``, ``contrast`` (if known), ``slice``, ``method`` and the metrics."""


def by_contrast(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each contrast and, if there are several contrasts, all rows as ``"all contrasts"``.

    Rows without a contrast have the contrast ``""``.

    Example:
        >>> rows = [{"contrast": "t1", "slice": 0}, {"contrast": "t2", "slice": 0}]
        >>> {contrast: len(section) for contrast, section in by_contrast(rows).items()}
        {'t1': 1, 't2': 1, 'all contrasts': 2}
    """
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.get("contrast", ""), []).append(row)
    return {**sections, "all contrasts": list(rows)} if len(sections) > 1 else sections


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table.

    Args:
        columns: titles.
        rows: cells.

    Example:
        >>> print(markdown_table(["method", "PSNR"], [["bicubic", 25.1]]))
        | method | PSNR |
        |---|---|
        | bicubic | 25.1 |
    """
    header, *body = (f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows))
    return "\n".join([header, "|---" * len(columns) + "|", *body])


def results_section(rows: Sequence[Row], metrics: Sequence[str], body_threshold: float) -> list[str]:
    """Return, as lines of Markdown, numbers of slices and patients, the `results_table`, and notes on missing values.

    Args:
        rows: measured rows.
        metrics: names of the metrics.
        body_threshold: intensity that the body exceeds.
    """
    # the index of a slice does not identify it, since a patient may have several volumes
    num_slices = max(Counter(row["method"] for row in rows).values(), default=0)
    patients = {row["subject"] for row in rows}
    contrasts = sorted({row["contrast"] for row in rows if "contrast" in row})
    counts = f"{_count(num_slices, 'slice')} of {_count(len(patients), 'patient')}"
    head = (
        f"{', '.join([counts, *contrasts])}; mean ± standard deviation over the slices, intensities clamped to [0, 1], "
        f"body: largest component above {body_threshold:g}."
    )
    table, notes = results_table(rows, metrics)
    return [head, "", table, *(["", *notes] if notes else [])]


def results_table(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[str, list[str]]:
    """Return the table of methods and metrics: mean ± standard deviation over the slices, medians of times.

    Args:
        rows: measured rows.
        metrics: names of the metrics.

    Returns:
        The table in Markdown, and a note for each cell with values that are not finite, which are left out.
    """
    columns, notes, cells = columns_of(rows, metrics), [], []
    for method in dict.fromkeys(row["method"] for row in rows):
        line, own = [method], [row for row in rows if row["method"] == method]
        for column in columns:
            finite, number = finite_values(own, column), sum(column in row for row in own)
            line.append(summary(finite, column)[1])
            if len(finite) < number:
                notes.append(f"- {column} of {method}: mean over the {len(finite)} of {number} finite values.")
        cells.append(line)
    return markdown_table(["method", *map(column_title, columns)], cells), notes


def columns_of(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """Return the columns of a table: the metrics, and the time if a method was timed."""
    return [*metrics, MILLISECONDS] if any(MILLISECONDS in row for row in rows) else list(metrics)


def finite_values(rows: Iterable[Row], column: str) -> np.ndarray:
    """Return the finite values of a column, in the order of the rows that have it."""
    values = np.array([row[column] for row in rows if column in row], dtype=np.float64)
    return values[np.isfinite(values)]


def summary(values: np.ndarray, column: str) -> tuple[float, str]:
    """Return the mean of finite values, the median of times, and its text with the standard deviation.

    Args:
        values: the finite values of a column.
        column: name of a metric, or `MILLISECONDS`.

    Returns:
        The number, NaN without values, and the text.

    Example:
        >>> summary(np.array([30.0, 32.0]), "PSNR")
        (31.0, '31.00 ± 1.41')
    """
    if not len(values):
        return float("nan"), "–"
    if column == MILLISECONDS:  # the median, since the first batch and a few others are much slower
        return float(np.median(values)), f"{np.median(values):.1f}"
    decimals = METRICS[column].decimals
    deviation = f" ± {values.std(ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return float(values.mean()), f"{values.mean():.{decimals}f}{deviation}"


def column_title(column: str) -> str:
    """Return the title of a column: the direction of improvement follows the name of a metric."""
    if column not in METRICS:
        return column
    return f"{column} {'↑' if METRICS[column].higher_is_better else '↓'}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
