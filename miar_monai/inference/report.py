"""What a run leaves for those who ask later: which model, which settings, what came in, what came out, how long."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.affines import voxel_sizes

import miar_monai
from miar_monai.data.geometry import axial_axis, fov_corners
from miar_monai.data.io import SOFTWARE, Volume
from miar_monai.degradation import Degradation
from miar_monai.inference.bundle import weights_sha256
from miar_monai.inference.resolver import SuperResolver

__all__ = [
    "case_report",
    "data_consistency_rms",
    "derivation",
    "run_report",
    "summary",
    "versions",
    "warnings_said",
    "what_is_said",
]

_PACKAGES = ("miar-monai", "monai", "torch", "numpy", "scipy", "nibabel", "itk")

_AT_ONCE = 16  # slices


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of installed packages; packages that are missing are left out.

    Example:
        >>> sorted(versions(["numpy", "no-such-package"]))
        ['numpy', 'python']
    """
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def warnings_said() -> Iterator[list[str]]:
    """Give a list that gets what this package warns of during the block, in all threads.

    Example:
        >>> with warnings_said() as said:
        ...     logging.getLogger("miar_monai.somewhere").warning("out of %s", "memory")
        >>> said
        ['out of memory']
    """
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, ours = Listener(logging.WARNING), logging.getLogger("miar_monai")
    ours.addHandler(listener)
    try:
        yield said
    finally:
        ours.removeHandler(listener)


def data_consistency_rms(
    lr: Volume,
    sr: Volume,
    degradation: Degradation | None = None,
    device: str | torch.device = "cpu",
    limits: tuple[float, float] | None = None,
) -> float:
    """Return the root mean square of ``degrade(SR) - LR`` over the voxels, in units of the input.

    The degradation need not be how the input came about, so the number says how well SR explains LR under that
    assumption, and no more: it is no estimate of the error of SR.

    Args:
        lr: the input, (X, Y, Z).
        sr: its result, on a finer grid in the axial plane.
        degradation: the one that was assumed; that of the paper's Section 4.1 by default.
        device: where it is computed, a few slices at a time.
        limits: intensities beyond which SR is interpolated; both are clipped to them. None if there are none.
    """
    axis, squares = axial_axis(lr.affine), 0.0
    low, high = (np.moveaxis(volume.array, axis, 0) for volume in (lr, sr))  # (Z, X, Y)
    for start in range(0, len(low), _AT_ONCE):
        coarse, fine = (
            torch.from_numpy(np.ascontiguousarray(array[start : start + _AT_ONCE])).to(device) for array in (low, high)
        )
        coarse, fine = (coarse, fine) if limits is None else (coarse.clamp(*limits), fine.clamp(*limits))
        squares += float(((degradation or Degradation())(fine) - coarse).square().sum())
    return float(np.sqrt(squares / low.size))


