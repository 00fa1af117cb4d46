"""Label maps, such as segmentations, carried to another grid as labels."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from nibabel.affines import apply_affine
from scipy.ndimage import affine_transform, binary_dilation, find_objects, gaussian_filter

from miar_monai._version import __version__
from miar_monai.data.geometry import fov_corners
from miar_monai.data.grid import Grid
from miar_monai.data.io import read_labels, write_volume
from miar_monai.data.labels import label_counts, label_ranks
from miar_monai.data.outputs import check_output_folder, result_path
from miar_monai.data.volume import SOFTWARE, Volume
from miar_monai.errors import GeometryError
from miar_monai.transforms.guide import in_field_of_view
from miar_monai.transforms.metatensor import metatensor_to_volume

__all__ = ["SaveLabelsd", "carry_labels", "label_volumes"]

_DESCRIPTION = f"{SOFTWARE} {__version__}: label map on a finer grid"

_SIGMA = 0.7
"""Standard deviation of the smoothing of memberships, in the smallest voxel spacing of the label map."""

_KEPT = 0.85
"""Share of the membership without smoothing where smoothing would remove a structure."""

_TILE = 128
"""Sides of the blocks of new voxels that are computed at a time: few labels are in each."""

_CLEAR = 0.98
"""Difference between two memberships from which on the greater one wins whatever the volumes are."""

_MAX_BIAS = 0.4
_RAMP = 8e-3  # of a membership over the whole grid: breaks ties between voxels that are alike, one side first
_MAX_BINS = 4096
_ITERATIONS = 20
_ACCURACY = 2e-3  # of the volume of each label: reason to stop
_SAME_GRID = 1e-3  # voxels, to which headers may be rounded

_Box = tuple[slice, slice, slice]


def carry_labels(labels: Volume, grid: Grid) -> Volume:
    """Return a label map on another grid in the same millimeters, with smooth borders and the volumes of its labels.

    The membership in each label, the background among them, is 1 in its voxels and 0 in the others. It is smoothed by a
    Gaussian (standard deviation 0.7 of the smallest voxel spacing), hardly where structures are so thin that they would
    disappear, and interpolated linearly. Each new voxel has the label with the greatest membership plus a bias: one
    number for each label, found by iteration, that keeps the volume of the label. So no other labels appear, and
    borders run smoothly between voxels and slices. Voxels outside of the label map are background, which is 0.

    Memory is bounded: the grid is computed in tiles, and voxels near borders are remembered with two labels each,
    however many labels there are.

    Args:
        labels: whole numbers, (X, Y, Z), of any dtype, on any grid, oblique or not, finer or coarser.
        grid: the new grid.

    Returns:
        The labels on the new grid, in the same dtype; a copy if the grids are the same. Volumes are those within the
        field of view of the new grid.

    Raises:
        GeometryError: if the fields of view have no voxel in common.

    Example:
        >>> from pathlib import Path
        >>> z, y, x = np.ogrid[-6:6, -6:6, -6:6]
        >>> ball = 7 * (x**2 + y**2 + z**2 < 16).astype(np.uint8)
        >>> labels = Volume(ball, np.diag([1.0, 1, 3, 1]), ball.dtype, Path("ball.nii"))
        >>> finer = carry_labels(labels, labels.grid.resized((1, 1, 1 / 3))).array
        >>> finer.shape, np.unique(finer).tolist(), bool(abs(finer.sum() / (3 * ball.sum()) - 1) < 0.01)
        ((12, 12, 36), [0, 7], True)
    """
    transform = np.linalg.solve(labels.affine, grid.affine)
    if labels.grid.shape == grid.shape and np.all(abs(transform - np.eye(4)) @ [*grid.shape, 1] < _SAME_GRID):
        return labels._replace(array=labels.array.copy(), affine=grid.affine)
    inside = in_field_of_view(grid, labels.grid)
    if not inside.any():
        raise GeometryError(
            f"{labels.path} has no voxel in the field of view of the image, by the positions in their headers: a label"
            " map in the same coordinates is needed; register it to the image, or leave it out."
        )
    values = np.array(list(label_counts(labels.array)), labels.array.dtype)
    ranks = label_ranks(labels.array, values)
    carried = np.empty(grid.shape, ranks.dtype)
    borders, clear = [], np.zeros(len(values), np.int64)
    for tile in _tiles(grid.shape):
        winners = _two_best(ranks, labels.grid.spacing, transform, tile)
        carried[tile] = winners.first
        near = (winners.margin < _CLEAR) & inside[tile]
        clear += np.bincount(winners.first[inside[tile] & ~near], minlength=len(values))
        places = np.argwhere(near) + [part.start for part in tile]
        ramp = _RAMP * ((places / grid.shape).mean(axis=1) - 0.5)
        margin = (winners.margin[near] + ramp).astype(np.float32)
        borders.append(_Border(tile, near, _TwoBest(winners.first[near], winners.second[near], margin)))
    coverage = _coverage(labels.grid, grid)
    planes = (np.bincount(ranks[..., k].ravel(), coverage[..., k].ravel(), len(values)) for k in range(ranks.shape[2]))
    counts = np.sum(list(planes), axis=0) / abs(np.linalg.det(transform[:3, :3]))
    surplus = np.count_nonzero(inside) - counts.sum()
    # of the same field of view, sizes may be rounded to whole voxels; of a part of it, the coverage
    counts = counts + surplus * (values == 0 if 0 in values and coverage.all() else counts / counts.sum())
    bias = _bias([border.winners for border in borders], clear, counts)
    for border in borders:
        carried[border.tile][border.near] = _decided(border.winners, bias)
    result = values[carried]
    result[np.logical_not(inside, out=inside)] = 0
    return labels._replace(array=result, affine=grid.affine, description=_DESCRIPTION)


def _coverage(grid: Grid, other: Grid) -> np.ndarray:
    """Return the fraction of each voxel of a grid that is in the field of view of another, (X, Y, Z).

    It is counted at 4 x 4 x 4 places in each voxel, and is 1 everywhere if the fields of view are the same but for the
    rounding of their sizes to whole voxels.
    """
    corners = apply_affine(np.linalg.inv(other.affine), fov_corners(grid.affine, grid.shape))
    if np.all((corners > -1 - _SAME_GRID) & (corners < np.array(other.shape) + _SAME_GRID)):
        return np.broadcast_to(np.float32(1), grid.shape)
    covered = np.zeros(grid.shape, np.float32)
    for place in product(*3 * [(-0.375, -0.125, 0.125, 0.375)]):
        moved = grid.affine.copy()
        moved[:3, 3] = apply_affine(grid.affine, place)
        covered += in_field_of_view(Grid(grid.shape, moved), other)
    return covered / 64


class _TwoBest(NamedTuple):
    """Ranks of the labels with the two greatest memberships, and the difference between these."""

    first: np.ndarray
    second: np.ndarray
    margin: np.ndarray


class _Border(NamedTuple):
    """Voxels of a tile near borders between labels, ``near``, (x, y, z), and the two best labels of each, (N,)."""

    tile: _Box
    near: np.ndarray
    winners: _TwoBest


def _tiles(shape: tuple[int, int, int]) -> Iterator[_Box]:
    x, y, z = ([slice(i, min(i + _TILE, size)) for i in range(0, size, _TILE)] for size in shape)
    return product(x, y, z)


def _two_best(ranks: np.ndarray, spacing: np.ndarray, transform: np.ndarray, tile: _Box) -> _TwoBest:
    """Return the two best labels of each voxel of a tile of the new grid.

    Args:
        ranks: of the label map.
        spacing: of its voxels in millimeters.
        transform: voxel indices of the new grid to those of the label map, (4, 4).
        tile: indices of the new grid.
    """
    # where voxels of the label map are smaller than those of the grid, half the difference prevents aliasing
    coarser = np.minimum(np.maximum(np.linalg.norm(transform[:3, :3], axis=1) - 1, 0) / 2, ranks.shape)
    sigma = _SIGMA * spacing.min() / spacing + coarser
    margin = np.ceil(3 * sigma).astype(int) + 2
    shape = tuple(part.stop - part.start for part in tile)
    block = _mapped(transform, tile, margin, ranks.shape)
    to_block = transform.copy()
    to_block[:3, 3] = apply_affine(transform, [part.start for part in tile]) - [part.start for part in block]
    first, second = np.zeros(shape, ranks.dtype), np.zeros(shape, ranks.dtype)
    best, next_best = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    own = ranks[block]
    kept = _KEPT * _would_disappear(own, sigma, margin)
    for rank, box, member, smooth in _memberships(own, sigma, margin):
        membership = smooth + kept[box] * (member - smooth)
        to_box = to_block.copy()
        to_box[:3, 3] -= [part.start for part in box]
        from_box = np.linalg.inv(to_box)
        one_voxel = np.ceil(np.abs(from_box[:3, :3]).sum(axis=1)).astype(int)  # the outer half of voxels at the ends
        target = _mapped(from_box, _whole(membership.shape), one_voxel, shape)
        if any(part.start >= part.stop for part in target):
            continue
        linear, start = to_box[:3, :3], apply_affine(to_box, [part.start for part in target])
        found = affine_transform(
            membership,
            np.diag(linear) if np.count_nonzero(linear - np.diag(np.diag(linear))) == 0 else linear,
            start,
            output_shape=tuple(part.stop - part.start for part in target),
            output=np.float32,
            order=1,
            mode="nearest",
        )
        wins, follows = found > best[target], found > next_best[target]
        second[target] = np.where(wins, first[target], np.where(follows, rank, second[target]))
        next_best[target] = np.where(wins, best[target], np.where(follows, found, next_best[target]))
        first[target][wins], best[target][wins] = rank, found[wins]
    # without a second label, the bias must not decide
    return _TwoBest(first, second, np.where(next_best > 0, best - next_best, np.float32(1)))


def _whole(shape: tuple[int, ...]) -> _Box:
    x, y, z = (slice(0, size) for size in shape)
    return x, y, z


def _mapped(transform: np.ndarray, box: _Box, margin: np.ndarray, shape: tuple[int, ...]) -> _Box:
    """Return the indices in another array of a box with a margin, limited to the array."""
    corners = apply_affine(transform, np.array(list(product(*((part.start, part.stop - 1) for part in box)))))
    low = np.clip(np.floor(corners.min(axis=0)).astype(int) - margin, 0, np.array(shape) - 1)
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + margin + 1, 1, shape)
    x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return x, y, z


def _memberships(
    ranks: np.ndarray, sigma: np.ndarray, margin: np.ndarray
) -> Iterator[tuple[int, _Box, np.ndarray, np.ndarray]]:
    """Yield for each label its rank, its box with a margin, and its membership there without and with smoothing."""
    found = np.unique(ranks)
    local = np.searchsorted(found, ranks) + 1
    for rank, box in zip(found.tolist(), find_objects(local), strict=True):
        wide = _mapped(np.eye(4), box, margin, ranks.shape)
        member = (ranks[wide] == rank).astype(np.float32)
        yield rank, wide, member, gaussian_filter(member, sigma, mode="nearest", truncate=3)


def _would_disappear(ranks: np.ndarray, sigma: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Return where smoothing changes the label of a voxel, or of its neighbor, (X, Y, Z), bool."""
    best, winner = np.zeros(ranks.shape, np.float32), np.zeros(ranks.shape, ranks.dtype)
    for rank, box, _, smooth in _memberships(ranks, sigma, margin):
        wins = smooth > best[box]
        best[box][wins], winner[box][wins] = smooth[wins], rank
    return np.asarray(binary_dilation(winner != ranks, np.ones((3, 3, 3))))


