"""Where the slices of a DICOM series lie: on one even grid, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from miar_monai.errors import GeometryError

__all__ = ["LPS_TO_RAS", "check_gaps", "even_grid", "in_plane_axes"]

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
"""From the patient axes of DICOM to those of NIfTI, and back."""

_SAME = 0.05
"""Gaps that differ by less than this part of the spacing are called equal."""

_OFF = 0.2
"""How far a slice may lie off the even grid, in spacings: where one is missing, another lies farther off."""

_ROUNDED = 0.07
"""How far off it rounding to 0.1 mm moves a slice, in mm: half of that, and more where three slices make the grid."""


def in_plane_axes(orientation: np.ndarray) -> np.ndarray:
    """Return the perpendicular unit vectors that lie closest to two rounded ones.

    Args:
        orientation: directions along a row and along a column, (2, 3), rounded by a header.

    Returns:
        Likewise, (2, 3).

    Example:
        >>> in_plane_axes(np.array([[0.999, 0.035, 0], [-0.035, 0.999, 0]])).round(5)
        array([[ 0.99939,  0.03501,  0.     ],
               [-0.03501,  0.99939,  0.     ]])
    """
    u, _, v = np.linalg.svd(orientation, full_matrices=False)
    return np.asarray(u @ v)


def even_grid(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first position and the step of the even grid that fits positions best (least squares).

    Args:
        positions: millimeters, (N, 3) with N > 1, in order.

    Returns:
        Origin and step, (3,) each.

    Example:
        >>> origin, step = even_grid(np.array([[0, 0, 10.0], [0, 0, 10.6], [0, 0, 11.3], [0, 0, 11.9]]))
        >>> step.round(4)
        array([0.  , 0.  , 0.64])
    """
    k = np.arange(len(positions)) - (len(positions) - 1) / 2
    center = positions.mean(axis=0)
    step = k @ (positions - center) / (k @ k)
    return center + k[0] * step, step


def check_gaps(folder: Path, positions: np.ndarray) -> None:
    """Refuse slices that are not evenly spaced on a straight line, as far as their positions are not rounded.

    Args:
        folder: of the series.
        positions: millimeters, (N, 3) with N > 1, in order and no two of them equal.

    Raises:
        GeometryError: if slices are missing, or have two spacings, or lie anywhere.
    """
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    spacing = float(np.median(gaps))
    uneven = np.abs(gaps - spacing) > _SAME * spacing
    origin, step = even_grid(positions)
    off = positions - origin - np.arange(len(positions))[:, None] * step
    moved = positions - positions[0]  # coordinates that stay may have all their digits
    rounded = np.allclose(moved, moved.round(1), rtol=0, atol=1e-6) and np.abs(off).max() < _ROUNDED
    astray = np.abs(off @ step) / (step @ step) if rounded else np.linalg.norm(off, axis=1) / np.linalg.norm(step)
    if astray.max() <= _OFF and (rounded or not uneven.any()):
        return
    usual = f", usually {spacing:.3f} mm apart"
    advice = "a complete series of evenly spaced slices is needed: export the series again."
    spacings = _spacings(gaps)
    if len(spacings) > 1:
        parts = " and ".join(f"{count} gaps of {gap:.3f} mm" for gap, count in spacings)
        found, usual = f"the slices have {len(spacings)} spacings, {parts}", ""
        advice = "one spacing is needed: put the slices of each into a folder of their own."
    elif uneven.any() and gaps.max() > 1.5 * spacing:
        missing = int(np.rint(gaps[uneven] / spacing - 1).clip(0).sum())
        a, b = positions[np.argmax(gaps) : np.argmax(gaps) + 2].round(2).tolist()
        lost = f"{missing} slice{'s are' if missing > 1 else ' is'} missing"
        found = f"{lost}, the widest gap is {gaps.max():.2f} mm between {a} and {b}"
    elif uneven.any():
        found = f"the slices are {gaps.min():.3f} to {gaps.max():.3f} mm apart"
    else:
        found = f"slices lie up to {np.linalg.norm(off, axis=1).max():.3f} mm off the even grid that fits best"
    raise GeometryError(f"{folder}: {found} ({len(positions)} slices{usual}); {advice}")


def _spacings(gaps: np.ndarray) -> list[tuple[float, int]]:
    """Return the spacings of a series of several stacks and how often each occurs; nothing where gaps are stray ones.

    The gap between two stacks may be neither's: between slices 3 and 7 mm thick it is 5 mm.
    """
    runs: list[list[float]] = [[gaps[0]]]
    for gap in gaps[1:]:
        if abs(gap - runs[-1][0]) <= max(_SAME * gap, 1e-3):
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
        gap, count = found.pop() if found and run[0] - found[-1][0] <= _SAME * run[0] else (run[0], 0)
        found.append((gap, count + len(run)))
    return found
