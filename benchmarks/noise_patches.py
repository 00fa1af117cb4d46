"""Patches of noise in posterior samples, with and without their limit, by the noise of the image.

    python -m benchmarks.noise_patches --dataset_dir BraTS --split_file split.json \
        --scans scan.nii.gz,other.nii.gz --output_dir patches_output [--grids 2x2,4x4] [--noise 0,0.005,0.01,0.02] ...

Slices of the ``section``, the test patients, are degraded, and noise is added to them; of native scans, which have no
truth, the middle slice is made 2 times finer in-plane, as ``miar sr --factor 2,2,1`` does. A voxel is in a patch if the
high-frequency deviation of one sample from the median of the samples is, over a neighborhood, more than three times the
typical one of the samples around it. Writes ``noise_patches.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from benchmarks.common import commit, every_nth, listed, machine, open_run, publish
from benchmarks.every_factor import degradations_of
from miar_monai.cli.fit_uncertainty import add_noise
from miar_monai.cli.workflow import load_slice_pairs, patients_note
from miar_monai.data.io import read_volume
from miar_monai.degradation import Degradation
from miar_monai.errors import check_range, report_errors_in_one_sentence
from miar_monai.evaluation.metrics import body_mask
from miar_monai.evaluation.probabilistic import spread_over_skill
from miar_monai.evaluation.tables import markdown_table
from miar_monai.inference.resolver import SuperResolver
from miar_monai.inference.samples import Sampling

RESULT = "noise_patches.md"
_HEADER = ("images", "noise", "patches per sample", "voxels in patches", "highest ratio", "one sample", "spread/skill")
_RATIO = 3.0  # to the typical deviation; without noise and with the texture of a brain the highest is below it
_FLOOR = 0.01  # network intensities
_BODY = 0.05  # network intensities


class Patches(NamedTuple):
    """The patches of noise in the samples of some slices."""

    count: float
    """Mean number in a sample of a slice."""
    share: float
    """Share of the voxels in them."""
    highest: float
    """Highest ratio of a deviation to the typical one."""

    @classmethod
    def of(cls, samples: np.ndarray) -> Patches:
        """Find the patches in samples (B, N, H, W), at least 3 of each slice.

        Example:
            >>> samples = 0.05 * np.random.default_rng(0).standard_normal((1, 8, 64, 64))
            >>> Patches.of(samples).count
            0.0
            >>> samples[0, 2, 20:32, 20:32] *= 8
            >>> Patches.of(samples).count
            0.125
        """
        deviations = samples - np.median(samples, axis=1, keepdims=True)
        deviations = deviations - ndimage.gaussian_filter(deviations, (0, 0, 1.5, 1.5))
        local = np.sqrt(ndimage.gaussian_filter(deviations**2, (0, 0, 3, 3)))
        typical = ndimage.gaussian_filter(np.median(local, axis=1, keepdims=True), (0, 0, 6, 6))
        ratio = local / (typical + _FLOOR)
        found = ratio > _RATIO
        counts = [ndimage.label(one)[1] for one in found.reshape(-1, *found.shape[2:])]
        return cls(float(np.mean(counts)), float(found.mean()), float(ratio.max()))


class Slices(NamedTuple):
    """Slices to sample."""

    title: str
    noise: str
    lr: Tensor
    """(B, 1, h, w)."""
    assumed: Degradation
    hr: Tensor | None = None
    """(B, 1, H, W), if there is a truth."""


def drawn(resolver: SuperResolver, slices: Slices, limited: bool, samples: int, seed: int) -> Tensor:
    """Return samples of slices, as users get them or without their limit: (B, N, H, W)."""
    inferer = resolver.with_settings().inferer
    if not limited:
        inferer.error_model = None
    sampling = Sampling(seed, tuple(range(samples)))
    with torch.inference_mode():
        result, _ = inferer.super_resolve(slices.lr, resolver.network, assumed=slices.assumed, sampling=sampling)
    return result.as_subclass(Tensor).float().cpu()


def measured(resolver: SuperResolver, slices: Slices, samples: int, seed: int) -> list[list[str]]:
    """Return the rows of slices, without and with the limit of the samples."""
    rows = []
    for limited in (False, True):
        found = drawn(resolver, slices, limited, samples, seed)
        patches = Patches.of(found.numpy())
        quality = ["", ""]
        if slices.hr is not None:
            inside = body_mask(slices.hr.clamp(0, 1), _BODY)[:, 0]
            errors = (found - slices.hr).movedim(1, 0)[:, inside]  # (N, voxels of the body)
            psnr, ratio = -10 * errors.square().mean().log10(), spread_over_skill(errors[None])
            quality = [f"{psnr:.2f} dB", f"{ratio:.3f}"]
        title = f"{slices.title}, {'limited' if limited else 'not limited'}"
        cells = f"{patches.count:.2f}", f"{1000 * patches.share:.2f} ‰", f"{patches.highest:.1f}"
        rows.append([title, slices.noise, *cells, *quality])
    return rows


def native(resolver: SuperResolver, path: str) -> Slices:
    """Return the middle axial slice of a native scan, and what is assumed of it."""
    prepared = resolver.with_settings(factor="2,2,1").prepare(read_volume(path))
    image = prepared.image.as_subclass(Tensor)  # (1, X, Y, Z)
    return Slices(Path(path).name, "its own", image[None, ..., image.shape[-1] // 2], prepared.assumed)


def main(
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "patches_output",
    contrasts: str | Sequence[str] | None = None,
    scans: str | Sequence[str] = (),
    grids: str | Sequence[str] = "2x2,4x4",
    noise: str | Sequence[float] = (0.0, 0.005, 0.01, 0.02),
    samples: int = 4,
    every: int = 40,
    sample_seed: int = 0,
    **settings: Any,
) -> None:
    """Count the patches of noise in the samples of a bundle.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of ``noise_patches.md``.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        scans: files of native scans with axial slices.
        grids: see `benchmarks.every_factor.degradations_of`.
        noise: standard deviations of the noise, in network intensities.
        samples: N, at least 3.
        every: n; every n-th slice of a volume is measured.
        sample_seed: seed of the noise that the network draws.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, num_slices, ...

    Raises:
        SettingError: if the network does not sample, or there are fewer than 3 samples.
    """
    check_range("samples", samples, 3, float("inf"))
    config, _ = open_run(bundle, dataset_dir, output_dir, contrasts, settings, [RESULT])
    get = config.get_parsed_content
    resolver = SuperResolver(bundle, str(get("device")))
    resolver.network.check_samples()
    volumes = every_nth(load_slice_pairs(config), every)
    hr = torch.cat([volume.hr.as_subclass(Tensor) for volume in volumes])
    rows = []
    for grid, assumed in degradations_of(grids).items():
        clean = assumed(hr)
        for level in map(float, listed(noise)):
            slices = Slices(f"test, {grid}", f"{level:g}", add_noise(level, clean), assumed, hr)
            rows += measured(resolver, slices, samples, sample_seed)
    for path in listed(scans) if scans else []:
        rows += measured(resolver, native(resolver, path), samples, sample_seed)
    notes = [
        f"- Bundle {Path(bundle).name}, commit {commit()}, {machine(torch.device(get('device')))}.",
        f"- {patients_note(config, volumes)} {len(hr)} slices; {samples} samples of each.",
    ]
    text = "\n".join(["# Patches of noise in samples", "", *notes, "", markdown_table(_HEADER, rows), ""])
    publish(text, Path(output_dir, RESULT), get("overwrite"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
