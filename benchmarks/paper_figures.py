"""Figures of the documents that show tokenizers and training runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miar_monai.visualize.drawing import LINE_HEIGHT, PAGE_WIDTH, color_levels, draw_slice, page_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "codebook_map", "layer_wise", "training_curves"]

Curve = tuple[Sequence[float], Sequence[float]]
"""Abscissas and ordinates of a line."""


def layer_wise(
    rows: Mapping[str, Mapping[str, np.ndarray]],
    truth: np.ndarray,
    psnr: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    overwrite: bool = False,
) -> Path:
    """Draw the reconstructions of tokenizers from the first scales of a slice, and PSNR over the number of scales.

    Args:
        rows: for each tokenizer by name, the reconstructions by caption, (X, Y) each, from few scales to all; the same
            number for each tokenizer.
        truth: the slice, (X, Y).
        psnr: for each tokenizer, the mean PSNR from 1, 2, … scales, in dB.
        path: the picture, .png or another format of matplotlib. Its folder is created if needed.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.

    Reference:
        Paper Fig. 3a.
    """
    from matplotlib.ticker import MaxNLocator

    num_columns = len(next(iter(rows.values())))
    height = truth.shape[1] / truth.shape[0] * PAGE_WIDTH / num_columns + LINE_HEIGHT
    gray = color_levels("gray", 64, truth.min(), np.percentile(truth, 99.8))
    with page_figure(path, (len(rows) + 1) * height, overwrite) as figure:
        grid = figure.add_gridspec(len(rows) + 1, num_columns)
        for i, (name, images) in enumerate(rows.items()):
            for j, (caption, image) in enumerate(images.items()):
                ax = _captioned(figure.add_subplot(grid[i, j]), image, caption, gray)
                ax.set_ylabel(name if j == 0 else "")
        _captioned(figure.add_subplot(grid[-1, -1]), truth, "truth", gray)
        plot = figure.add_subplot(grid[-1, :-1])
        for name, values in psnr.items():
            plot.plot(range(1, len(values) + 1), values, marker="o", markersize=4, label=name)
        plot.set(xlabel="number of scales", ylabel="mean PSNR (dB)")
        plot.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(psnr) > 1:
            plot.legend(loc="lower right")
    return Path(path)


def codebook_map(
    points: np.ndarray, counts: np.ndarray, sides: Sequence[int], path: str | os.PathLike[str], overwrite: bool = False
) -> Path:
    """Draw the codes of a codebook as points, colored by their number of uses and by the scale that uses them most.

    Args:
        points: position of each code, (V, 2).
        counts: number of uses of each code at each scale, (K, V).
        sides: sides of the token maps, coarse to fine, (K,).
        path: the picture, .png or another format of matplotlib. Its folder is created if needed.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.

    Reference:
        Paper Fig. 3d.
    """
    import matplotlib
    from matplotlib.colors import BoundaryNorm, LogNorm

    total, num_scales = counts.sum(axis=0), len(sides)
    used = total > 0
    scales = matplotlib.colormaps["turbo"].resampled(num_scales)
    with page_figure(path, 0.5 * PAGE_WIDTH, overwrite) as figure:
        left, right = figure.subplots(1, 2)
        for ax in (left, right):
            ax.scatter(*points[~used].T, s=2, color="lightgray")
            ax.set(xticks=[], yticks=[])
            ax.set_aspect("equal", adjustable="datalim")
        often = left.scatter(*points[used].T, s=3, c=total[used], norm=LogNorm())
        left.set_title(f"{used.sum()} of {len(used)} codes in use")
        figure.colorbar(often, ax=left, label="uses of a code", orientation="horizontal", aspect=40)
        norm = BoundaryNorm(np.arange(num_scales + 1) - 0.5, num_scales)
        most = right.scatter(*points[used].T, s=3, c=counts[:, used].argmax(axis=0), cmap=scales, norm=norm)
        right.set_title("scale that uses a code most")
        bar = figure.colorbar(most, ax=right, label="side of the scale", orientation="horizontal", aspect=40)
        bar.set_ticks(range(num_scales), labels=[str(side) for side in sides])
    return Path(path)


def training_curves(
    runs: Mapping[str, Mapping[str, Mapping[str, Curve]]], path: str | os.PathLike[str], overwrite: bool = False
) -> Path:
    """Draw the curves of training runs: a row for each stage, a plot for each quantity, a line for each run.

    Positive quantities that span more than a factor of ten have a logarithmic axis.

    Args:
        runs: for each run by name, for each stage by name, the curves over the iterations by title.
        path: the picture, .png or another format of matplotlib. Its folder is created if needed.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.

    Reference:
        Paper Fig. 3c.
    """
    from matplotlib.lines import Line2D

    rows: dict[str, dict[str, list[tuple[str, Curve]]]] = {}  # stage, title, lines by color
    for i, stages in enumerate(runs.values()):
        for stage, curves in stages.items():
            for title, curve in curves.items():
                rows.setdefault(stage, {}).setdefault(title, []).append((f"C{i}", curve))
    num_columns = max(map(len, rows.values()))
    with page_figure(path, 1.9 * len(rows) + 2 * LINE_HEIGHT, overwrite) as figure:
        axes = figure.subplots(len(rows), num_columns, squeeze=False, sharex="row")
        for row, (stage, plots) in zip(axes, rows.items(), strict=True):
            for ax in row[len(plots) :]:
                ax.remove()
            for ax, (title, lines) in zip(row, plots.items(), strict=False):
                _draw_lines(ax, title, lines)
            row[0].set(xlabel="iteration", ylabel=stage)
        if len(runs) > 1:
            handles = [Line2D([], [], color=f"C{i}", label=run) for i, run in enumerate(runs)]
            figure.legend(handles=handles, loc="outside upper center", ncols=len(runs))
    return Path(path)


def _draw_lines(ax: Axes, title: str, lines: Sequence[tuple[str, Curve]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for color, curve in lines:
        ax.plot(*curve, color=color, linewidth=1, marker="." if len(curve[0]) < 10 else None)
    ax.set_title(title)
    values = np.concatenate([curve[1] for _, curve in lines])
    if values.min() > 0 and values.max() > 10 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def _captioned(ax: Axes, image: np.ndarray, caption: str, style: dict[str, Any]) -> Axes:
    """Draw a slice over its caption, without a frame."""
    draw_slice(ax, image, image.shape, style)
    ax.set(xticks=[], yticks=[], xlabel=caption)
    ax.spines[:].set_visible(False)
    return ax
