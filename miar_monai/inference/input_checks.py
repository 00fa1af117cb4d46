"""What the weights of a bundle were trained on, in which respects an input is unlike it, and what is odd about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation

from miar_monai.data.io import Volume
from miar_monai.degradation.blur_estimation import SMALLEST
from miar_monai.errors import ConfigurationError

__all__ = ["TrainingDomain", "clipped", "input_warnings", "oddities"]

Interval = tuple[float, float]
_MOST_OF_AIR = -500.0  # HU: above is no lung and no gas
_BONE = 500.0  # HU
_OFFSET = 1024  # of a CT that is stored without a sign
_AFTER = {name: f"{name}_after_preprocessing" for name in ("minimum", "maximum")}


@dataclass(frozen=True)
class TrainingDomain:
    """What a bundle's ``metadata.json`` says of its training; None is what it does not say.

    ``python -m benchmarks.training_range`` measures the intervals.

    Args:
        modality: of the low-resolution images, as DICOM calls it: ``network_data_format``.
        in_plane_spacing_mm: lowest and highest spacing of their voxels in the axial plane: ``training_range``.
        minimum: likewise, the minimum of a volume after preprocessing.
        maximum: likewise, the maximum.
    """

    modality: str | None = None
    in_plane_spacing_mm: Interval | None = None
    minimum: Interval | None = None
    maximum: Interval | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> TrainingDomain:
        """Read it from a bundle's metadata.

        Raises:
            ConfigurationError: if what is there is not as it should be.

        Example:
            >>> TrainingDomain.of({"training_range": {"in_plane_spacing_mm": [3.5, 4]}}).in_plane_spacing_mm
            (3.5, 4.0)
        """
        try:
            modality = metadata.get("network_data_format", {}).get("inputs", {}).get("image", {}).get("modality")
            bounds = {}
            for name, interval in metadata.get("training_range", {}).items():
                low, high = map(float, interval)
                bounds[name] = (low, high)
            return cls(None if modality is None else str(modality), **bounds)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(
                f"the metadata.json of the bundle cannot be used ({error}): network_data_format as MONAI has it, and a"
                " lowest and a highest number for each part of training_range, are needed; restore it."
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON; the names of the intensities say that they are not in units of an input."""
        return {_AFTER.get(name, name): value for name, value in asdict(self).items()}

    def warnings(self, lr: Volume) -> list[str]:
        """Return in which respects a volume is so unlike those of the training that it matters, a sentence each.

        The modality is that of the header or, without one, what the intensities look like; those of a CT model must be
        HU. Voxel sizes are not compared: the networks see voxels, and those of every scan are smaller than the
        training's, which were degraded.

        Args:
            lr: the input.
        """
        if self.modality and lr.modality and lr.modality != self.modality:
            return [f"the modality is {lr.modality}, but the model was trained on {self.modality}."]
        looks = _looks_of_ct(lr.array) if not lr.modality and self.modality not in (None, "CT") else ""
        if looks:
            return [f"the intensities are those of a CT{looks}, but the model was trained on {self.modality}."]
        darkest = float(lr.array.min())
        if self.modality == "CT" and darkest > _MOST_OF_AIR:
            unlike = "HU + 1024, which is to be subtracted" if _looks_of_ct(lr.array) else "no HU, or were clipped"
            return [
                f"the darkest voxel is {darkest:.4g}, but air in a CT has -1000 HU: the intensities are {unlike}, but"
                " the model was trained on HU."
            ]
        return []


def _looks_of_ct(array: np.ndarray) -> str:
    """Return which numbers of a CT the voxels of a volume look like, or an empty text.

    In HU a CT has air about -1000 and soft tissue about 0, and less between air and padding, where the phase of an MR
    has as much as anywhere. Without a sign both are 1024 higher, where an MR may have voxels too: but hardly any as
    bright as bone, and not nearly all others within 175 HU of water.
    """

    def share(low: float, high: float) -> float:
        return float(np.mean((array >= low) & (array <= high)))

    air = share(-1100, -850)
    if air >= 0.05 and share(-150, 200) >= 0.05 and share(-1900, -1100.5) < air:
        return " in HU"
    if array.min() < 0 or array.max() < _BONE + _OFFSET:
        return ""
    body = share(_MOST_OF_AIR + _OFFSET, np.inf)
    tissue = share(_OFFSET - 174, _OFFSET + 176)
    return " in HU + 1024" if share(1, 124) >= 0.03 and body >= 0.01 and tissue >= 0.7 * body else ""


def input_warnings(
    lr: Volume,
    domain: TrainingDomain,
    blur: float | str | None,
    sides: Sequence[int],
    limits: tuple[float, float] | None = None,
) -> list[str]:
    """Return all that is known to make the result of a volume doubtful before the network runs, a sentence each.

    Args:
        lr: the input.
        domain: what the model was trained on.
        blur: setting of the inferer.
        sides: of the axial slices, in voxels.
        limits: intensities beyond which the result is interpolated, in units of the input, if there are any.
    """
    found = [*oddities(lr), *clipped(lr, limits), *domain.warnings(lr)]
    if blur == "auto" and min(sides) < SMALLEST:
        found.append(
            f"the axial slices have {' x '.join(map(str, sides))} voxels, and a blur is measured in {SMALLEST} x"
            f" {SMALLEST} or more: that of the training is assumed."
        )
    return found


def oddities(lr: Volume) -> list[str]:
    """Return what makes the result of a volume doubtful, whatever the model was trained on, a sentence each.

    Example:
        >>> from pathlib import Path
        >>> sagittal = Volume(np.zeros((4, 9, 9)), np.diag([5.0, 1, 1, 1]), np.dtype("int16"), Path("x"))
        >>> oddities(sagittal)[0].split(":")[0]
        'the slices are sagittal, 5 mm apart'
    """
    found = list(lr.remarks)
    if lr.is_miar_result:
        found.append("the image is a result itself: give the image that it was made of.")
    if lr.space == 0:
        found.append(
            "the file does not say how its voxels lie in the patient (qform_code and sform_code are 0): slices along"
            " its third axis are taken for axial ones, and which side is left is not known."
        )
    spacing = voxel_sizes(lr.affine)
    thickest, direction = int(spacing.argmax()), io_orientation(lr.affine)[:, 0]
    if direction[thickest] != 2 and spacing[thickest] > 1.5 * np.median(spacing):
        plane = ("sagittal", "coronal")[int(direction[thickest])]
        found.append(
            f"the slices are {plane}, {spacing[thickest]:.3g} mm apart: it is the axial plane that becomes finer, which"
            " cuts across them; give an axial series."
        )
    return found


def clipped(lr: Volume, limits: tuple[float, float] | None) -> list[str]:
    """Return how much of a volume lies above the intensities that are super-resolved, in a sentence, if any does.

    Example:
        >>> from pathlib import Path
        >>> metal = Volume(np.array([[[-1024.0, 40, 14000]]]), np.eye(4), np.dtype("int16"), Path("x"))
        >>> print(*clipped(metal, (-1024, 3072)))
        1 voxel is above 3072 (up to 14000), as in metal: the excess is interpolated, not super-resolved.
    """
    above = 0 if limits is None else int(np.count_nonzero(lr.array > limits[1]))
    if limits is None or not above:
        return []
    return [
        f"{above} voxel{'s are' if above > 1 else ' is'} above {limits[1]:g} (up to {lr.array.max():g}), as in metal:"
        " the excess is interpolated, not super-resolved."
    ]
