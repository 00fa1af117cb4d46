from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.drawings import shown_images

from miar_monai.data.volume import Volume
from miar_monai.degradation import AxisDegradation

pytest.importorskip("matplotlib")

from miar_monai.visualize.drawing import displayed
from miar_monai.visualize.preview import preview

SHAPE, FACTORS = (11, 9, 7), (4, 2, 1)


def volumes(
    rng: np.random.Generator, shape: Sequence[int] = SHAPE, factors: Sequence[int] = FACTORS
) -> tuple[Volume, Volume]:
    """Return a volume in RAS+ and one on a finer grid, which is not its interpolation."""
    lr = Volume(rng.random(shape, np.float32), np.diag([2.0, 2, 3, 1]), np.dtype("float32"), Path("a.nii"))
    grid = lr.grid.resized([1 / factor for factor in factors])
    return lr, lr._replace(array=rng.random(grid.shape, np.float32), affine=grid.affine)


def test_rows_are_middle_planes_of_volumes(rng: np.random.Generator, tmp_path: Path, drawn: list[Any]) -> None:
    lr, sr = volumes(rng)
    bicubic = lr.array
    for axis, factor in enumerate(FACTORS[:2]):
        matrix = AxisDegradation(sr.array.shape[axis], lr.array.shape[axis], factor).upsampling().numpy()
        bicubic = np.moveaxis(np.tensordot(matrix, bicubic, axes=(1, axis)), 0, axis)
    preview(lr, sr, tmp_path / "a.png")
    expected = [
        displayed(np.take(array, array.shape[axis] // 2, axis=axis))
        for axis in (2, 1, 0)
        for array in (lr.array, bicubic, sr.array, sr.array - bicubic)
    ]
    for shown, plane in zip(shown_images(drawn[0]), expected, strict=True):
        assert shown == pytest.approx(plane, abs=1e-5)


def test_the_memory_of_a_preview_does_not_grow_with_the_result(rng: np.random.Generator, tmp_path: Path) -> None:
    peaks = []
    for factors in ((2, 2, 1), (2, 2, 1), (5, 5, 4)):  # the first one loads matplotlib
        lr, sr = volumes(rng, (48, 48, 32), factors)
        tracemalloc.start()
        preview(lr, sr, tmp_path / "a.png", overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 0.5 * sr.array.nbytes
