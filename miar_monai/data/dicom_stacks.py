"""Stacks of parallel slices in a DICOM series: one is read, localizers are left aside."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from miar_monai.data.dicom_frames import FRAME_NUMBER, slice_name
from miar_monai.data.dicom_headers import numbers, text, values
from miar_monai.errors import GeometryError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["check_one_stack", "localizer_remarks", "localizers"]

_PARALLEL = np.cos(np.deg2rad(10))
"""Cosine of the angle up to which slices belong to the same stack."""

_MAX_LOCALIZERS, _RARE = 3, 5
"""Localizers in one plane are at most so many, and the slices of the largest stack so many times as many."""

_MAX_LISTED = 6  # in a message


def localizers(headers: Sequence[Dataset]) -> list[Dataset]:
    """Return the headers of the localizers among the slices of a series.

    These are images whose ImageType contains LOCALIZER, and up to three images in a plane that differs by more than 10
    degrees from that of at least five times as many. A series of localizers only has none.

    Args:
        headers: of the slices.

    Example:
        >>> from pydicom import Dataset
        >>> headers = [Dataset() for _ in range(9)]
        >>> for i, header in enumerate(headers):
        ...     header.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER" if i == 3 else "AXIAL"]
        >>> localizers(headers) == [headers[3]]
        True
    """
    named = [header for header in headers if "LOCALIZER" in map(str.upper, values(header, "ImageType"))]
    others = [header for header in headers if not any(header is one for one in named)]
    if not others:
        return []
    stacks = _by_plane(others)
    largest = max(map(len, stacks))
    turned = [header for stack in stacks if len(stack) <= min(_MAX_LOCALIZERS, largest // _RARE) for header in stack]
    return named + turned


def localizer_remarks(found: Sequence[Dataset]) -> tuple[str, ...]:
    """Return a remark that names the localizers of a series."""
    if not found:
        return ()
    names = [Path(slice_name(header)).name for header in found]
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    kind = "a localizer is" if len(names) == 1 else f"{len(names)} localizers are"
    return (f"{kind} left aside: {', '.join(names[:_MAX_LISTED])}{more}.",)


def check_one_stack(folder: Path, headers: Sequence[Dataset]) -> None:
    """Check that the slices of a series form one stack.

    Args:
        folder: of the series.
        headers: of its slices.

    Raises:
        GeometryError: if there are several, by StackID or by the planes of the slices; the message lists them.
    """
    ids = sorted({text(header, "StackID") for header in headers} - {""})
    if len(ids) > 1:
        stacks = [[header for header in headers if text(header, "StackID") == name] for name in ids]
        conditions = [f"StackID={name}" for name in ids]
    else:
        stacks = _by_plane(headers)
        conditions = [_orientation(stack[0]) for stack in stacks]
        if min(map(len, stacks)) < 2:  # a slice alone is no stack
            return
    if len(stacks) < 2:
        return
    listed = "; ".join(f"{condition}: {_described(stack)}" for condition, stack in zip(conditions, stacks, strict=True))
    raise GeometryError(
        f"{folder}: the series has {len(stacks)} stacks of slices ({listed}); one is needed: choose it, for example by "
        f"--select {shlex.quote(conditions[0])} (or select of miar_monai.data.io.read_volume)."
    )


def _normal(header: Dataset) -> np.ndarray:
    axes = numbers(header, "ImageOrientationPatient")
    return np.cross(axes[:3], axes[3:]) if len(axes) == 6 and np.isfinite(axes).all() else np.zeros(3)


def _by_plane(headers: Sequence[Dataset]) -> list[list[Dataset]]:
    """Return the slices by stacks of the same plane; those without orientation belong to the first stack."""
    normals = [_normal(header) for header in headers]
    stacks: list[tuple[np.ndarray, list[Dataset]]] = []
    for header, normal in zip(headers, normals, strict=True):
        for first, stack in stacks:
            if not normal.any() or not first.any() or abs(first @ normal) > _PARALLEL:
                stack.append(header)
                break
        else:
            stacks.append((normal, [header]))
    return [stack for _, stack in stacks]


def _orientation(header: Dataset) -> str:
    return "ImageOrientationPatient=" + "\\".join(f"{x:.4g}" for x in numbers(header, "ImageOrientationPatient"))


def _described(stack: Sequence[Dataset]) -> str:
    """Return the plane and the number of slices or frames of a stack."""
    plane = ("sagittal", "coronal", "axial")[int(np.abs(_normal(stack[0])).argmax())]
    return f"{len(stack)} {plane} {'frames' if FRAME_NUMBER in stack[0] else 'slices'}"
