"""Checks of an input against the training data of a bundle, and for other properties that make its result doubtful."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation

from miar_monai.data.hounsfield import MAX_AIR, ct_units
from miar_monai.data.io import Volume
from miar_monai.degradation.blur_estimation import MIN_PATCH
from miar_monai.errors import ConfigurationError
from miar_monai.inference.passes import Plan
from miar_monai.inference.scanner_checks import scanner_warnings

__all__ = ["TrainingDomain", "clipping_warnings", "input_warnings", "volume_warnings"]

Interval = tuple[float, float]
_REPORT_NAMES = {name: f"{name}_after_preprocessing" for name in ("minimum", "maximum")}


@dataclass(frozen=True)
class TrainingDomain:
    """The training data as described in the ``metadata.json`` of a bundle; None if it is not described.

    ``miar training-range`` measures the intervals.

    Args:
        modality: DICOM modality of the low-resolution images, from ``network_data_format``.
        in_plane_spacing_mm: lowest and highest spacing of their voxels in the axial plane, from ``training_range``.
        minimum: lowest and highest minimum of a volume after preprocessing, from ``training_range``.
        maximum: lowest and highest maximum of a volume after preprocessing, from ``training_range``.
        in_plane_factor: lowest and highest factor by which their pixels were larger, from ``training_range``.
        through_plane_factor: lowest and highest factor by which their slices were thicker, from ``training_range``;
            None without thick slices.
    """

    modality: str | None = None
    in_plane_spacing_mm: Interval | None = None
    minimum: Interval | None = None
    maximum: Interval | None = None
    in_plane_factor: Interval | None = None
    through_plane_factor: Interval | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> TrainingDomain:
        """Read the description from the metadata of a bundle.

        Raises:
            ConfigurationError: if it is malformed.

        Example:
            >>> TrainingDomain.of({"training_range": {"in_plane_spacing_mm": [3.5, 4]}}).in_plane_spacing_mm
            (3.5, 4.0)
        """
        try:
            modality = metadata.get("network_data_format", {}).get("inputs", {}).get("image", {}).get("modality")
            bounds = {name: _interval(name, x) for name, x in metadata.get("training_range", {}).items()}
            return cls(None if modality is None else str(modality), **bounds)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(
                f"the metadata.json of the bundle cannot be used ({error}): network_data_format as MONAI has it, and a"
                " lowest and a highest number for each part of training_range, are needed; restore it."
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Return the description for JSON; the names of minimum and maximum state that they are not in input units."""
        return {_REPORT_NAMES.get(name, name): value for name, value in asdict(self).items()}

    def warnings(self, lr: Volume) -> list[str]:
        """Return sentences on relevant differences between a volume and the training data.

        The modality is taken from the header or, without one, guessed from the intensities; those for a CT model must
        be HU. Voxel sizes are not compared: the networks work in voxels, and the degraded training volumes had larger
        ones than any scan.

        Args:
            lr: the input.
        """
        if self.modality and lr.modality and lr.modality != self.modality:
            return [f"the modality is {lr.modality}, but the model was trained on {self.modality}."]
        units = ct_units(lr.array) if not lr.modality and self.modality not in (None, "CT") else ""
        if units:
            return [f"the intensities are those of a CT in {units}, but the model was trained on {self.modality}."]
        darkest = float(lr.array.min())
        if self.modality == "CT" and darkest > MAX_AIR:
            units = "in HU + 1024 (subtract 1024)" if ct_units(lr.array) else "not in HU, or were clipped"
            return [
                f"the darkest voxel is {darkest:.4g}, but air in a CT has -1000 HU: the intensities are {units}, but"
                " the model was trained on HU."
            ]
        return []

    def grid_warnings(self, plan: Plan) -> list[str]:
        """Return a sentence on each way in which a plan makes axes finer that the training did not include."""
        if self.in_plane_factor is None:
            return []
        sentences = []
        for name, thick, trained in (
            ("pixels", False, self.in_plane_factor),
            ("slices", True, self.through_plane_factor),
        ):
            factors = [line.factor for line in plan.lines if line.factor > 1 and (line.profile != "bicubic") == thick]
            low, high = trained or (0.0, 0.0)
            if any(not low <= factor <= high for factor in factors):
                limits = f"by {low:g}" if low == high else f"from {low:g} to {high:g}"
                known = f"for factors {limits}" if trained else "for the axial plane alone"
                sentences.append(
                    f"{name} become {max(factors):.4g} x finer, but the model was trained {known}: the detail is"
                    " doubtful; fidelity 1 adds the least."
                )
        return sentences


