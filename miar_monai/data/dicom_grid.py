"""The regular grid of the slices of a DICOM series."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from miar_monai.errors import GeometryError

__all__ = ["LPS_TO_RAS", "check_gaps", "fit_grid", "in_plane_axes"]

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
"""From the patient axes of DICOM to those of NIfTI, and back."""

_GAP_TOLERANCE = 0.05
"""Gaps that differ by less are considered equal; fraction of the spacing."""

_MAX_DEVIATION = 0.2
"""Maximum distance of a slice from the regular grid, in spacings; a missing slice moves another one farther."""

_MAX_ROUNDING_MM = 0.07
"""Distance from the grid due to rounding to 0.1 mm: half of that, and more for a grid of three slices."""


def in_plane_axes(orientation: np.ndarray) -> np.ndarray:
    """Return the perpendicular unit vectors closest to two rounded ones.

    Args:
        orientation: directions along a row and along a column, (2, 3), as in a header.

    Returns:
        Likewise, (2, 3).

    Example:
        >>> in_plane_axes(np.array([[0.999, 0.035, 0], [-0.035, 0.999, 0]])).round(5)
        array([[ 0.99939,  0.03501,  0.     ],
               [-0.03501,  0.99939,  0.     ]])
    """
    u, _, v = np.linalg.svd(orientation, full_matrices=False)
    return np.asarray(u @ v)


def fit_grid(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the origin and the step of the regular grid that fits positions best (least squares).

    Args:
        positions: millimeters, (N, 3) with N > 1, in order.

    Returns:
        Origin and step, (3,) each.

    Example:
        >>> origin, step = fit_grid(np.array([[0, 0, 10.0], [0, 0, 10.6], [0, 0, 11.3], [0, 0, 11.9]]))
        >>> step.round(4)
        array([0.  , 0.  , 0.64])
    """
    k = np.arange(len(positions)) - (len(positions) - 1) / 2
    center = positions.mean(axis=0)
    step = k @ (positions - center) / (k @ k)
    return center + k[0] * step, step


def check_gaps(folder: Path, positions: np.ndarray) -> None:
    """Check that slices are evenly spaced on a straight line, within the rounding of their positions.

    Args:
        folder: of the series.
        positions: millimeters, (N, 3) with N > 1, in order, all different.

    Raises:
        GeometryError: if slices are missing, irregular, or have several spacings.
    """
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    spacing = float(np.median(gaps))
    uneven = np.abs(gaps - spacing) > _GAP_TOLERANCE * spacing
    origin, step = fit_grid(positions)
    deviation = positions - origin - np.arange(len(positions))[:, None] * step
    moved = positions - positions[0]  # constant coordinates may have more digits
    rounded = np.allclose(moved, moved.round(1), rtol=0, atol=1e-6) and np.abs(deviation).max() < _MAX_ROUNDING_MM
    relative = (
        np.abs(deviation @ step) / (step @ step)
        if rounded
        else np.linalg.norm(deviation, axis=1) / np.linalg.norm(step)
    )
    if relative.max() <= _MAX_DEVIATION and (rounded or not uneven.any()):
        return
    usual = f", usually {spacing:.3f} mm apart"
    advice = "a complete series of evenly spaced slices is needed: export the series again."
    spacings = _spacings(gaps)
    if len(spacings) > 1:
        parts = " and ".join(f"{count} gaps of {gap:.3f} mm" for gap, count in spacings)
        found, usual = f"the slices have {len(spacings)} spacings, {parts}", ""
        advice = "one spacing is needed: put the slices of each into their own folder."
    elif uneven.any() and gaps.max() > 1.5 * spacing:
        missing = int(np.rint(gaps[uneven] / spacing - 1).clip(0).sum())
        a, b = positions[np.argmax(gaps) : np.argmax(gaps) + 2].round(2).tolist()
        lost = f"{missing} slice{'s are' if missing > 1 else ' is'} missing"
        found = f"{lost}, the widest gap is {gaps.max():.2f} mm between {a} and {b}"
    elif uneven.any():
        found = f"the slices are {gaps.min():.3f} to {gaps.max():.3f} mm apart"
    else:
        found = f"slices are up to {np.linalg.norm(deviation, axis=1).max():.3f} mm away from the best regular grid"
    raise GeometryError(f"{folder}: {found} ({len(positions)} slices{usual}); {advice}")


def _spacings(gaps: np.ndarray) -> list[tuple[float, int]]:
    """Return the spacings of a series of several stacks with their counts; empty if gaps are irregular.

    The gap between two stacks may differ from both spacings: between slices 3 and 7 mm thick it is 5 mm.
    """
    runs: list[list[float]] = [[gaps[0]]]
    for gap in gaps[1:]:
        if abs(gap - runs[-1][0]) <= max(_GAP_TOLERANCE * gap, 1e-3):
            runs[-1].append(gap)
        else:
            runs.append([gap])
    between = [
        len(run) == 1 and min(before[0], after[0]) < run[0] < max(before[0], after[0])
        for before, run, after in zip(runs, runs[1:], runs[2:], strict=False)
    ]
    stacks = [run for run, left_out in zip(runs, [False, *between, False], strict=False) if not left_out]
    if min(map(len, stacks)) < 2:
        return []
    by_size = sorted(stacks, key=lambda run: run[0])
    found: list[tuple[float, int]] = []
    for run in by_size:
        gap, count = found.pop() if found and run[0] - found[-1][0] <= _GAP_TOLERANCE * run[0] else (run[0], 0)
        found.append((gap, count + len(run)))
    return found
