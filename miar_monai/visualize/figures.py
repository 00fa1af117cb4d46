"""A slice by several methods, side by side, and its posterior samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from miar_monai.errors import ConfigurationError
from miar_monai.visualize.drawing import (
    LINE_HEIGHT,
    PAGE_WIDTH,
    color_levels,
    draw_slice,
    page_figure,
    scale_bar_mm,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["enlarged_panels", "marked_panels", "sharpest_square", "side_by_side"]


def sharpest_square(image: np.ndarray, side: int) -> tuple[int, int]:
    """Return the lower corner of the square with the strongest edges, to be enlarged.

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

    All panels cover the same field of view, at their own resolution. Errors are drawn for panels of the size of the
    truth. Gray values range from the minimum to the 99.8th percentile of the truth, errors from 0 to the largest
    99.8th percentile of a panel.

    Args:
        panels: slices of RAS+ volumes by title, (X, Y) each, from left to right; one of them is the truth.
        path: the picture, .png or another format of matplotlib; its folder is created if needed.
        spacing: of the voxels of the truth along X and Y, in millimeters.
        truth: title of the truth among the panels.
        unit: unit of the intensities, for the color bars.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        ConfigurationError: if there is no panel with the title of the truth.
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    hr = _truth(panels, truth)
    extent, zoom = (hr.shape[0] * spacing[0], hr.shape[1] * spacing[1]), _enlarged(hr, spacing)
    errors = {title: abs(image - hr) for title, image in panels.items() if image.shape == hr.shape and title != truth}
    gray, hot = _scales(hr, errors.values())
    ratios = [extent[1] / extent[0], 1, extent[1] / extent[0]]
    lines = max(title.count("\n") for title in panels) + 1

    with page_figure(path, sum(ratios) * PAGE_WIDTH / len(panels) + lines * LINE_HEIGHT, overwrite) as figure:
        axes = figure.subplots(3, len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})
        for ax in axes.flat:
            ax.set_axis_off()
        for column, (title, image) in zip(axes.T, panels.items(), strict=True):
            column[0].set_title(title)
            shown = draw_slice(column[0], image, extent, gray)
            draw_slice(column[1], image, extent, gray)
            column[1].set(xlim=zoom[0], ylim=zoom[1])
            if title in errors:
                difference = draw_slice(column[2], errors[title], extent, hot)
        _mark(axes[0, 0], extent, zoom)
        free = axes[2, list(panels).index(truth)]  # the truth has no error
        in_units = f" ({unit})" if unit else ""
        _color_bar(free, shown, f"intensity{in_units}", 0.75)
        if errors:
            _color_bar(free, difference, f"|error|{in_units}", 0.25)
    return Path(path)


def enlarged_panels(
    images: Mapping[str, np.ndarray],
    differences: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    columns: int,
    spacing: tuple[float, float] = (1.0, 1.0),
    truth: str = "truth",
    overwrite: bool = False,
) -> Path:
    """Draw the part of a slice with the strongest edges in many panels: images, then differences of intensities.

    Gray values range from the minimum to the 99.8th percentile of the truth, differences from 0 to their largest 99.8th
    percentile.

    Args:
        images: slices of RAS+ volumes by title, (X, Y), all of one size; one of them is the truth.
        differences: differences of intensities, such as errors and standard deviations, of the same size.
        path: the picture; its folder is created if needed.
        columns: number of panels in a row.
        spacing: of the voxels along X and Y, in millimeters.
        truth: title of the truth among the images.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        ConfigurationError: if there is no image with the title of the truth.
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    hr, panels = _truth(images, truth), {**images, **differences}
    extent, zoom = (hr.shape[0] * spacing[0], hr.shape[1] * spacing[1]), _enlarged(hr, spacing)
    gray, hot = _scales(hr, differences.values())
    with _grid(path, len(panels), columns, 1, overwrite) as axes:
        for ax, (title, image) in zip(axes, panels.items(), strict=False):
            shown = draw_slice(ax, image, extent, hot if title in differences else gray)
            ax.set(xlim=zoom[0], ylim=zoom[1], title=title)
        if differences:  # their scale, in the last of them
            bar = ax.figure.colorbar(shown, cax=ax.inset_axes((0.05, 0.12, 0.6, 0.04)), orientation="horizontal")
            bar.ax.tick_params(colors="white")
    return Path(path)


def marked_panels(
    images: Mapping[str, np.ndarray],
    squares: Mapping[str, Mapping[str, Sequence[tuple[int, int]]]],
    side: int,
    path: str | os.PathLike[str],
    columns: int,
    spacing: tuple[float, float] = (1.0, 1.0),
    truth: str = "truth",
    overwrite: bool = False,
) -> Path:
    """Draw a slice in many panels, with squares of several colors in each.

    Gray values range from the minimum to the 99.8th percentile of the truth.

    Args:
        images: slices of RAS+ volumes by title, (X, Y), all of one size; one of them is the truth.
        squares: lower corners of the squares, first index along X and along Y, by title and color.
        side: side of the squares in voxels.
        path: the picture; its folder is created if needed.
        columns: number of panels in a row.
        spacing: of the voxels along X and Y, in millimeters.
        truth: title of the truth among the images.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        ConfigurationError: if there is no image with the title of the truth.
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    hr = _truth(images, truth)
    extent, gray = (hr.shape[0] * spacing[0], hr.shape[1] * spacing[1]), _scales(hr, ())[0]
    with _grid(path, len(images), columns, extent[1] / extent[0], overwrite) as axes:
        for ax, (title, image) in zip(axes, images.items(), strict=False):
            draw_slice(ax, image, extent, gray)
            ax.set_title(title)
            for color, corners in squares.get(title, {}).items():
                for x, y in corners:
                    _frame(ax, *_square_limits(hr, (x, y), side, spacing), color)
    return Path(path)


