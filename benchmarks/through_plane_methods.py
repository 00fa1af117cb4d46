"""Methods that make thick slices thin again, for `benchmarks.through_plane`."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import affine_transform

from benchmarks.thick_slices import ThickSlices
from miar_monai.data.geometry import corner_distance
from miar_monai.errors import DatasetError
from miar_monai.inference.resolver import SuperResolver

__all__ = ["DAMPING", "ThinSlices", "VolumeMethod", "bundled", "cubic", "linear_inverse", "saved_results", "single"]

DAMPING = 1e-3  # as that of the linear inverse in other tables
_TOLERANCE = 0.01  # mm


class ThinSlices(NamedTuple):
    """The result of a method.

    Attributes:
        array: with the shape, the grid and the units of the truth, (X, Y, Z).
        seconds: time from the thick slices to the result; None if unknown.
    """

    array: np.ndarray
    seconds: float | None

    @classmethod
    def timed(cls, restore: Callable[[], np.ndarray]) -> ThinSlices:
        """Call a function that returns the array."""
        start = time.perf_counter()
        return cls(restore(), time.perf_counter() - start)


VolumeMethod = Callable[[ThickSlices], Mapping[str, ThinSlices]]
"""From thick slices to results by title; none for slices that the method leaves out."""


def single(title: str, restore: Callable[[ThickSlices], np.ndarray]) -> VolumeMethod:
    """Return a function of thick slices as a method with one result.

    Args:
        title: of the result.
        restore: returns an array with the shape, the grid and the units of the truth.
    """
    return lambda case: {title: ThinSlices.timed(partial(restore, case))}


def cubic(case: ThickSlices) -> np.ndarray:
    """Interpolate thick slices by a cubic B-spline, constant beyond the centers of the outer slices."""
    voxels = np.linalg.inv(case.thick.affine) @ case.truth.affine  # to those of the thick slices
    lines = np.eye(case.thick.array.shape[2])
    size = len(lines), case.truth.array.shape[2]
    matrix = affine_transform(lines, (1, voxels[2, 2]), (0, voxels[2, 3]), size, order=3, mode="nearest")  # (z, Z)
    return (case.thick.array @ matrix).astype(np.float32)


def linear_inverse(case: ThickSlices) -> np.ndarray:
    """Restore thick slices by the linear inverse of their degradation, line by line."""
    lines = torch.from_numpy(case.thick.array).double().flatten(0, 1)[:, None]  # (X · Y, 1, z)
    restored = case.degradation.for_lr(lines).restore(lines, DAMPING)
    return restored.reshape(case.truth.array.shape).float().numpy()


def bundled(name: str, model: str, device: str, fidelities: Sequence[float]) -> VolumeMethod:
    """Return a bundle as a method, which is told the factor, the thickness and the profile of the slices.

    An image is a mix of the perceptual and the faithful estimate. So only the lowest and the highest fidelity are
    computed by the bundle, and those between are mixed of these; their time is the mean of both.

    Args:
        name: of the bundle; the fidelity follows it in the titles.
        model: see `miar_monai.super_resolve`.
        device: see there.
        fidelities: from 0 to 1, a result each.
    """
    bundle = SuperResolver(model, device)

    @cache
    def resolver(fidelity: float, factor: float, thickness: float, profile: str) -> SuperResolver:
        return bundle.with_settings(
            fidelity=fidelity, factor=(1.0, 1.0, factor), slice_thickness=thickness, slice_profile=profile
        )

    def result(case: ThickSlices, fidelity: float) -> ThinSlices:
        told = resolver(fidelity, case.degradation.scales[1], case.thickness, case.profile)
        return ThinSlices.timed(lambda: told.volume(case.thick).array)

    def super_resolve(case: ThickSlices) -> dict[str, ThinSlices]:
        ends = {fidelity: result(case, fidelity) for fidelity in {min(fidelities), max(fidelities)}}
        return {f"{name}, fidelity {fidelity:g}": _mixed(ends, fidelity) for fidelity in fidelities}

    return super_resolve


def _mixed(ends: Mapping[float, ThinSlices], fidelity: float) -> ThinSlices:
    """Return the result of a fidelity, given those of the lowest and the highest."""
    if fidelity in ends:
        return ends[fidelity]
    low, high = sorted(ends)
    weight = (fidelity - low) / (high - low)
    array = ends[low].array + np.float32(weight) * (ends[high].array - ends[low].array)
    return ThinSlices(array, sum(end.seconds or 0.0 for end in ends.values()) / len(ends))


def saved_results(title: str, folder: Path, cases: Sequence[ThickSlices]) -> VolumeMethod:
    """Return a method that reads the results of another program, and the seconds that it took.

    Args:
        title: of its results.
        folder: folder of ``<name>.nii.gz`` for the `ThickSlices.name` of each volume; all or none of a thickness and
            gap. It may have a ``seconds.csv`` with the columns ``name`` and ``seconds``.
        cases: the volumes.

    Raises:
        DatasetError: if results are missing.
    """
    present = {case.name for case in cases if (folder / f"{case.name}.nii.gz").is_file()}
    titles = {case.title for case in cases if case.name in present}
    missing = sorted(case.name for case in cases if case.title in titles and case.name not in present)
    if missing or not present:
        names = ", ".join(missing) or "any volume"
        raise DatasetError(
            f"{folder} has no results of {names}: all volumes of the same thickness and gap are needed; run the method "
            "on the files that benchmarks.thick_slices writes."
        )
    seconds, table = {}, folder / "seconds.csv"
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            seconds = {row["name"]: float(row["seconds"]) for row in csv.DictReader(file)}

    def read(case: ThickSlices) -> dict[str, ThinSlices]:
        if case.title not in titles:
            return {}
        path = folder / f"{case.name}.nii.gz"
        image = nib.as_closest_canonical(nib.load(path))
        shape = case.truth.array.shape
        if image.shape != shape or corner_distance(image.affine, case.truth.affine, shape) > _TOLERANCE:
            raise DatasetError(
                f"{path} has the grid {image.shape} with the affine {np.round(image.affine, 3).tolist()}, but the grid "
                f"of the truth, {shape} with the affine {np.round(case.truth.affine, 3).tolist()}, is needed; give a "
                "result with the field of view of its input and the original distance of the slices."
            )
        return {title: ThinSlices(image.get_fdata(dtype=np.float32), seconds.get(case.name))}

    return read
