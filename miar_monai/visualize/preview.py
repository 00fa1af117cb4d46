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
_DIFFERENCE = "MIAR - bicubic"
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
    unknown. Gray values range from the minimum to the 99.8th percentile of LR, differences to that of
    their planes. Volumes thinner than a tenth of their width have an axial plane only, and thin single slices their
    own. No display is needed.

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
    extent = np.array(fine.shape) * spacing
    main = next(name for name, (normal, _) in _PLANES.items() if normal == lr.grid.normal_axis)
    across, within = _PLANES[main]
    planes = {main: _PLANES[main]} | (_PLANES if extent[across] >= 0.1 * extent[within[0]] else {})
    rows = {name: _row(coarse, fine, coarse_spacing / spacing, normal) for name, (normal, _) in planes.items()}
    differences = np.concatenate([abs(row[_DIFFERENCE]).ravel() for row in rows.values()])
    limit = max(float(np.percentile(differences, 99.8)), 1e-6)
    gray = color_levels("gray", 64, coarse.min(), np.percentile(coarse, 99.8))
    colors = color_levels("RdBu_r", 24, -limit, limit)

    sizes = {name: extent[list(within)] for name, (_, within) in planes.items()}
    ratios = [size[1] / size[0] for size in sizes.values()]
    with page_figure(path, sum(ratios) * PAGE_WIDTH / 4 + 5 * LINE_HEIGHT, overwrite) as figure:
        axes = figure.subplots(len(planes), 4, squeeze=False, gridspec_kw={"height_ratios": ratios})
        for row, (name, images) in zip(axes, rows.items(), strict=True):
            for ax, (title, image) in zip(row, images.items(), strict=True):
                shown = _draw(ax, image, sizes[name], colors if title == _DIFFERENCE else gray)
                ax.set_title(title if name == main else "")
            row[0].set_ylabel(name)
            _scale_bar(row[0], sizes[name])
            if lr.space:
                row[0].text(0.02, 0.5, _LEFT_SIDE[name], color="orange", va="center", transform=row[0].transAxes)
        label = f"{_DIFFERENCE}, in units of the input"
        figure.colorbar(shown, ax=axes, location="bottom", label=label, shrink=0.24, aspect=30, anchor=(1, 0))
    return Path(path)


def _upright(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels along the axes of RAS+, as close as they come, and their spacing in millimeters."""
    image = nib.as_closest_canonical(nib.Nifti1Image(volume.array, volume.affine))
    return np.asarray(image.dataobj), voxel_sizes(image.affine)


def _row(coarse: np.ndarray, fine: np.ndarray, factors: np.ndarray, normal: int) -> dict[str, np.ndarray]:
    """Return the images of the middle plane across an axis, by their titles."""
    middle = fine.shape[normal] // 2
    plane = np.take(fine, middle, axis=normal)
    bicubic = _bicubic(coarse, fine.shape, factors, normal, middle)
    lr = np.take(coarse, coarse.shape[normal] // 2, axis=normal)
    return {"LR": lr, "bicubic": bicubic, "MIAR": plane, _DIFFERENCE: plane - bicubic}


def _bicubic(coarse: np.ndarray, shape: tuple[int, ...], factors: np.ndarray, normal: int, index: int) -> np.ndarray:
    """Return a plane, at an index along its normal axis, of a volume interpolated to a finer grid of the same center.

    The other planes of that grid are not computed, which may have the size of a result that is in memory only once.
    """
    result = coarse
    for axis in (normal, *(axis for axis in range(3) if axis != normal)):
        matrix = _upsampling(shape[axis], coarse.shape[axis], float(factors[axis])).astype(coarse.dtype)
        matrix = matrix[[index]] if axis == normal else matrix
        result = np.moveaxis(np.tensordot(matrix, result, axes=(1, axis)), 0, axis)
    return result.squeeze(normal)


def _upsampling(hr_size: int, lr_size: int, factor: float) -> np.ndarray:
    """Return the matrix of bicubic interpolation along an axis, (hr_size, lr_size)."""
    return np.eye(lr_size) if hr_size == lr_size else AxisDegradation(hr_size, lr_size, factor).upsampling().numpy()


def _draw(ax: Any, image: np.ndarray, size: np.ndarray, style: dict[str, Any]) -> Any:
    """Draw a plane without a frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return draw_slice(ax, image, size.tolist(), style)


def _scale_bar(ax: Any, size: np.ndarray) -> None:
    length, left = scale_bar_mm(size[0]), 0.05 * size[0]
    ax.plot([left, left + length], [0.05 * size[1]] * 2, color="orange", linewidth=2)
    ax.text(left, 0.08 * size[1], f"{length} mm", color="orange", va="bottom")