_INTERVALS = tuple(field.name for field in fields(TrainingDomain) if field.name != "modality")


def _interval(name: str, bounds: Any) -> Interval:
    """Return the lowest and the highest value of a part of ``training_range``."""
    if name not in _INTERVALS:
        raise ValueError(f"training_range has {name!r}, which is none of {', '.join(_INTERVALS)}")
    low, high = map(float, bounds)
    if not low <= high:
        raise ValueError(f"{name} is from {low:g} to {high:g}")
    return low, high


def input_warnings(
    lr: Volume,
    domain: TrainingDomain,
    blur: float | str | None = None,
    plan: Plan | None = None,
    limits: tuple[float, float] | None = None,
) -> list[str]:
    """Return sentences on all properties of a volume that make its result doubtful, known before inference.

    Args:
        lr: the input.
        domain: the training data of the model.
        blur: the setting of the inferer.
        plan: the passes of the super-resolution; by default, the axial plane becomes finer, without a measured blur.
        limits: intensities beyond which the result is interpolated, in units of the input, or None.
    """
    sentences = [
        *volume_warnings(lr, asked=plan is not None and not plan.request.is_default),
        *scanner_warnings(lr, None if plan is None else plan.factors),
        *clipping_warnings(lr, limits),
        *domain.warnings(lr),
    ]
    if plan is not None and plan.blur is not None and blur == "auto":
        one, grid = plan.stages[-1][-1], lr.grid
        sides = [grid.shape[grid.patient_axes.index(axis)] for axis in one.plane]
        if min(sides) < MIN_PATCH:
            sentences.append(
                f"the {one.name} slices have {' x '.join(map(str, sides))} voxels, but at least {MIN_PATCH} x"
                f" {MIN_PATCH} are needed to measure the blur: the blur of the training is assumed."
            )
    return sentences if plan is None else [*sentences, *domain.grid_warnings(plan)]


def volume_warnings(lr: Volume, asked: bool = False) -> list[str]:
    """Return sentences on properties of a volume that make its result doubtful with any model.

    Args:
        lr: the input.
        asked: whether the user asked for the grid of the result; otherwise the axial plane becomes finer.

    Example:
        >>> from pathlib import Path
        >>> sagittal = Volume(np.zeros((4, 9, 9)), np.diag([5.0, 1, 1, 1]), np.dtype("int16"), Path("x"))
        >>> volume_warnings(sagittal)[0].split(":")[0]
        'the slices are sagittal, 5 mm apart'
    """
    sentences = list(lr.remarks)
    if lr.is_miar_result:
        sentences.append("the image is already a super-resolved image: give the original.")
    if lr.space == 0:
        sentences.append(
            "the file does not state the orientation of its voxels (qform_code and sform_code are 0): its third axis is"
            " taken as the axial one, and left and right are unknown."
        )
    spacing = voxel_sizes(lr.affine)
    thickest, direction = int(spacing.argmax()), io_orientation(lr.affine)[:, 0]
    thick = 1 not in lr.array.shape and spacing[thickest] > 1.5 * np.median(spacing)
    if not asked and thick and direction[thickest] != 2:
        plane = ("sagittal", "coronal")[int(direction[thickest])]
        sentences.append(
            f"the slices are {plane}, {spacing[thickest]:.3g} mm apart: only the axial plane becomes finer, which"
            " crosses them; ask for isotropic voxels, or for a factor or a spacing of each axis."
        )
    return sentences


def clipping_warnings(lr: Volume, limits: tuple[float, float] | None) -> list[str]:
    """Return a sentence on the voxels above the intensities that are super-resolved, if there are any.

    Example:
        >>> from pathlib import Path
        >>> metal = Volume(np.array([[[-1024.0, 40, 14000]]]), np.eye(4), np.dtype("int16"), Path("x"))
        >>> print(*clipping_warnings(metal, (-1024, 3072)))
        1 voxel is above 3072 (up to 14000), as in metal: the excess is interpolated, not super-resolved.
    """
    if limits is None:
        return []
    count = int(np.count_nonzero(lr.array > limits[1]))
    if not count:
        return []
    voxels = "1 voxel is" if count == 1 else f"{count} voxels are"
    return [
        f"{voxels} above {limits[1]:g} (up to {lr.array.max():g}), as in metal: the excess is interpolated, not"
        " super-resolved."
    ]
