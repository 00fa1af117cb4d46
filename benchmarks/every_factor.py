"""Every factor: networks beside bicubic interpolation and the linear inverse, with one axis made finer, or both.

    python -m benchmarks.every_factor all=runs/all.pt alone@5x1=runs/5x1.pt alone@4x4=runs/4x4.pt \
        --dataset_dir BraTS --split_file split.json --output_dir every_factor_output [--contrasts t1,t2] \
        [--num_slices 40] [--grids 5x1,4x4] [--device cuda:0] ...

A grid such as ``5x1`` is the factor of rows and of columns. One axis is degraded by a Gaussian profile with the width
of the new voxels, as thick slices are; two axes are degraded as in the paper, by bicubic downsampling and a blur.
Networks are those of the bundle's ``evaluate.json``, or of a config that is merged into it: ``--overlay
bundles/common/estimator.json``. ``NAME@GRID=FILE`` is a network for that grid alone, and the networks for all grids are
compared with it. Writes ``every_factor.csv`` (a row for each grid, patient, contrast, slice and method) and
``every_factor.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fire
import torch
from monai.bundle import ConfigParser
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import batches, commit, listed, machine, open_run, publish, write_csv
from benchmarks.paired import EXPLANATION, differences_table
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs, patients_note, read_config
from miar_monai.degradation import Degradation, SeparableOperator
from miar_monai.errors import ConfigurationError, report_errors_in_one_sentence
from miar_monai.evaluation import Row, SuperResolutionEvaluation
from miar_monai.evaluation.tables import markdown_table, results_table
from miar_monai.networks.weights import load_weights

__all__ = [
    "GRIDS",
    "MAPS",
    "SIDE",
    "Checkpoint",
    "degradation_of",
    "degradations_of",
    "load_networks",
    "open_slices",
    "parse_checkpoint",
]

logger = logging.getLogger(__name__)

RESULTS = ("every_factor.csv", "every_factor.md")
METRICS = ("PSNR", "SSIM", "LPIPS")
FACTORS = ("1.5", "2", "2.5", "3", "4", "5.33", "6", "8")
GRIDS = (*(f"{factor}x1" for factor in FACTORS), *(f"{factor}x{factor}" for factor in FACTORS))
SIDE = 240  # voxels; a multiple of all factors, and of 16 for networks
MAPS = ("faithful", "perceptual")


def degradation_of(grid: str) -> Degradation:
    """Return the degradation of rows and columns of a grid.

    Raises:
        ConfigurationError: if it is not two factors of at least 1, or two different factors above 1.

    Example:
        >>> degradation_of("5x1").scales, degradation_of("5.33x5.33").scale
        ((5.0, 1.0), 5.333333333333333)
    """
    try:
        rows, columns = (16 / 3 if text == "5.33" else float(text) for text in grid.split("x"))
    except ValueError:
        rows = columns = 0.0
    if rows == columns > 1:
        return Degradation(rows)
    if min(rows, columns) != 1 or max(rows, columns) <= 1:
        raise ConfigurationError(
            f"{grid!r} is not a grid: the factors of rows and columns are needed, both the same or one of them 1, such "
            "as 4x4 or 5x1."
        )
    profile = tuple("gaussian" if factor > 1 else "bicubic" for factor in (rows, columns))
    return Degradation((rows, columns), 0.0, profile=profile)


def degradations_of(grids: str | Sequence[str]) -> dict[str, Degradation]:
    """Return the degradations of several grids by their names; with commas, a text names several.

    Raises:
        ConfigurationError: see `degradation_of`.

    Example:
        >>> list(degradations_of("5x1,4x4"))  # as a command line gives it
        ['5x1', '4x4']
    """
    return {grid: degradation_of(grid) for grid in listed(grids)}


class Checkpoint(NamedTuple):
    """A network to measure."""

    name: str
    grid: str
    """The only grid that it is for, or empty for all."""
    path: str


def parse_checkpoint(text: str) -> Checkpoint:
    """Return the parts of ``NAME=FILE`` or ``NAME@GRID=FILE``.

    Raises:
        ConfigurationError: if the text has another form.

    Example:
        >>> parse_checkpoint("alone@5x1=runs/5x1.pt")
        Checkpoint(name='alone', grid='5x1', path='runs/5x1.pt')
    """
    head, _, path = str(text).partition("=")
    name, _, grid = head.partition("@")
    if not (name and path):
        raise ConfigurationError(f"{text} is not NAME=FILE or NAME@GRID=FILE, a network and its weights; correct it.")
    if grid:
        degradation_of(grid)
    return Checkpoint(name, grid, path)


def overlay_files(overlay: str | None) -> list[Path]:
    """Return the configs that are merged into the bundle's: the overlay, if there is one."""
    return [Path(overlay)] if overlay else []


def load_networks(
    bundle: str, settings: Mapping[str, Any], checkpoints: Sequence[Checkpoint], overlay: str | None = None
) -> list[tuple[Checkpoint, Any]]:
    """Return the networks of a bundle's config with their weights, on the device of the config.

    Args:
        bundle: folder of the bundle.
        settings: values of keys of its ``evaluate.json``.
        checkpoints: the networks.
        overlay: a config that is merged into it.

    Raises:
        CheckpointError: if weights are missing, damaged or of another network.
    """
    networks = [
        read_config(bundle, settings, *overlay_files(overlay)).get_parsed_content("network") for _ in checkpoints
    ]
    pairs = zip(checkpoints, networks, strict=True)
    return [(one, load_weights(network, one.path, "train it.").eval()) for one, network in pairs]


