"""One picture of a result: the input, bicubic interpolation, MIAR and their difference, in three planes."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from miar_monai.data.io import Volume
from miar_monai.degradation import AxisDegradation
from miar_monai.errors import ConfigurationError
from miar_monai.visualize.drawing import (
    LINE_HEIGHT,
    PAGE_WIDTH,
    color_levels,
    draw_slice,
    page_figure,
    scale_bar_mm,
)

__all__ = ["check_preview", "preview"]

_PLANES = {
    "axial": (2, (0, 1)),
    "coronal": (1, (0, 2)),
    "sagittal": (0, (1, 2)),
}  # the normal axis and the axes within the plane
_LEFT_SIDE = {"axial": "R", "coronal": "R", "sagittal": "A"}  # the patient's right or anterior side


def check_preview() -> None:
    """Check before the work that a picture can be drawn.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError(
            "a preview needs matplotlib, which is not installed: install it with pip install miar-monai[demo], or "
            "leave the preview out."
        )


def preview(lr: Volume, sr: Volume, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Draw the middle of a volume in three planes: LR, bicubic, MIAR, and MIAR minus bicubic.

    All panels of a row cover the same field of view. The patient's right side is on the left of axial and coronal
    planes, the anterior side on the left of sagittal ones, marked by letters unless the orientation of the input is
    unknown. Gray values range from the minimum to the 99.8th percentile of LR. Volumes thinner than a tenth of their
    width have an axial plane only, and thin single slices their own. No display is needed.

    Args:
        lr: the input.
        sr: its result, on a finer grid.
        path: the picture, .png or another format of matplotlib. Its folder is created if needed.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        ConfigurationError: if matplotlib is not installed.
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    check_preview()
    (coarse, coarse_spacing), (fine, spacing) = _upright(lr), _upright(sr)
    bicubic = _bicubic(coarse, fine.shape, coarse_spacing / spacing)
    difference = fine - bicubic
    limit = max(float(np.percentile(abs(difference), 99.8)), 1e-6)
    gray = color_levels("gray", 64, coarse.min(), np.percentile(coarse, 99.8))
    colors = color_levels("RdBu_r", 24, -limit, limit)
    columns = {"LR": coarse, "bicubic": bicubic, "MIAR": fine, "MIAR - bicubic": difference}

    extent = np.array(fine.shape) * spacing
    main = next(name for name, (normal, _) in _PLANES.items() if normal == lr.grid.normal_axis)
    across, within = _PLANES[main]
    planes = {main: _PLANES[main]} | (_PLANES if extent[across] >= 0.1 * extent[within[0]] else {})
    sizes = {name: extent[list(within)] for name, (_, within) in planes.items()}
    ratios = [size[1] / size[0] for size in sizes.values()]
    with page_figure(path, sum(ratios) * PAGE_WIDTH / 4 + 5 * LINE_HEIGHT, overwrite) as figure:
        axes = figure.subplots(len(planes), 4, squeeze=False, gridspec_kw={"height_ratios": ratios})
        for row, (name, (normal, _)) in zip(axes, planes.items(), strict=True):
            for ax, (title, array) in zip(row, columns.items(), strict=True):
                middle = np.take(array, array.shape[normal] // 2, axis=normal)
                shown = _draw(ax, middle, sizes[name], colors if array is difference else gray)
                ax.set_title(title if name == main else "")
            row[0].set_ylabel(name)
            _scale_bar(row[0], sizes[name])
            if lr.space:
                row[0].text(0.02, 0.5, _LEFT_SIDE[name], color="orange", va="center", transform=row[0].transAxes)
        label = "MIAR - bicubic, in units of the input"
        figure.colorbar(shown, ax=axes, location="bottom", label=label, shrink=0.24, aspect=30, anchor=(1, 0))
    return Path(path)


def _upright(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels along the axes of RAS+, as close as they come, and their spacing in millimeters."""
    image = nib.as_closest_canonical(nib.Nifti1Image(volume.array, volume.affine))
    return np.asarray(image.dataobj), voxel_sizes(image.affine)


def _bicubic(coarse: np.ndarray, shape: tuple[int, ...], factors: np.ndarray) -> np.ndarray:
    """Interpolate a volume to a finer grid with the same center."""
    result = coarse
    for axis, factor in enumerate(factors.tolist()):
        if shape[axis] != coarse.shape[axis]:
            line = AxisDegradation(shape[axis], coarse.shape[axis], factor)
            matrix = line.upsampling().numpy().astype(result.dtype)  # (hr_size, lr_size)
            result = np.moveaxis(np.tensordot(matrix, result, axes=(1, axis)), 0, axis)
    return result


def _draw(ax: Any, image: np.ndarray, size: np.ndarray, style: dict[str, Any]) -> Any:
    """Draw a plane without a frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return draw_slice(ax, image, size.tolist(), style)


def _scale_bar(ax: Any, size: np.ndarray) -> None:
    length, left = scale_bar_mm(size[0]), 0.05 * size[0]
    ax.plot([left, left + length], [0.05 * size[1]] * 2, color="orange", linewidth=2)
    ax.text(left, 0.08 * size[1], f"{length} mm", color="orange", va="bottom")
