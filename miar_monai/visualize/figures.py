"""Pictures for papers and for a look at the result: slices, token scales, codebooks, training runs.

They need matplotlib, but no display. All are drawn for a page 900 pixels wide and saved 1350 pixels wide.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from miar_monai.data.atomic_write import atomic_file
from miar_monai.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LINE_HEIGHT",
    "PAGE_WIDTH",
    "Curve",
    "codebook_map",
    "color_levels",
    "displayed",
    "layer_wise",
    "open_figure",
    "scale_bar_mm",
    "sharpest_square",
    "side_by_side",
    "training_curves",
]

Curve = tuple[Sequence[float], Sequence[float]]
"""Abscissas and ordinates of a line."""

PAGE_WIDTH = 9.0
"""Inches; a point of the font is 1.4 pixels on a page 900 pixels wide."""

LINE_HEIGHT = 0.22
"""Inches for a line of text."""

_MAX_BYTES = 250_000  # of a picture on a web page


def displayed(image: np.ndarray) -> np.ndarray:
    """Return an axial slice as radiologists look at it: anterior is up, the patient's right is on the left.

    Args:
        image: a slice of a RAS+ volume, (X, Y).

    Returns:
        Rows from top to bottom, (Y, X).

    Example:
        >>> displayed(np.array([["left back", "left front"], ["right back", "right front"]])).tolist()
        [['right front', 'left front'], ['right back', 'left back']]
    """
    return image.T[::-1, ::-1]


def scale_bar_mm(width: float) -> int:
    """Return a round length in millimeters, 1, 2 or 5 times a power of ten, of at most a quarter of ``width``.

    Example:
        >>> scale_bar_mm(240), scale_bar_mm(50)
        (50, 10)
    """
    lengths = [factor * 10**power for power in range(4) for factor in (1, 2, 5)]
    return max([length for length in lengths if length <= width / 4], default=1)


def sharpest_square(image: np.ndarray, side: int) -> tuple[int, int]:
    """Return the first corner of the square with the strongest edges: the part of a slice worth enlarging.

    Args:
        image: (X, Y).
        side: side of the square in voxels, at most the sides of the image.

    Returns:
        First index along X and along Y.

    Example:
        >>> image = np.zeros((40, 30))
        >>> image[25:30, 6:12] = 1
        >>> x, y = sharpest_square(image, 12)
        >>> x <= 24 and y <= 5 and x + 12 > 30 and y + 12 > 12
        True
    """
    edges = ndimage.gaussian_gradient_magnitude(image.astype(np.float64), 1)
    total = np.pad(edges.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    x, y = np.unravel_index(sums.argmax(), sums.shape)
    return int(x), int(y)


def side_by_side(
    panels: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    spacing: tuple[float, float] = (1.0, 1.0),
    truth: str = "truth",
    unit: str = "",
    overwrite: bool = False,
) -> Path:
    """Draw one slice by several methods: whole, enlarged, and its error; gray values and errors on common scales.

    All panels cover the same field of view, whatever their number of voxels, and are drawn voxel by voxel. Errors
    are drawn for the panels of the size of the truth. The gray values reach from the minimum to the 99.8th percentile
    of the truth, the errors from 0 to the 99.8th percentile of the largest one.

    Args:
        panels: slices of RAS+ volumes by title, (X, Y) each, from left to right; one of them is the truth.
        path: the picture, .png or another format of matplotlib. Its folder is made if needed.
        spacing: of the voxels of the truth along X and Y, in millimeters.
        truth: title of the truth among the panels.
        unit: of the intensities, for the color bars.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        ConfigurationError: if no panel has the title of the truth.
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    if truth not in panels:
        raise ConfigurationError(f"no panel is called {truth!r}, only {list(panels)}: name the panel of the truth.")
    hr = panels[truth]
    extent = (hr.shape[0] * spacing[0], hr.shape[1] * spacing[1])
    zoom = _enlarged(hr, spacing)
    errors = {title: abs(image - hr) for title, image in panels.items() if image.shape == hr.shape and title != truth}
    worst = max([np.percentile(error, 99.8) for error in errors.values()], default=1)
    gray, hot = color_levels("gray", 64, hr.min(), np.percentile(hr, 99.8)), color_levels("magma", 24, 0, worst)
    ratios = [extent[1] / extent[0], 1, extent[1] / extent[0]]
    lines = max(title.count("\n") for title in panels) + 1

    with open_figure(path, sum(ratios) * PAGE_WIDTH / len(panels) + lines * LINE_HEIGHT, overwrite) as figure:
        axes = figure.subplots(3, len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})
        for ax in axes.flat:
            ax.set_axis_off()
        for column, (title, image) in zip(axes.T, panels.items(), strict=True):
            column[0].set_title(title)
            shown = _draw(column[0], image, extent, gray)
            _draw(column[1], image, extent, gray)
            column[1].set(xlim=zoom[0], ylim=zoom[1])
            if title in errors:
                wrong = _draw(column[2], errors[title], extent, hot)
        _mark(axes[0, 0], extent, zoom)
        free = axes[2, list(panels).index(truth)]  # the truth has no error
        _color_bar(free, shown, f"intensity{unit and f' ({unit})'}", 0.75)
        if errors:
            _color_bar(free, wrong, f"|error|{unit and f' ({unit})'}", 0.25)
    return Path(path)


