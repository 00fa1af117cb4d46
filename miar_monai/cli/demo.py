"""``python -m miar_monai.cli.demo``: super-resolve a real brain whose truth is known, and show how good that is.

The brain is the ICBM152 T1 template (nonlinear symmetric 2009a, 1 mm, skull-stripped), which lies inside nilearn's
wheel: nothing is downloaded.
"""

from __future__ import annotations

import logging
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
from miar_monai.errors import ImageError, report_errors_in_one_sentence
from miar_monai.evaluation.slices import SuperResolutionEvaluation
from miar_monai.inference.resolver import SuperResolver
from miar_monai.transforms.files import LoadVolume
from miar_monai.transforms.intensity import ScaleIntensityRobust
from miar_monai.transforms.simulate import CentralSlices, SimulateLowResolution
from miar_monai.visualize.figures import side_by_side

__all__ = ["DemoResult", "degrade", "main", "run_demo", "template"]

logger = logging.getLogger(__name__)

METRICS = ("PSNR", "SSIM", "PSNR body", "SSIM body", "LPIPS")


class DemoResult(NamedTuple):
    """What the demo leaves behind.

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
            "the brain of the demo lies inside nilearn, which is not installed: "
            "install it with pip install miar-monai[demo]."
        )
    return Path(nilearn.origin).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


def degrade(
    path: str | os.PathLike[str], output_dir: str | os.PathLike[str], num_slices: int = 40
) -> tuple[Path, Path]:
    """Write the central axial slices of a volume as truth, and what is left of them at a quarter of the resolution.

    Args:
        path: a RAS+ volume; cropped in-plane to multiples of 4 voxels around its center.
        output_dir: where ``hr.nii.gz`` and ``lr.nii.gz`` are written; earlier ones are replaced.
        num_slices: how many slices.

    Returns:
        The truth and the LR volume.
    """
    volume = CentralSlices(num_slices)(LoadVolume()(path))
    hr = CenterSpatialCrop([size // 4 * 4 for size in volume.shape[1:3]] + [-1])(volume)
    return (
        _write(hr, Path(output_dir, "hr.nii.gz")),
        _write(SimulateLowResolution()(hr), Path(output_dir, "lr.nii.gz")),
    )


def _write(volume: Tensor, path: Path) -> Path:
    """Write a volume (1, X, Y, Z), a `MetaTensor`, over the one of an earlier demo."""
    return write_nifti(path, np.asarray(volume)[0], np.asarray(volume.affine), overwrite=True)  # type: ignore[attr-defined]


def run_demo(
    path: str | os.PathLike[str],
    resolver: SuperResolver,
    output_dir: str | os.PathLike[str],
    num_slices: int = 40,
) -> DemoResult:
    """Degrade a volume, super-resolve what is left of it, and measure and draw the difference to the truth.

    The network sees the LR file only. The metrics are taken where the robust scaling of the truth maps it to [0, 1].

    Args:
        path: the truth, a RAS+ volume.
        resolver: the model.
        output_dir: where everything is written; the files of an earlier demo are replaced.
        num_slices: how many axial slices.

    Returns:
        Where everything lies.
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


def main(
    output_dir: str = "demo_output",
    bundle: str = "brats",
    device: str = "auto",
    lookahead_tokens: int = 1,
) -> None:
    """Super-resolve the ICBM152 brain with a bundle; print the table and where the files lie.

    Args:
        output_dir: where everything is written; the files of an earlier demo are replaced.
        bundle: a short name or the folder of a bundle (see `miar_monai.inference.bundle.find_bundle`).
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:<index>`` or ``mps``.
        lookahead_tokens: the paper's K; 0 is greedy and faster.
    """
    brain = template()
    resolver = SuperResolver(bundle, device, lookahead_tokens=lookahead_tokens, progress=True)
    logger.info(
        "Super-resolving 40 slices of the ICBM152 brain on %s; two CPU cores need up to three minutes.", resolver.device
    )
    result = run_demo(brain, resolver, output_dir)
    print(result.table.read_text(encoding="utf-8"))
    for name, path in result._asdict().items():
        print(f"{name.replace('_', ' '):15} {path}")


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    report_errors_in_one_sentence()
    fire.Fire(main)
