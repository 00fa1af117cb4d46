"""Checks of a guide, another contrast of the same patient, against its image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miar_monai.data.grid_request import PATIENT_AXES
from miar_monai.data.io import Volume
from miar_monai.data.spectrum import axes_without_detail, tissue_threshold
from miar_monai.errors import GeometryError, ImageError
from miar_monai.transforms.guide import in_field_of_view

__all__ = ["check_guide", "guide_detail_warnings"]

_MIN_COVERAGE = 0.9
_COARSER = 1.25  # of the voxels of the image; those of a tilted guide extend a little further along its axes
_SPACES = {1: "those of the scanner", 2: "those of another image", 3: "Talairach's", 4: "MNI's"}


def check_guide(guide: Volume, image: Volume) -> list[str]:
    """Return sentences on properties of a guide that make it less useful for an image, or the result doubtful.

    Args:
        guide: another contrast of the same patient.
        image: the input.

    Raises:
        ImageError: if the guide is the image itself.
        GeometryError: if the guide has none of the tissue of the image in its field of view.

    Example:
        >>> from pathlib import Path
        >>> array = np.random.default_rng(0).uniform(0, 9, (20, 20, 20))
        >>> image, guide = (Volume(array[::k], np.diag([k, 1.0, 1, 1]), np.dtype("int16"), Path("x")) for k in (1, 2))
        >>> print(*check_guide(guide, image))
        the guide is coarser than the image along left-right (2 mm, the image 1 mm): it has no detail to add there.
    """
    if guide.array.shape == image.array.shape and np.array_equal(guide.array, image.array):
        raise ImageError(
            f"{guide.path} is the image itself: as a guide, another contrast of the same patient is needed; give that,"
            " or no guide."
        )
    return [
        *(f"the guide: {remark}" for remark in guide.remarks),
        *_result_warning(guide),
        *_space_warnings(guide, image),
        *_coverage_warnings(guide, image),
        *_resolution_warnings(guide, image),
    ]


def guide_detail_warnings(guide: Volume, factors: Sequence[float]) -> list[str]:
    """Return a sentence on the axes that become finer but have no detail in the guide, although its voxels are small.

    Such a guide was interpolated from thick slices. The network takes it for a sharp one, which can make the result
    worse than without a guide.

    Args:
        guide: another contrast of the same patient.
        factors: how many times finer each patient axis becomes.
    """
    finer = {axis for axis in range(3) if factors[axis] > 1}
    axes = [guide.grid.patient_axes[axis] for axis in axes_without_detail(guide.array)]
    names = [PATIENT_AXES[axis] for axis in sorted(finer.intersection(axes))]
    if not names:
        return []
    return [
        f"the guide has no detail along {' and '.join(names)}, as if interpolated from thick slices: it can make the"
        " result worse there; compare with a result without it."
    ]


def _result_warning(guide: Volume) -> list[str]:
    if not guide.is_miar_result:
        return []
    return ["the guide is a super-resolved image, whose invented detail affects the result: give the original."]


def _space_warnings(guide: Volume, image: Volume) -> list[str]:
    """Compare the origins of the millimeters, by NIfTI's codes or DICOM's frame of reference."""
    advice = (
        "it helps only where both show the same anatomy; compare them, and register the guide if they do not agree."
    )
    if guide.space == 0:
        return [f"the file of the guide does not state the orientation of its voxels: {advice}"]
    if guide.space != image.space and {guide.space, image.space} & {3, 4} and image.space:
        ours, theirs = (_SPACES.get(volume.space, "unknown") for volume in (image, guide))
        return [f"the coordinates of the guide are {theirs}, and those of the image {ours}: {advice}"]
    frames = guide.frame_of_reference, image.frame_of_reference
    if all(frames) and frames[0] != frames[1]:
        return [f"guide and image have different frames of reference (DICOM), as from two visits: {advice}"]
    return []


def _coverage_warnings(guide: Volume, image: Volume) -> list[str]:
    tissue = image.array > tissue_threshold(image.array)
    coverage = float(in_field_of_view(image.grid, guide.grid)[tissue].mean())  # some voxel is above the threshold
    if not coverage:
        raise GeometryError(
            f"{guide.path} shows none of the tissue in {image.path}, by the positions in their headers: a guide of the"
            " same patient in the same coordinates is needed; register it to the image, or give no guide."
        )
    if coverage >= _MIN_COVERAGE:
        return []
    return [f"the guide covers {100 * coverage:.0f} % of the image: the rest is super-resolved without it."]


def _resolution_warnings(guide: Volume, image: Volume) -> list[str]:
    """Compare the extents of the voxels of the guide along the axes of the image with the spacing of the image."""
    voxels = np.linalg.solve(image.affine, guide.affine)[:3, :3]
    extents, spacing = np.linalg.norm(voxels, axis=1) * image.grid.spacing, image.grid.spacing
    coarser = [
        f"{PATIENT_AXES[image.grid.patient_axes[axis]]} ({extents[axis]:.3g} mm, the image {spacing[axis]:.3g} mm)"
        for axis in range(3)
        if extents[axis] > _COARSER * spacing[axis]
    ]
    if not coarser:
        return []
    return [f"the guide is coarser than the image along {' and '.join(coarser)}: it has no detail to add there."]
