"""Reports of runs: model, settings, versions, and for each case geometry, blur, residual, warnings and time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.affines import voxel_sizes

from miar_monai._version import __version__
from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import SOFTWARE, Volume
from miar_monai.degradation import Degradation
from miar_monai.inference.acquisition import Acquisition
from miar_monai.inference.bundle import model_facts, weights_sha256
from miar_monai.inference.packages import installed_versions
from miar_monai.inference.passes import Plan, plan_passes
from miar_monai.inference.resolver import SuperResolver

__all__ = [
    "capture_warnings",
    "case_facts",
    "case_message",
    "case_report",
    "data_consistency_rms",
    "derivation",
    "model_report",
    "run_report",
    "summary",
]


@contextmanager
def capture_warnings() -> Iterator[list[str]]:
    """Collect the warnings that this package logs during the block, in all threads.

    Yields:
        A list that grows with each warning.

    Example:
        >>> with capture_warnings() as captured:
        ...     logging.getLogger("miar_monai.somewhere").warning("out of %s", "memory")
        >>> captured
        ['out of memory']
    """
    captured: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            captured.append(record.getMessage())

    collector, package_logger = Collector(logging.WARNING), logging.getLogger("miar_monai")
    package_logger.addHandler(collector)
    try:
        yield captured
    finally:
        package_logger.removeHandler(collector)


def data_consistency_rms(
    lr: Volume,
    sr: Volume,
    plan: Plan | None = None,
    device: str | torch.device = "cpu",
    limits: tuple[float, float] | None = None,
) -> float:
    """Return the data-consistency residual: the root mean square of ``degrade(SR) - LR``, in units of the input.

    It measures how well SR explains LR under the assumed degradation. It is not an estimate of the error of SR.

    Args:
        lr: the input, (X, Y, Z).
        sr: its result, on a finer grid.
        plan: the passes with the assumed degradations; by default that of the paper's Section 4.1 in the axial plane.
        device: where the slices are degraded.
        limits: intensities beyond which SR is interpolated, or None; both volumes are clipped to them.
    """
    grid = lr.grid
    plan = plan or plan_passes((4, 4, 1), grid.patient_spacing, lambda _: Degradation(), Acquisition.of(lr))
    total = 0.0
    for block, voxels in plan.degraded_blocks(torch.from_numpy(sr.array), plan.grids(grid), device, limits):
        expected = lr.array[block] if limits is None else lr.array[block].clip(*limits)
        total += float(np.square(voxels.cpu().numpy() - expected, dtype=np.float64).sum())
    return float(np.sqrt(total / lr.array.size))


def case_report(
    source: str,
    output: Path,
    lr: Volume,
    sr: Volume,
    plan: Plan,
    seconds: float,
    device: str | torch.device = "cpu",
    warnings: Sequence[str] = (),
    auxiliary_outputs: Mapping[str, Path] | None = None,
    limits: tuple[float, float] | None = None,
    guide: Path | None = None,
) -> dict[str, Any]:
    """Return the report of a super-resolved case, ready for JSON.

    Args:
        source: path of the input, as the user gave it.
        output: file of the result.
        lr: the input.
        sr: its result.
        plan: its passes and assumed degradations.
        seconds: duration of the inference.
        device: where the residual is computed.
        warnings: sentences on the input and from the inference.
        auxiliary_outputs: other files that were written, by their kind.
        limits: see `data_consistency_rms`.
        guide: path of the guide.

    Returns:
        The selection from a DICOM folder (``series``, ``select``), the modality (null if no header states it), sizes in
        voxels, spacings and fields of view in millimeters along the voxel axes, ranges and residual in units of the
        input; ``grid``, the requested grid and the passes with their assumed degradations, see `Plan.as_dict`;
        ``assumed_blur_voxels``, the standard deviation of the assumed blur in voxels of the input, null without one;
        ``largest_corner_shift_mm`` is the largest distance between corresponding corners of both fields of view. With
        uncertainty, mean and maximum of the expected error.
    """
    uncertainty = sr.uncertainty
    shift = fov_corners(lr.affine, lr.array.shape) - fov_corners(sr.affine, sr.array.shape)
    return {
        "input": source,
        "series": lr.series or None,
        "select": list(lr.select),
        "guide": None if guide is None else str(guide),
        "output": str(output),
        "auxiliary_outputs": {kind: str(path) for kind, path in (auxiliary_outputs or {}).items()},
        "modality": lr.modality or None,
        "before": _description(lr),
        "after": _description(sr),
        "largest_corner_shift_mm": float(np.linalg.norm(shift, axis=1).max()),
        "grid": plan.as_dict(),
        "assumed_blur_voxels": None if plan.blur is None else round(plan.blur, 2),
        "data_consistency_rms": data_consistency_rms(lr, sr, plan, device, limits),
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
    """Return the report of a run: model, settings, versions and cases.

    Args:
        resolver: the resolver of the run.
        cases: from `case_report`; for a failed case, its input and the error.
    """
    return {
        "model": model_report(resolver),
        "settings": {name: value for name, value in resolver.settings.items() if name != "progress"},
        "device": str(resolver.device),
        "versions": installed_versions(),
        "cases": cases,
    }


def model_report(resolver: SuperResolver) -> dict[str, Any]:
    """Return the model of a run: bundle, version, weights and their SHA-256, use and training data."""
    about = resolver.about
    return {
        "name": about.get("name"),
        "version": about.get("version"),
        "bundle": str(resolver.bundle),
        "weights": str(resolver.weights),
        "weights_sha256": weights_sha256(resolver.weights),
        "intended_use": about.get("intended_use"),
        "trained_on": resolver.domain.as_dict(),
    }


def derivation(resolver: SuperResolver, guide: str = "") -> str:
    """Return two sentences on software, model, settings and the guide, if any, for the header of a DICOM result."""
    about = resolver.about
    given = {name: value for name, value in resolver.settings.items() if name != "progress" and value is not None}
    given |= {"guide": guide} if guide else {}
    settings = ", ".join(f"{name} {value}" for name, value in given.items())
    return (
        f"MIAR super-resolution, {SOFTWARE} {__version__}, "
        f"bundle {about.get('name')} {about.get('version')}, {settings}. For research: detail may be invented."
    )


def summary(report: Mapping[str, Any]) -> str:
    """Return a case's report in one line.

    Example:
        >>> side = {"shape": [60, 50, 4], "spacing_mm": [4.0, 4.0, 1.0]}
        >>> report = {"before": side, "after": {"shape": [240, 200, 4], "spacing_mm": [1.0, 1.0, 1.0]},
        ...     "assumed_blur_voxels": 0.0, "data_consistency_rms": 1.234, "seconds": 9.87, "modality": "CT"}
        >>> for part in summary(report).split("; "): print(part)
        60x50x4 at 4x4x1 mm -> 240x200x4 at 1x1x1 mm in 9.9 s
        assumed blur of 0 voxels
        rms of degraded result minus input 1.23 HU
    """
    before, after = (
        f"{'x'.join(map(str, side['shape']))} at {'x'.join(f'{mm:.3g}' for mm in side['spacing_mm'])} mm"
        for side in (report["before"], report["after"])
    )
    blur = report["assumed_blur_voxels"]
    assumed = "" if blur is None else f"assumed blur of {blur:.2g} voxel{'s' * (f'{blur:.2g}' != '1')}; "
    unit = "HU" if report["modality"] == "CT" else "in units of the input"
    residual = f"rms of degraded result minus input {report['data_consistency_rms']:.3g} {unit}"
    return f"{before} -> {after} in {report['seconds']:.1f} s; {assumed}{residual}"


def case_facts(report: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, str]:
    """Return what a page says of a case, by name: its report in one line, the model and its weights.

    Args:
        report: from `case_report`.
        model: from `model_report`.
    """
    return {
        "Result": summary(report),
        **model_facts(model),
        "Intended use": str(model["intended_use"]),
    }


def case_message(report: dict[str, Any], warnings: Sequence[str]) -> str:
    """Return the message for a finished case: its summary, warnings and auxiliary outputs, one per line.

    Args:
        report: from `case_report`.
        warnings: those of the report that were not printed yet.
    """
    outputs = (f"{kind}: {path}" for kind, path in report["auxiliary_outputs"].items())
    return "\n".join([summary(report), *(f"warning: {sentence}" for sentence in warnings), *outputs])