def layer_wise(
    rows: Mapping[str, Mapping[str, np.ndarray]],
    truth: np.ndarray,
    psnr: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    overwrite: bool = False,
) -> Path:
    """Draw what tokenizers make of the first scales of a slice, and how their PSNR grows with the number of scales.

    Args:
        rows: for each tokenizer by name the reconstructions by caption, (X, Y) each, from few scales to all; the same
            number for each.
        truth: the slice, (X, Y).
        psnr: for each tokenizer the mean PSNR from 1, 2, … scales, in dB.
        path: the picture, .png or another format of matplotlib. Its folder is made if needed.
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
    with open_figure(path, (len(rows) + 1) * height, overwrite) as figure:
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
    """Draw a codebook as points in the plane: how often each code is used, and at which scale most often.

    Args:
        points: place of each code, (V, 2).
        counts: how often each scale uses each code, (K, V).
        sides: sides of the token maps, coarse to fine, (K,).
        path: the picture, .png or another format of matplotlib. Its folder is made if needed.
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
    with open_figure(path, 0.5 * PAGE_WIDTH, overwrite) as figure:
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
        right.set_title("where a code is used most")
        bar = figure.colorbar(most, ax=right, label="side of the scale", orientation="horizontal", aspect=40)
        bar.set_ticks(range(num_scales), labels=[str(side) for side in sides])
    return Path(path)


def training_curves(
    runs: Mapping[str, Mapping[str, Mapping[str, Curve]]], path: str | os.PathLike[str], overwrite: bool = False
) -> Path:
    """Draw what training runs recorded: a row for each stage, a plot for each quantity, a line for each run.

    A quantity that stays positive and spans more than a factor of ten has a logarithmic axis.

    Args:
        runs: for each run by name, for each stage by name, the curves over the iterations by title.
        path: the picture, .png or another format of matplotlib. Its folder is made if needed.
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
    with open_figure(path, 1.9 * len(rows) + 2 * LINE_HEIGHT, overwrite) as figure:
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


@contextmanager
def open_figure(path: str | os.PathLike[str], height: float, overwrite: bool) -> Iterator[Figure]:
    """Yield a figure of the width of a page, written when the block ends; the state of pyplot is not changed."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8}):
        figure = Figure(figsize=(PAGE_WIDTH, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_file(path, overwrite) as part:
            figure.savefig(part)
            if part.suffix == ".png" and part.stat().st_size > _MAX_BYTES:  # a palette halves that
                Image.open(part).convert("RGB").quantize(256, kmeans=1).save(part, optimize=True)


def color_levels(colors: str, count: int, low: float, high: float) -> dict[str, Any]:
    """Return the style of an image in few colors: a small file without visible steps."""
    import matplotlib

    return {"cmap": matplotlib.colormaps[colors].resampled(count), "vmin": low, "vmax": high}


def _captioned(ax: Axes, image: np.ndarray, caption: str, style: dict[str, Any]) -> Axes:
    """Draw a slice over its caption, without a frame."""
    _draw(ax, image, image.shape, style)
    ax.set(xticks=[], yticks=[], xlabel=caption)
    ax.spines[:].set_visible(False)
    return ax


def _color_bar(ax: Axes, shown: Any, label: str, height: float) -> None:
    """Put a color bar into a free panel, at a height between 0 and 1."""
    inset = ax.inset_axes((0.15, height, 0.7, 0.06))
    ax.figure.colorbar(shown, cax=inset, label=label, orientation="horizontal")


def _draw(ax: Axes, image: np.ndarray, extent: Sequence[float], style: dict[str, Any]) -> Any:
    """Draw a slice over its field of view, in millimeters from the lower left corner."""
    return ax.imshow(displayed(image), extent=(0, extent[0], 0, extent[1]), interpolation="nearest", **style)


def _enlarged(hr: np.ndarray, spacing: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits in millimeters, as displayed, of the square that is enlarged: a third of the field of view."""
    side = max(min(hr.shape) // 3, 1)
    x, y = sharpest_square(hr, side)
    right = (hr.shape[0] - x) * spacing[0]  # X is mirrored on display
    return (right - side * spacing[0], right), (y * spacing[1], (y + side) * spacing[1])


def _mark(ax: Axes, extent: tuple[float, float], zoom: tuple[tuple[float, float], tuple[float, float]]) -> None:
    """Add the scale bar, the patient's right side, and the frame of what is enlarged."""
    length, (left, right), (bottom, top) = scale_bar_mm(extent[0]), *zoom
    ax.plot([0.05 * extent[0], 0.05 * extent[0] + length], [0.04 * extent[1]] * 2, color="white", linewidth=2)
    ax.text(0.05 * extent[0], 0.06 * extent[1], f"{length} mm", color="white", va="bottom")
    ax.text(0.02 * extent[0], 0.5 * extent[1], "R", color="white", va="center")
    ax.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color="orange", linewidth=1)
