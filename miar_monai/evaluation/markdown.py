"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


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
    lines = [columns, *rows]
    header, *body = (f"| {' | '.join(map(str, cells))} |" for cells in lines)
    return "\n".join([header, "|---" * len(columns) + "|", *body])
