"""Parts of all pictures: the page, orientation, color levels and the scale bar.

Pictures need matplotlib, but no display. They are 1350 pixels wide, for a page of 900 pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from miar_monai.data.atomic_write import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LINE_HEIGHT", "PAGE_WIDTH", "color_levels", "displayed", "draw_slice", "page_figure", "scale_bar_mm"]

PAGE_WIDTH = 9.0
"""Width of all pictures in inches; a point of the font is 1.4 pixels on a page of 900 pixels."""

LINE_HEIGHT = 0.22
"""Height of a line of text in inches."""

_MAX_BYTES = 250_000  # of a picture on a web page


def displayed(image: np.ndarray) -> np.ndarray:
    """Return an axial slice in radiological convention: anterior is up, the patient's right is on the left.

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


@contextmanager
def page_figure(path: str | os.PathLike[str], height: float, overwrite: bool) -> Iterator[Figure]:
    """Create a figure of the width of a page, without pyplot, and write it at the end of the block."""
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
            if part.suffix == ".png" and part.stat().st_size > _MAX_BYTES:  # a palette halves the size
                Image.open(part).convert("RGB").quantize(256, kmeans=1).save(part, optimize=True)


def color_levels(colors: str, count: int, low: float, high: float) -> dict[str, Any]:
    """Return a style of images: few enough levels for a small file, too many to be visible."""
    import matplotlib

    return {"cmap": matplotlib.colormaps[colors].resampled(count), "vmin": low, "vmax": high}


def draw_slice(ax: Axes, image: np.ndarray, extent: Sequence[float], style: dict[str, Any]) -> Any:
    """Draw a slice over its field of view, in millimeters from the lower left corner."""
    return ax.imshow(displayed(image), extent=(0, extent[0], 0, extent[1]), interpolation="nearest", **style)
