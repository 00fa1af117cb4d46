"""``miar demo``: degrade and super-resolve a brain, and compare the result with the original.

The brain is the ICBM152 T1 template (nonlinear symmetric 2009a, 1 mm, skull-stripped) from the wheel of nilearn.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from monai.transforms import CenterSpatialCrop
from torch import Tensor

from miar_monai.data.io import read_volume, write_nifti, write_volume
from miar_monai.degradation import Degradation
from miar_monai.errors import ImageError
from miar_monai.evaluation.slices import SuperResolutionEvaluation
from miar_monai.inference.resolver import SuperResolver
from miar_monai.transforms.files import LoadVolume
from miar_monai.transforms.intensity import ScaleIntensityRobust
from miar_monai.transforms.simulate import CentralSlices, SimulateLowResolution
from miar_monai.visualize.figures import side_by_side

__all__ = ["DemoResult", "degrade", "run_demo", "template"]

METRICS = ("PSNR", "SSIM", "PSNR body", "SSIM body", "LPIPS")


class DemoResult(NamedTuple):
    """The files of the demo.

    Attributes:
        truth, low_resolution, super_resolved: the volumes, NIfTI.
        picture: the middle slice of LR, bicubic, MIAR and truth, and the errors.
        rows, table: the metrics of each slice (CSV), and their mean and standard deviation (Markdown).
    """

    truth: Path
    low_resolution: Path
    super_resolved: Path
    picture: Path
    rows: Path
    table: Path


def template() -> Path:
    """Return the path of the ICBM152 T1 template in nilearn's wheel: (197, 233, 189), RAS+, 1 mm, 8 bits.

    Raises:
        ImageError: if nilearn is not installed.
    """
    nilearn = find_spec("nilearn")
    if nilearn is None or nilearn.origin is None:
        raise ImageError(
            "the brain of the demo is part of nilearn, which is not installed: "
            "install it with pip install miar-monai[demo]."
        )
    return Path(nilearn.origin).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


def degrade(
    path: str | os.PathLike[str], output_dir: str | os.PathLike[str], num_slices: int = 40
) -> tuple[Path, Path]:
    """Write the central axial slices of a volume, and the same slices at a quarter of the resolution.

    Args:
        path: a RAS+ volume; cropped in-plane to multiples of 4 voxels around its center.
        output_dir: folder of ``hr.nii.gz`` and ``lr.nii.gz``; existing ones are replaced.
        num_slices: number of slices.

    Returns:
        The paths of the HR and the LR volume.
    """
    volume = CentralSlices(num_slices)(LoadVolume()(path))
    hr = CenterSpatialCrop([size // 4 * 4 for size in volume.shape[1:3]] + [-1])(volume)
    return (
        _write(hr, Path(output_dir, "hr.nii.gz")),
        _write(SimulateLowResolution()(hr), Path(output_dir, "lr.nii.gz")),
    )


def _write(volume: Tensor, path: Path) -> Path:
    """Write a volume (1, X, Y, Z), a `MetaTensor`; an existing file is replaced."""
    return write_nifti(path, np.asarray(volume)[0], np.asarray(volume.affine), overwrite=True)  # type: ignore[attr-defined]


def run_demo(
    path: str | os.PathLike[str],
    resolver: SuperResolver,
    output_dir: str | os.PathLike[str],
    num_slices: int = 40,
) -> DemoResult:
    """Degrade a volume, super-resolve the LR file, and measure and draw the difference from the original.

    The metrics are those of intensities after the robust scaling of the original.

    Args:
        path: the original, a RAS+ volume.
        resolver: the model.
        output_dir: folder of the results; the files of an earlier demo are replaced.
        num_slices: number of axial slices.

    Returns:
        The files.
    """
    folder = Path(output_dir)
    truth, low_resolution = degrade(path, folder, num_slices)
    start = time.perf_counter()
    result = resolver.volume(read_volume(low_resolution))
    milliseconds = 1e3 * (time.perf_counter() - start) / num_slices
    super_resolved = write_volume(folder / "sr.nii.gz", result, overwrite=True)
    hr, lr, sr = (LoadVolume()(source) for source in (truth, low_resolution, result))

    evaluation = SuperResolutionEvaluation(Degradation(), METRICS)
    low, high = ScaleIntensityRobust().window(hr)
    lr_slices, sr_slices, hr_slices = (image.as_tensor().movedim(-1, 0) for image in (lr, sr, hr))
    scaled = [(slices - low) / (high - low) for slices in (lr_slices, sr_slices, hr_slices)]
    evaluation(scaled[0], scaled[1], scaled[2], "icbm152", range(num_slices), milliseconds)
    rows, table = evaluation.write(folder, overwrite=True)

    bicubic = evaluation.baselines(lr_slices)["bicubic"]
    stacks = {"LR": lr_slices, "bicubic": bicubic, "MIAR": sr_slices, "truth": hr_slices}
    middle = {title: slices[num_slices // 2, 0].numpy() for title, slices in stacks.items()}
    spacing = (float(hr.pixdim[0]), float(hr.pixdim[1]))
    picture = side_by_side(middle, folder / "comparison.png", spacing, overwrite=True)
    return DemoResult(truth, low_resolution, super_resolved, picture, rows, table)
