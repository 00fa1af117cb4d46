"""The perception-distortion plane: fidelity against perceptual quality, a point for each method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from miar_monai.data.atomic_write import atomic_file
from miar_monai.evaluation import Row, by_contrast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["perception_distortion"]

Points = Mapping[str, tuple[float, float]]
"""PSNR and LPIPS by method."""

UNTRAINED = ("nearest", "bicubic", "linear inverse")


def perception_distortion(
    rows: Sequence[Row], path: str | os.PathLike[str], sweeps: Sequence[Sequence[str]] = (), overwrite: bool = False
) -> Path:
    """Draw mean PSNR against mean LPIPS of each method, and an enlarged view of the best trained methods; by contrast.

    The enlarged view has the trained methods with a PSNR above that of the linear inverse. Points are numbered once, in
    the enlarged view if they are in it; the legend has their names. MIAR is red, untrained methods are gray, all others
    blue; hollow points are data-consistent. Lower right is best.

    Args:
        rows: of a `miar_monai.evaluation.SuperResolutionEvaluation`, with PSNR and LPIPS.
        path: the picture, .png or another format of matplotlib; its folder is created if needed.
        sweeps: methods to connect by a line, in this order.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.

    Reference:
        Blau & Michaeli, The Perception-Distortion Tradeoff, 2018.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sections = by_contrast(rows)
    numbers = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in rows), 1)}
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "savefig.dpi": 200}):
        figure = Figure(figsize=(4.5 * len(sections) + 3, 7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(sections), squeeze=False)
        numbered = []
        for (whole, enlarged), (contrast, section) in zip(axes.T, sections.items(), strict=True):
            points = {method: (_mean(section, method, "PSNR"), _mean(section, method, "LPIPS")) for method in numbers}
            floor = points.get("linear inverse", (-np.inf,))[0]
            best = {name: at for name, at in points.items() if name not in UNTRAINED and not at[0] < floor}
            rest = {name: at for name, at in points.items() if name not in best}
            numbered += [(whole, rest), (enlarged, best)]
            for ax, some, title in ((whole, points, contrast), (enlarged, best, "enlarged: above the linear inverse")):
                _draw(ax, some, numbers, sweeps)
                ax.set(title=title, xlabel="PSNR (dB), higher is better", ylabel="LPIPS, lower is better")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
        figure.draw_without_rendering()  # from here on, the positions of the points on the page are known
        for ax, some in numbered:
            _number(ax, some, numbers)
        with atomic_file(path, overwrite) as part:
            figure.savefig(part)
    return Path(path)


def _draw(ax: Axes, points: Points, numbers: Mapping[str, int], sweeps: Sequence[Sequence[str]]) -> None:
    """Draw the points of one panel, and the lines of the sweeps below them."""
    for sweep in sweeps:
        line = np.array([points[method] for method in sweep if method in points]).reshape(-1, 2)
        ax.plot(*line.T, color="tab:red", linewidth=1, zorder=1)
    for method, point in points.items():
        color = "tab:red" if method.startswith("MIAR") else "tab:gray" if method in UNTRAINED else "tab:blue"
        face = "white" if method.endswith("data-consistent") else color
        label = f"{numbers[method]:>2}  {method}"
        ax.scatter(*point, s=24, facecolor=face, edgecolor=color, label=label, zorder=2)
    ax.margins(0.1)
    ax.grid(alpha=0.3)


def _number(ax: Axes, points: Points, numbers: Mapping[str, int], nearby: float = 20) -> None:
    """Write the numbers next to the points; points within ``nearby`` pixels share a label."""
    places: list[tuple[np.ndarray, list[str]]] = []
    for method, point in points.items():
        where, number = ax.transData.transform(point), str(numbers[method])
        shared = [labels for place, labels in places if np.linalg.norm(place - where) < nearby]
        if shared:
            shared[0].append(number)
        elif np.isfinite(where).all():
            places.append((where, [number]))
    for where, labels in places:
        x, y = ax.transData.inverted().transform(where)
        ax.annotate(", ".join(labels), (x, y), (4, 4), textcoords="offset points", fontsize=7)


def _mean(rows: Sequence[Row], method: str, metric: str) -> float:
    values = np.array([row[metric] for row in rows if row["method"] == method], dtype=np.float64)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
