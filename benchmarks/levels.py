"""Agreement of mean intensities between results and inputs at native resolution, where there is no ground truth.

    python -m benchmarks.levels SCAN [SCAN ...] [--model brats] [--num_slices 4] [--output_dir levels_output] ...

The central axial slices of each volume are super-resolved as by ``miar sr`` and compared with the input by the means of
blocks of 8 × 8 input voxels, which noise affects little. Writes ``levels.md``, with one row per volume:

- **block**: the largest difference, over all blocks, between the mean of the degraded result and that of the input, in
  percent of the range of the input. The result is degraded first, since its mean differs from that of a blurred input
  where an edge lies at the border of a block, as the truth's does.
- **beyond 0.1 %**: the share of the blocks where that difference exceeds 0.1 % of the range.
- **block, as it is**: as block, for the result itself.
- **flat tissue**: the mean difference of the result itself over the flattest tenth of the blocks brighter than 0.3 of
  the range, in percent of their level; levels of CT are relative to the lowest voxel.

Other options are settings of inference.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.affines import voxel_sizes

from benchmarks.common import commit, machine, publish, result_files
from miar_monai.data.geometry import axial_axis
from miar_monai.data.io import Volume, read_volume
from miar_monai.degradation import Degradation
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.evaluation.tables import markdown_table
from miar_monai.inference.devices import choose_device
from miar_monai.inference.resolver import SuperResolver

RESULT = "levels.md"
BLOCK = 8  # LR voxels
_COLUMNS = (
    "volume", "voxels, mm", "assumed blur", "noise, %", "block, %", "beyond 0.1 %, %", "block, as it is, %",
    "flat tissue, %",
)  # fmt: skip


class Levels(NamedTuple):
    """The row of a volume; all numbers but the blur in percent."""

    blur: float
    noise: float
    block: float
    beyond: float
    block_as_it_is: float
    flat_tissue: float


def central(volume: Volume, num_slices: int) -> Volume:
    """Return the central axial slices of a volume; the affine is not changed, since it is not used here."""
    axis = axial_axis(volume.affine)
    size = volume.array.shape[axis]
    start = max(size - num_slices, 0) // 2
    return volume._replace(array=volume.array.take(range(start, min(start + num_slices, size)), axis=axis))


def block_means(slices: torch.Tensor) -> torch.Tensor:
    """Return the means of slices (N, h, w) over all blocks: (N, h - 7, w - 7)."""
    return F.avg_pool2d(slices[:, None], BLOCK, stride=1)[:, 0]


def levels(resolver: SuperResolver, volume: Volume) -> Levels:
    """Super-resolve a volume and compare its level with the input's."""
    prepared = resolver.prepare(volume)
    result = resolver.volume(volume, prepared)
    axis = axial_axis(volume.affine)
    lr, sr = (torch.from_numpy(np.moveaxis(x.array, axis, 0).astype(np.float64)) for x in (volume, result))
    degradation: Degradation = prepared.assumed
    span = float(lr.max() - lr.min())
    noise = float(degradation.for_lr(lr).noise_level(lr).median()) / span
    scale = int(degradation.scales[0])
    before, degraded, after = (block_means(x) for x in (lr, degradation(sr), F.avg_pool2d(sr, scale)))
    level = before - min(float(lr.min()), 0)
    deviation = (block_means(lr**2) - before**2).clamp(min=0).sqrt() / level
    bright = before - float(lr.min()) > 0.3 * span
    flat = bright & (deviation <= deviation[bright].quantile(0.1))
    relative = ((after - before) / level)[flat]
    differences, as_they_are = ((x - before).abs() / span for x in (degraded, after))
    shares = noise, differences.max(), (differences > 1e-3).double().mean(), as_they_are.max(), relative.mean()
    return Levels(degradation.lr_sigma, *(100 * float(share) for share in shares))


def main(
    *scans: str,
    model: str = "brats",
    num_slices: int = 4,
    device: str = "auto",
    output_dir: str = "levels_output",
    overwrite: bool = False,
    **settings: Any,
) -> None:
    """Compare the levels of results and inputs.

    Args:
        scans: NIfTI files or folders of DICOM series.
        model: a bundle.
        num_slices: number of central axial slices of each volume.
        device: device of the network.
        output_dir: folder of ``levels.md``.
        overwrite: replace an existing file.
        settings: settings of inference.
    """
    (path,) = result_files(output_dir, [RESULT], overwrite)
    resolver = SuperResolver(model, device, **settings)
    rows = []
    for scan in scans:
        volume = read_volume(scan)
        spacing = " x ".join(f"{mm:.3g}" for mm in voxel_sizes(volume.affine))
        row = levels(resolver, central(volume, num_slices))
        numbers = (
            f"{number:{spec}}" for number, spec in zip(row, (".2f", ".2f", ".3f", ".2f", ".3f", "+.3f"), strict=True)
        )
        rows.append((Path(scan).name, spacing, *numbers))
    about = (
        f"Bundle {resolver.bundle.name}, commit {commit()}, {machine(choose_device(device))}, {num_slices} slices each."
    )
    publish("\n".join(["# Levels", "", about, "", markdown_table(_COLUMNS, rows), ""]), path, overwrite)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