@contextmanager
def _grid(
    path: str | os.PathLike[str], count: int, columns: int, ratio: float, overwrite: bool
) -> Iterator[Iterable[Axes]]:
    """Create a figure of panels in rows, and write it at the end of the block.

    Args:
        path: the picture.
        count: number of panels.
        columns: number of panels in a row.
        ratio: height of a panel relative to its width.
        overwrite: replace an existing file.
    """
    rows = -(-count // columns)
    with page_figure(path, rows * (PAGE_WIDTH / columns * ratio + LINE_HEIGHT), overwrite) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        yield axes.flat


def _truth(panels: Mapping[str, np.ndarray], title: str) -> np.ndarray:
    """Return the panel of the truth."""
    if title not in panels:
        raise ConfigurationError(f"there is no panel {title!r}, only {list(panels)}: give the title of the truth.")
    return panels[title]


def _scales(hr: np.ndarray, differences: Iterable[np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scales of gray values, to the 99.8th percentile of the truth, and of differences, to their largest."""
    worst = max((float(np.percentile(x, 99.8)) for x in differences), default=1.0)
    return color_levels("gray", 64, hr.min(), np.percentile(hr, 99.8)), color_levels("magma", 24, 0, worst)


def _color_bar(ax: Axes, shown: Any, label: str, height: float) -> None:
    """Draw a color bar in a free panel, at a height between 0 and 1."""
    inset = ax.inset_axes((0.15, height, 0.7, 0.06))
    ax.figure.colorbar(shown, cax=inset, label=label, orientation="horizontal")


def _enlarged(hr: np.ndarray, spacing: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits in millimeters, as displayed, of the enlarged square, a third of the field of view."""
    side = max(min(hr.shape) // 3, 1)
    return _square_limits(hr, sharpest_square(hr, side), side, spacing)


def _square_limits(
    hr: np.ndarray, corner: tuple[int, int], side: int, spacing: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits in millimeters, as displayed, of a square with a lower corner."""
    x, y = corner
    right = (hr.shape[0] - x) * spacing[0]  # X is mirrored on display
    return (right - side * spacing[0], right), (y * spacing[1], (y + side) * spacing[1])


def _frame(ax: Axes, horizontal: tuple[float, float], vertical: tuple[float, float], color: str) -> None:
    """Draw the frame of a rectangle."""
    (left, right), (bottom, top) = horizontal, vertical
    ax.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color=color, linewidth=1)


def _mark(ax: Axes, extent: tuple[float, float], zoom: tuple[tuple[float, float], tuple[float, float]]) -> None:
    """Add the scale bar, the patient's right side, and the frame of the enlarged square."""
    length = scale_bar_mm(extent[0])
    ax.plot([0.05 * extent[0], 0.05 * extent[0] + length], [0.04 * extent[1]] * 2, color="white", linewidth=2)
    ax.text(0.05 * extent[0], 0.06 * extent[1], f"{length} mm", color="white", va="bottom")
    ax.text(0.02 * extent[0], 0.5 * extent[1], "R", color="white", va="center")
    _frame(ax, *zoom, "orange")
