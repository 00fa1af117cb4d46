"""What the weights of a bundle were trained on, in which respects an input is unlike it, and what is odd about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation

from miar_monai.errors import ConfigurationError
from miar_monai.geometry import axial_axis
from miar_monai.io import Volume

__all__ = ["TrainingDomain", "clipped", "oddities"]

Interval = tuple[float, float]
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

    def warnings(self, lr: Volume, scaled: np.ndarray) -> list[str]:
        """Return in which respects a volume is unlike those of the training, a sentence each.

        A tenth of the spacing and a twentieth of the intensity range are let pass.

        Args:
            lr: the input.
            scaled: its voxels after preprocessing.
        """
        found = []
        if self.modality and lr.modality and lr.modality != self.modality:
            found.append(f"the modality is {lr.modality}, but the model was trained on {self.modality}.")
        spacing = np.delete(np.linalg.norm(lr.affine[:3, :3], axis=0), axial_axis(lr.affine))
        if self.in_plane_spacing_mm is not None:
            low, high = self.in_plane_spacing_mm
            if spacing.min() < 0.9 * low or spacing.max() > 1.1 * high:
                size = " x ".join(f"{mm:.3g}" for mm in spacing)
                found.append(
                    f"the axial voxels are {size} mm, but those of the training were {_text(low, high)} mm:"
                    " structures of this size are new to the model."
                )
        unit = float(np.ptp(lr.array)) / float(np.ptp(scaled))
        for bounds, which, value, own in (
            (self.minimum, "darkest", float(scaled.min()), float(lr.array.min())),
            (self.maximum, "brightest", float(scaled.max()), float(lr.array.max())),
        ):
            if bounds is not None and not bounds[0] - 0.05 <= value <= bounds[1] + 0.05:
                low, high = (own + unit * (bound - value) for bound in bounds)
                found.append(
                    f"the {which} voxel is {own:.4g}, but in the volumes of the training it was {_text(low, high)}:"
                    " such intensities are new to the model, or in other units."
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
    if lr.is_own:
        found.append("the image is a result itself: give the image that it was made of.")
    if lr.space == 0:
        found.append(
            "the file does not say how its voxels lie in the patient (qform_code and sform_code are 0): slices along"
            " its third axis are taken for axial ones, and which side is left is not known."
        )
    spacing = np.linalg.norm(lr.affine[:3, :3], axis=0)
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
        1 voxels are above 3072, up to 14000, as of metal: what exceeds it is interpolated, not super-resolved.
    """
    above = 0 if limits is None else int(np.count_nonzero(lr.array > limits[1]))
    if limits is None or not above:
        return []
    return [
        f"{above} voxels are above {limits[1]:g}, up to {lr.array.max():g}, as of metal: what exceeds it is"
        " interpolated, not super-resolved."
    ]


def _text(low: float, high: float) -> str:
    low_text, high_text = f"{low:.4g}", f"{high:.4g}"
    return low_text if low_text == high_text else f"{low_text} to {high_text}"
