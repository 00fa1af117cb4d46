"""Two voxels of the test patients: an error of the result that its samples announce, and one that they do not.

    python -m benchmarks.doubt --dataset_dir BraTS --split_file split.json --output_dir doubt_output \
        [--bundle bundles/miar_brats] [--contrasts t1,t2] [--samples 64] [--every 4] [--margin 4] [--device cuda:0] ...

Among all voxels inside the body, the first is that of the largest error of the default result whose true intensity lies
in the interval of the samples, the second that whose true intensity lies furthest outside of its interval. Draws the
surroundings of both, with the samples that are lowest and highest in the voxel, and the distribution of the samples
there, in ``doubt.png``. Needs the extra demo.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import batches, every_nth, load_network, open_run
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs, read_config
from miar_monai.errors import ConfigurationError, check_range, report_errors_in_one_sentence
from miar_monai.evaluation import SuperResolutionEvaluation
from miar_monai.evaluation.metrics import body_mask
from miar_monai.inference.samples import LEVEL, SampleSummary
from miar_monai.networks import SuperResolutionNetwork
from miar_monai.visualize.drawing import PAGE_WIDTH, color_levels, displayed, page_figure

RESULTS = ("doubt.png",)
SIDE = 41  # of the surroundings, in voxels
_PANELS = ("result", "truth", "lowest sample", "highest sample", "standard deviation")


class Doubt(NamedTuple):
    """A voxel, and what is around it."""

    title: str
    size: float
    """The quantity by which the voxel was chosen."""
    samples: np.ndarray
    """Intensities of the samples in the voxel, (N,)."""
    interval: tuple[float, float]
    """Limits of their interval."""
    panels: dict[str, np.ndarray]
    """Surroundings by title, (SIDE, SIDE) each; the voxel is in the middle."""


def interior(body: Tensor, margin: int) -> np.ndarray:
    """Return the voxels of masks (B, 1, H, W) that are at least ``margin`` voxels from the outline: (B, H, W).

    Example:
        >>> body = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
        >>> body[..., 1:8, 1:8] = True
        >>> int(interior(body, 2).sum())
        9
    """
    distances = [ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] for mask in body[:, 0].cpu().numpy()]
    return np.stack(distances) > margin


def surroundings(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """Return the square around a voxel of an image (H, W), with 0 outside of it: (SIDE, SIDE)."""
    return np.pad(image, SIDE // 2)[x : x + SIDE, y : y + SIDE]


def found(title: str, hr: Tensor, result: Tensor, samples: Tensor, summary: SampleSummary, sizes: np.ndarray) -> Doubt:
    """Return the voxel with the largest size in a batch.

    Args:
        title: names the patient.
        hr: the truth, (B, H, W).
        result: the result, (B, H, W).
        samples: samples, (B, N, H, W).
        summary: their summary.
        sizes: the quantity that chooses, (B, H, W).
    """
    index, x, y = (int(i) for i in np.unravel_index(sizes.argmax(), sizes.shape))
    drawn = samples[index, :, x, y].cpu().numpy()  # (N,)
    images = (result, hr, samples[:, drawn.argmin()], samples[:, drawn.argmax()], summary.std)
    panels = {name: surroundings(image[index].cpu().numpy(), x, y) for name, image in zip(_PANELS, images, strict=True)}
    limits = (float(summary.lower[index, x, y]), float(summary.upper[index, x, y]))
    return Doubt(title, float(sizes[index, x, y]), drawn, limits, panels)


@torch.inference_mode()
def extremes(
    volumes: Iterable[SlicePairs],
    network: SuperResolutionNetwork,
    evaluation: SuperResolutionEvaluation,
    count: int,
    fidelity: float,
    factor: float,
    margin: int,
    seed: int = 0,
) -> tuple[Doubt, Doubt]:
    """Return the voxel of the largest error inside of its interval, and the one furthest outside of it.

    Args:
        volumes: slices to search.
        network: the network.
        evaluation: has the degradation and the device.
        count: number of samples.
        fidelity: that of the result.
        factor: conformal factor of the intervals.
        margin: voxels from the outline of the body that are left out.
        seed: seed of the noise.

    Raises:
        ConfigurationError: if no voxel is that far inside of the body.
    """
    generator = torch.Generator().manual_seed(seed)
    best: list[Doubt | None] = [None, None]
    for volume in tqdm(volumes, desc="searching", unit="volume"):
        for _, lr, hr in batches(volume, 1, evaluation.device):
            operator = network.degradation.for_lr(lr)
            result = network.super_resolve(lr, fidelity=fidelity, operator=operator).image[:, 0]  # (1, H, W)
            samples = network.posterior_samples(lr, network.white_noise(operator, (1, count), generator), operator)
            summary, truth = SampleSummary.of(samples, factor=factor), hr[:, 0]
            outside = torch.maximum(summary.lower - truth, truth - summary.upper).cpu().numpy()
            inside = interior(body_mask(hr.clamp(0, 1), evaluation.body_threshold), margin)
            error = (result - truth).abs().cpu().numpy()
            title = " ".join(filter(None, (volume.subject, volume.contrast)))
            for i, sizes in enumerate((np.where(outside <= 0, error, 0), outside)):
                now = found(title, truth, result, samples, summary, np.where(inside, sizes, 0))
                best[i] = max(filter(None, (best[i], now)), key=lambda one: one.size)
    announced, missed = best
    if not (announced and missed and announced.size > 0 and missed.size > 0):
        raise ConfigurationError(f"no voxel is more than {margin} voxels inside of the body; give a smaller --margin.")
    return announced, missed


def draw(doubts: Sequence[Doubt], path: Path, overwrite: bool) -> None:
    """Draw the surroundings of voxels, one in a row, and the distribution of the samples in them."""
    columns = len(_PANELS) + 1
    with page_figure(path, len(doubts) * 1.25 * PAGE_WIDTH / columns, overwrite) as figure:
        for axes, doubt in zip(figure.subplots(len(doubts), columns, squeeze=False), doubts, strict=True):
            truth, result = doubt.panels["truth"], doubt.panels["result"]
            gray = color_levels("gray", 64, truth.min(), np.percentile(truth, 99.8))
            hot = color_levels("magma", 24, 0, doubt.panels["standard deviation"].max())
            for ax, (title, image) in zip(axes, doubt.panels.items(), strict=False):
                ax.imshow(displayed(image), interpolation="nearest", **(hot if title == "standard deviation" else gray))
                ax.plot(SIDE // 2, SIDE // 2, "s", markersize=6, markerfacecolor="none", color="orange")
                ax.set_axis_off()
                ax.set_title(title)
            middle = (SIDE // 2, SIDE // 2)
            axes[-1].hist(doubt.samples, bins=12, color="0.7")
            axes[-1].axvspan(*doubt.interval, color="tab:blue", alpha=0.2, label=f"{100 * LEVEL:g} %")
            axes[-1].axvline(truth[middle], color="black", label="truth")
            axes[-1].axvline(result[middle], color="orange", linestyle="--", label="result")
            axes[-1].set(yticks=[], title="samples here")
            axes[-1].legend(fontsize=6)


def main(
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "doubt_output",
    contrasts: str | Sequence[str] | None = None,
    samples: int = 64,
    every: int = 4,
    margin: int = 4,
    **settings: Any,
) -> None:
    """Find and draw both voxels.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of the picture.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        samples: N, at least 2.
        every: n; every n-th slice is searched.
        margin: voxels from the outline of the body that are left out.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, num_slices, overwrite, ...

    Raises:
        SettingError: if the network does not sample, or there are fewer than 2 samples.
        ConfigurationError: if no voxel is that far inside of the body.
    """
    check_range("samples", samples, 2, float("inf"))
    config, _ = open_run(bundle, dataset_dir, output_dir, contrasts, settings, RESULTS)
    network = load_network(config)
    network.check_samples()
    inference = read_config(bundle, {}, workflow="inference")
    fidelity, factor = (inference.get_parsed_content(key) for key in ("fidelity", "volume_inferer#interval_factor"))
    evaluation, overwrite = (config.get_parsed_content(key) for key in ("evaluation", "overwrite"))
    volumes = every_nth(load_slice_pairs(config), every)
    doubts = extremes(volumes, network, evaluation, samples, fidelity, factor, margin)
    for doubt in doubts:
        truth, result = (float(doubt.panels[name][SIDE // 2, SIDE // 2]) for name in ("truth", "result"))
        low, high = doubt.interval
        print(f"{doubt.title}: truth {truth:.2f}, result {result:.2f}, interval {low:.2f} to {high:.2f}")
    draw(doubts, Path(output_dir, RESULTS[0]), overwrite)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