def case_report(
    source: str,
    output: Path,
    lr: Volume,
    sr: Volume,
    degradation: Degradation,
    seconds: float,
    device: str | torch.device = "cpu",
    warnings: Sequence[str] = (),
    beside: Mapping[str, Path] | None = None,
    limits: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return the report of a case that was super-resolved, ready for JSON.

    Args:
        source: what the user gave.
        output: file of the result.
        lr: the input.
        sr: its result.
        degradation: the one that was assumed of the input.
        seconds: that inference took.
        device: where the residual is computed.
        warnings: in which respects the input is unlike those of the training, and what was said during inference.
        beside: files that were written beside the result, by what they are.
        limits: see `data_consistency_rms`.

    Returns:
        What was chosen of a DICOM folder (``series``, ``select``), modality (null where no header says it), sizes in
        voxels, spacings and fields of view in millimeters along the voxel axes, ranges and residual in units of the
        input; ``assumed_blur_voxels`` is the standard deviation of the blur that was assumed, in voxels of the
        input; ``largest_corner_shift_mm`` is how far the outer corners of the field of view moved. Of the expected
        error, if it was asked for, there are the mean and the maximum.
    """
    uncertainty = sr.uncertainty
    shift = fov_corners(lr.affine, lr.array.shape) - fov_corners(sr.affine, sr.array.shape)
    return {
        "input": source,
        "series": lr.series or None,
        "select": list(lr.select),
        "output": str(output),
        "beside": {what: str(path) for what, path in (beside or {}).items()},
        "modality": lr.modality or None,
        "before": _description(lr),
        "after": _description(sr),
        "largest_corner_shift_mm": float(np.linalg.norm(shift, axis=1).max()),
        "assumed_blur_voxels": round(degradation.lr_sigma, 2),
        "data_consistency_rms": data_consistency_rms(lr, sr, degradation, device, limits),
        "expected_absolute_error": None if uncertainty is None else _mean_and_maximum(uncertainty),
        "seconds": round(seconds, 3),
        "warnings": list(warnings),
    }


def _mean_and_maximum(array: np.ndarray) -> dict[str, float]:
    return {"mean": float(array.mean(dtype=np.float64)), "maximum": float(array.max())}


def _description(volume: Volume) -> dict[str, Any]:
    spacing = voxel_sizes(volume.affine)
    return {
        "shape": list(volume.array.shape),
        "spacing_mm": spacing.round(6).tolist(),
        "field_of_view_mm": (spacing * volume.array.shape).round(4).tolist(),
        "range": [float(volume.array.min()), float(volume.array.max())],
    }


def run_report(resolver: SuperResolver, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of a run: the model, the settings and the versions behind its cases.

    Args:
        resolver: what super-resolved them.
        cases: of `case_report`; of a case that failed, its input and the error.
    """
    about = resolver.about
    return {
        "model": {
            "name": about.get("name"),
            "version": about.get("version"),
            "bundle": str(resolver.bundle),
            "weights": str(resolver.weights),
            "weights_sha256": weights_sha256(resolver.bundle),
            "intended_use": about.get("intended_use"),
            "trained_on": resolver.domain.as_dict(),
        },
        "settings": {name: value for name, value in resolver.settings.items() if name != "progress"},
        "device": str(resolver.device),
        "versions": versions(),
        "cases": cases,
    }


def derivation(resolver: SuperResolver) -> str:
    """Return in two sentences how a resolver makes its results, for those who meet them without their report."""
    about = resolver.about
    settings = ", ".join(f"{name} {value}" for name, value in resolver.settings.items() if name != "progress")
    return (
        f"MIAR fourfold super-resolution in the axial plane, {SOFTWARE} {miar_monai.__version__}, "
        f"bundle {about.get('name')} {about.get('version')}, {settings}. For research: detail may be invented."
    )


def summary(report: dict[str, Any]) -> str:
    """Return a case's report in one line.

    Example:
        >>> side = {"shape": [60, 50, 4], "spacing_mm": [4.0, 4.0, 1.0]}
        >>> report = {"before": side, "after": {"shape": [240, 200, 4], "spacing_mm": [1.0, 1.0, 1.0]},
        ...     "assumed_blur_voxels": 0.0, "data_consistency_rms": 1.234, "seconds": 9.87, "modality": "CT"}
        >>> for part in summary(report).split("; "): print(part)
        60x50x4 at 4x4x1 mm -> 240x200x4 at 1x1x1 mm in 9.9 s
        assumed blur 0 voxels
        rms of degraded result minus input 1.23 HU
    """
    before, after = (
        f"{'x'.join(map(str, side['shape']))} at {'x'.join(f'{mm:.3g}' for mm in side['spacing_mm'])} mm"
        for side in (report["before"], report["after"])
    )
    blur = f"assumed blur {report['assumed_blur_voxels']:.2g} voxels"
    unit = "HU" if report["modality"] == "CT" else "in units of the input"
    residual = f"rms of degraded result minus input {report['data_consistency_rms']:.3g} {unit}"
    return f"{before} -> {after} in {report['seconds']:.1f} s; {blur}; {residual}"


def what_is_said(report: dict[str, Any], warnings: Sequence[str]) -> str:
    """Return what is printed of a case that is done: its line, warnings that nobody has read, what lies beside it.

    Args:
        report: of `case_report`.
        warnings: those of the report that were not printed before.
    """
    beside = (f"{what}: {path}" for what, path in report["beside"].items())
    return "\n".join([summary(report), *(f"warning: {sentence}" for sentence in warnings), *beside])