def _decided(winners: _TwoBest, bias: np.ndarray) -> np.ndarray:
    """Return the label of each voxel, with a bias for each label."""
    margin = winners.margin + bias[winners.first] - bias[winners.second]
    return np.where(margin >= 0, winners.first, winners.second)


def _bias(borders: list[_TwoBest], clear: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the bias of each label with which it has the given number of voxels.

    In each iteration, the bias that a label would need if those of the others stayed is read off the histogram of its
    margins, and half of the way is gone, as each border has two sides.

    Args:
        borders: voxels near borders.
        clear: numbers of the other voxels by label.
        counts: numbers of voxels that the labels shall have.
    """
    num_bins = int(np.clip(2**24 // len(counts), 64, _MAX_BINS))
    bias = np.zeros(len(counts), np.float32)
    least, best = np.inf, bias
    for _ in range(_ITERATIONS):
        histogram = np.zeros((len(counts), num_bins), np.int64)
        sizes = clear.copy()
        for winners in borders:
            sizes += np.bincount(_decided(winners, bias), minlength=len(counts))
            margin = winners.margin + bias[winners.first] - bias[winners.second]
            for rank, own in ((winners.first, margin), (winners.second, -margin)):
                bins = ((_MAX_BIAS - own) * (num_bins / (2 * _MAX_BIAS))).clip(0, num_bins - 1).astype(np.int64)
                histogram += np.bincount(rank.astype(np.int64) * num_bins + bins, minlength=histogram.size).reshape(
                    histogram.shape
                )
        errors = np.abs(sizes - counts) / np.maximum(counts, 1)
        if errors.sum() < least:  # not their maximum, which may be that of a few voxels that are never exact
            least, best = errors.sum(), bias
        if errors.max() < _ACCURACY:
            return bias
        reached = np.cumsum(histogram, axis=1) >= (counts - clear)[:, None]
        bins = np.where(reached.any(axis=1), reached.argmax(axis=1), num_bins - 1)
        needed = (bins + 0.5) * (2 * _MAX_BIAS / num_bins) - _MAX_BIAS
        bias = np.clip(bias + 0.5 * needed, -_MAX_BIAS, _MAX_BIAS).astype(np.float32)
    return best


def label_volumes(labels: Volume) -> dict[float, float]:
    """Return the volume of each label but the background, 0, in cubic millimeters.

    Example:
        >>> from pathlib import Path
        >>> labels = Volume(np.eye(3, dtype=np.int16)[..., None], np.diag([1, 1, 2.5, 1]), np.dtype("int16"), Path("a"))
        >>> label_volumes(labels)
        {1: 7.5}
    """
    voxel = abs(float(np.linalg.det(labels.affine[:3, :3])))
    return {value: round(count * voxel, 6) for value, count in label_counts(labels.array).items() if value != 0}


class SaveLabelsd(MapTransform):
    """Carry label maps to the grid of a result, and write them as ``<output_dir>/<name>_<postfix>.nii.gz``.

    Args:
        keys: of the paths of label maps; missing ones are ignored.
        reference_key: of the result, whose path and, with the optional key ``"name"``, name they get.
        output_dir: folder of the results; created if needed.
        postfix: last part of the names.
        overwrite: replace existing files.

    Raises:
        OutputError: if the folder cannot be written to; checked here, before the work is done.
    """

    def __init__(
        self,
        keys: KeysCollection = "labels",
        reference_key: str = "pred",
        output_dir: str | os.PathLike[str] = ".",
        postfix: str = "sr_labels",
        overwrite: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        check_output_folder(output_dir)
        self.reference_key = reference_key
        self.output_dir = output_dir
        self.postfix = postfix
        self.overwrite = overwrite

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Write the label maps and return ``data`` unchanged.

        Raises:
            ImageError, GeometryError: if a label map cannot be used, see `read_labels` and `carry_labels`.
            OutputError: if a file exists or cannot be written.
        """
        for key in self.key_iterator(data):
            image = metatensor_to_volume(data[self.reference_key])
            labels = carry_labels(read_labels(data[key]), image.grid)
            path = result_path(image.path, self.output_dir, self.postfix, data.get("name", ""))
            write_volume(path, labels._replace(space=image.space, qform=image.qform), self.overwrite)
        return data