def open_slices(
    bundle: str,
    dataset_dir: str | Sequence[str],
    output_dir: str,
    contrasts: str | Sequence[str] | None,
    settings: Mapping[str, Any],
    results: Iterable[str],
    overlay: str | None,
) -> tuple[ConfigParser, dict[str, Any]]:
    """Read the ``evaluate.json`` of a bundle, see `benchmarks.common.open_run`, for HR slices of `SIDE` voxels."""
    given = {"metrics": list(METRICS), "center_crop#spatial_size": [SIDE, SIDE, -1], **settings}
    return open_run(bundle, dataset_dir, output_dir, contrasts, given, results, *overlay_files(overlay))


def maps_of(network: Any, lr: Tensor, operator: SeparableOperator, **inputs: Any) -> dict[str, Tensor]:
    """Return the estimates of a network for LR slices (N, 1, h, w), each (N, 1, H, W), by the names in `MAPS`."""
    estimate = network.super_resolve(lr, operator=operator, **inputs)
    return {name: getattr(estimate, name).float() for name in MAPS}


@torch.inference_mode()
def measure_grid(
    grid: str,
    volumes: Sequence[SlicePairs],
    networks: Sequence[tuple[Checkpoint, Any]],
    evaluation: SuperResolutionEvaluation,
    batch_size: int,
    amp: bool,
) -> list[Row]:
    """Return the rows of a grid: bicubic interpolation, the linear inverse, and both estimates of each network.

    Args:
        grid: see `degradation_of`.
        volumes: their HR slices are degraded here.
        networks: the networks; those for other grids are left out.
        evaluation: measures; has the degradation of the grid.
        batch_size: number of slices in a batch.
        amp: run the networks in bfloat16.
    """
    evaluation.rows.clear()
    for volume in tqdm(volumes, desc=grid, unit="volume"):
        for slices, _, hr in batches(volume, batch_size, evaluation.device):
            lr = evaluation.degradation(hr)
            baselines = evaluation.baselines(lr)
            estimates = {name: baselines[name] for name in ("bicubic", "linear inverse")}
            for checkpoint, network in networks:
                if checkpoint.grid in ("", grid):
                    with torch.autocast(hr.device.type, torch.bfloat16, enabled=amp):
                        maps = maps_of(network, lr, evaluation.degradation.for_lr(lr))
                    estimates |= {f"{checkpoint.name}, {name}": image for name, image in maps.items()}
            evaluation.add(estimates, hr, volume.subject, slices, volume.contrast)
    return [{"grid": grid, **row} for row in evaluation.rows]


def report(rows: Sequence[Row], checkpoints: Sequence[Checkpoint], metrics: Sequence[str]) -> str:
    """Return tables of means by grid, and of differences between networks, in Markdown."""
    cells, differences = [], []
    for grid in dict.fromkeys(row["grid"] for row in rows):
        section = [row for row in rows if row["grid"] == grid]
        table, _ = results_table(section, metrics)
        cells += [(grid, *line.strip("| ").split(" | ")) for line in table.splitlines()[2:]]
        general, alone = ([one.name for one in checkpoints if one.grid == kind] for kind in ("", grid))
        for estimate in MAPS if general else ():
            ours = [f"{name}, {estimate}" for name in general]
            for peer in ["linear inverse", *(f"{name}, {estimate}" for name in alone)]:
                differences += [f"### {grid}", "", differences_table(section, ours, peer, metrics), ""]
    text = [markdown_table(("grid", "method", *metrics), cells), ""]
    return "\n".join([*text, "## Paired differences", "", EXPLANATION, "", *differences] if differences else text)


def main(
    *checkpoints: str,
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "every_factor_output",
    grids: str | Sequence[str] = GRIDS,
    contrasts: str | Sequence[str] | None = None,
    overlay: str | None = None,
    **settings: Any,
) -> None:
    """Measure networks at many factors.

    Args:
        checkpoints: ``NAME=FILE`` or ``NAME@GRID=FILE`` for each network.
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of ``every_factor.csv`` and ``every_factor.md``.
        grids: see `degradations_of`.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        overlay: a config that is merged into the bundle's, for another network.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, metrics, num_slices, amp, ...
    """
    config, given = open_slices(bundle, dataset_dir, output_dir, contrasts, settings, RESULTS, overlay)
    get, folder = config.get_parsed_content, Path(output_dir)
    parsed = [parse_checkpoint(text) for text in checkpoints]
    degradations = degradations_of(grids)
    networks = load_networks(bundle, given, parsed, overlay)
    volumes = load_slice_pairs(config)
    rows: list[Row] = []
    missing, metrics = [], []
    for grid, degradation in degradations.items():
        evaluation = SuperResolutionEvaluation(degradation, get("metrics"), device=get("device"))
        missing, metrics = evaluation.missing, list(evaluation.scores)
        rows += measure_grid(grid, volumes, networks, evaluation, get("sw_batch_size"), get("amp"))
    for sentence in missing:
        logger.warning(sentence)
    notes = [
        f"- Bundle {Path(bundle).name}, commit {commit()}, {machine(torch.device(get('device')))}.",
        f"- {patients_note(config, volumes)}",
        *(f"- {sentence}" for sentence in missing),
    ]
    write_csv(rows, folder / RESULTS[0], get("overwrite"))
    text = ["# Every factor", "", *notes, "", report(rows, parsed, metrics)]
    publish("\n".join(text), folder / RESULTS[1], get("overwrite"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
