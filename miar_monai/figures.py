"""Pictures of super-resolved slices for papers and for a look at the result. They need matplotlib, but no display."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from miar_monai.errors import ConfigurationError
from miar_monai.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["displayed", "scale_bar_mm", "sharpest_square", "side_by_side"]


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
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    hr = panels[truth]
    extent = (hr.shape[0] * spacing[0], hr.shape[1] * spacing[1])
    zoom = _enlarged(hr, spacing)
    errors = {title: abs(image - hr) for title, image in panels.items() if image.shape == hr.shape and title != truth}
    gray = {"cmap": "gray", "vmin": hr.min(), "vmax": np.percentile(hr, 99.8)}
    worst = max([np.percentile(error, 99.8) for error in errors.values()], default=1)
    hot = {"cmap": "magma", "vmin": 0, "vmax": worst}

    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "savefig.dpi": 200}):
        height = 2.1 * (1.0 + 2 * extent[1] / extent[0]) + 0.4
        figure = Figure(figsize=(2.1 * len(panels) + 0.9, height), layout="constrained")
        FigureCanvasAgg(figure)
        ratios = [extent[1] / extent[0], 1, extent[1] / extent[0]]
        axes = figure.subplots(3, len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})
        for ax in axes.flat:
            ax.set_axis_off()
        for column, (title, image) in zip(axes.T, panels.items(), strict=True):
            shown = _draw(column[0], image, extent, gray)
            column[0].set_title(title)
            _draw(column[1], image, extent, gray)
            column[1].set(xlim=zoom[0], ylim=zoom[1])
            if title in errors:
                wrong = _draw(column[2], errors[title], extent, hot)
        _mark(axes[0, 0], extent, zoom)
        label = f" ({unit})" if unit else ""
        figure.colorbar(shown, ax=axes[:2], label=f"intensity{label}", shrink=0.6, aspect=30)
        if errors:
            figure.colorbar(wrong, ax=axes[2], label=f"|error|{label}", shrink=0.9, aspect=15)
        with whole_file(path, overwrite) as part:
            figure.savefig(part)
    return Path(path)


def _draw(ax: Axes, image: np.ndarray, extent: tuple[float, float], style: dict[str, Any]) -> Any:
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
