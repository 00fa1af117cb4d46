"""Tiles of slices: padding of small slices, blending of overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from torch import Tensor
from tqdm import tqdm

from miar_monai.data.grid import resized_size

__all__ = ["MAX_BAND", "Padding", "TileFunction", "blend_tiles", "counted", "in_bands", "num_tiles"]

MAX_BAND = 2**22  # voxels of the HR grid that are predicted at once, for example one image of 2048 x 2048

Output = TypeVar("Output", Tensor, dict[str, Tensor])
TileFunction: TypeAlias = Callable[[Tensor], Any]
"""Maps tiles (n, C, side, side) to a tensor (n, ...), or to tensors by name."""


def counted(bar: tqdm, predictor: TileFunction) -> TileFunction:
    """Return a function of tiles that moves a progress bar."""

    def predict(tiles: Tensor) -> Tensor | dict[str, Tensor]:
        result: Tensor | dict[str, Tensor] = predictor(tiles)
        bar.update(len(tiles))
        return result

    return predict


def num_tiles(size: int, side: int, overlap: float) -> int:
    """Return the number of tiles along an axis of ``size`` voxels.

    Example:
        >>> [num_tiles(size, 64, 0.25) for size in (40, 64, 65, 113)]
        [1, 1, 2, 3]
    """
    step = max(int(side * (1 - overlap)), 1)
    return max(-(-(size - side) // step), 0) + 1


def blend_tiles(
    images: Tensor, side: int, overlap: float, batch_size: int, predictor: Callable[[Tensor], Output]
) -> Output:
    """Apply a function to overlapping tiles of images of any size, and blend its outputs.

    Tiles are weighted by a window that vanishes at their borders, where convolutions have the least context; the
    windows of MONAI end at a weight of 1e-3, which leaves visible seams.

    Args:
        images: (N, C, H, W), H and W at least ``side``.
        side: side of a tile.
        overlap: fraction of a tile shared with its neighbor, in [0, 1).
        batch_size: number of tiles per call of the function.
        predictor: maps tiles (n, C, side, side) to a tensor (n, C', s · side, s · side), or to tensors by name.
    """
    if images.shape[2:] == (side, side):
        return predictor(images)  # nothing to blend
    weight = torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).pow(4).clamp(min=1e-6)
    result: Output = sliding_window_inference(  # type: ignore[assignment]
        images,
        roi_size=(side, side),
        sw_batch_size=batch_size,
        predictor=predictor,
        overlap=overlap,
        roi_weight_map=torch.outer(weight, weight).to(images),
        padding_mode="replicate",
    )
    return result


def in_bands(
    images: Tensor,
    stride: int,
    predictor: Callable[[Tensor], Output],
    max_voxels: int = MAX_BAND,
    context: int = 64,
) -> Output:
    """Apply a function of convolutions to images of any size, in bands of rows and parts of the batch.

    Each band is predicted together with rows above and below it, which are cut off.

    Args:
        images: (N, C, H, W).
        stride: of the function: bands start at a multiple of it.
        predictor: maps images (n, C, h, W) to a tensor (n, C', h, W), or to tensors by name.
        max_voxels: maximum of n · h · W, without the context, if a band of ``stride`` rows allows it.
        context: rows of context on each side, at least half of the receptive field; a multiple of ``stride``.
    """
    height, width = images.shape[2:]
    rows = max(max_voxels // (width * stride), 1) * stride
    parts = []
    for part in images.split(max(max_voxels // (width * height), 1)):
        bands = []
        for start in range(0, height, rows):
            above = min(start, context)
            band = predictor(part[:, :, start - above : start + rows + context])
            bands.append(_rows(band, above, min(rows, height - start)))
        parts.append(_joined(bands, dim=2))
    return _joined(parts, dim=0)


def _rows(output: Output, start: int, count: int) -> Output:
    """Return some rows of tensors, or of tensors by name."""
    if isinstance(output, Tensor):
        return output.narrow(2, start, count)
    return {name: x.narrow(2, start, count) for name, x in output.items()}


def _joined(outputs: list[Output], dim: int) -> Output:
    """Concatenate tensors, or tensors by name."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(outputs, dim)
    return {name: torch.cat([x[name] for x in outputs], dim) for name in first}


class Padding(NamedTuple):
    """Padding of one axis of LR slices to the size of a tile, and the place of the slice in the padded HR image."""

    before: int
    """LR voxels before the slice."""
    after: int
    """LR voxels after it."""
    start: int
    """HR voxels before the slice."""
    size: int
    """HR voxels of the slice."""
    padded_size: int
    """HR voxels of the padded slice."""

    @classmethod
    def of(cls, lr_size: int, scale: float, side: int | None) -> Padding:
        """Return the padding of an axis of ``lr_size`` voxels for tiles of ``side`` HR voxels; None for no tiles.

        LR and HR images have the same center. If the scale is not a whole number, both ends are padded equally to keep
        it so.

        Example:
            >>> Padding.of(61, 4, 256)
            Padding(before=1, after=2, start=4, size=244, padded_size=256)
            >>> Padding.of(100, 2.5, 256)
            Padding(before=2, after=2, start=5, size=250, padded_size=260)
        """
        size = resized_size(lr_size, 1 / scale)
        missing = 0 if side is None else max(ceil((side - size) / scale), 0)
        before, after = (missing // 2, missing - missing // 2) if scale % 1 == 0 else (-(-missing // 2),) * 2
        start = round(before * scale)
        return cls(before, after, start, size, start + size + round(after * scale))

    @staticmethod
    def pad(slices: Tensor, rows: Padding, columns: Padding) -> Tensor:
        """Pad LR slices (N, 1, h, w) by replication."""
        return F.pad(slices, [columns.before, columns.after, rows.before, rows.after], mode="replicate")

    @staticmethod
    def pad_hr(images: Tensor, rows: Padding, columns: Padding) -> Tensor:
        """Pad HR images (N, C, H, W) by replication, the inverse of `crop`."""
        sizes = [(axis.start, axis.padded_size - axis.start - axis.size) for axis in (columns, rows)]
        return F.pad(images, [*sizes[0], *sizes[1]], mode="replicate")

    @staticmethod
    def crop(images: Tensor, rows: Padding, columns: Padding) -> Tensor:
        """Crop HR images (N, C, H, W) of padded slices to the slices."""
        return images[..., rows.start : rows.start + rows.size, columns.start : columns.start + columns.size]
