"""Tables of measured slices: rows by slice and method, and their means in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from miar_monai.evaluation.metrics import METRICS

__all__ = ["MILLISECONDS", "Row", "by_contrast", "markdown_table", "results_section", "results_table"]

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
    columns, notes, cells = list(metrics), [], []
    if any(MILLISECONDS in row for row in rows):
        columns.append(MILLISECONDS)
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for column in columns:
            values = [row[column] for row in rows if row["method"] == method and column in row]
            finite = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
            line.append(_cell(finite, column))
            if len(finite) < len(values):
                notes.append(f"- {column} of {method}: mean over the {len(finite)} of {len(values)} finite values.")
        cells.append(line)
    return markdown_table(["method", *map(_title, columns)], cells), notes


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _title(column: str) -> str:
    if column not in METRICS:
        return column
    return f"{column} {'↑' if METRICS[column].higher_is_better else '↓'}"


def _cell(values: np.ndarray, column: str) -> str:
    if not len(values):
        return "–"
    if column == MILLISECONDS:  # the median, since the first batch and a few others are much slower
        return f"{np.median(values):.1f}"
    decimals = METRICS[column].decimals
    deviation = f" ± {values.std(ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{values.mean():.{decimals}f}{deviation}"
