"""Super-resolution with another contrast of the patient as a guide, also when the guide is out of place.

    python -m benchmarks.guide guided=runs/guided/model.pt --dataset_dir BraTS --split_file split.json \
        --output_dir guide_output --overlay bundles/common/estimator.json --guide_channels 1 [--contrast t2] \
        [--guide t1] [--grids 4x4,5x1] [--shifts 0,0.5,1,2] [--num_slices 40] ...

A network that accepts guides is measured without one, and with the guide moved by some millimeters: along the diagonal
of the patient axes, by a cubic B-spline, before the slices are cut, so that the guide is also that of another height.
The degradations are those of `benchmarks.every_factor`. Writes ``guide.csv`` (a row for each grid, patient, slice and
method) and ``guide.md``, with the differences for each patient.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from monai.utils import ensure_tuple
from nibabel.affines import voxel_sizes
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import batches, commit, machine, publish, write_csv
from benchmarks.every_factor import (
    MAPS,
    degradations_of,
    load_networks,
    maps_of,
    open_slices,
    overlay_files,
    parse_checkpoint,
)
from benchmarks.paired import EXPLANATION, difference, differences_table, pairs
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs, patients_note, read_config
from miar_monai.errors import ConfigurationError, DatasetError, report_errors_in_one_sentence
from miar_monai.evaluation import Row, SuperResolutionEvaluation
from miar_monai.evaluation.metrics import METRICS as KNOWN
from miar_monai.evaluation.tables import markdown_table, results_table
from miar_monai.transforms.metatensor import with_affine

logger = logging.getLogger(__name__)

RESULTS = ("guide.csv", "guide.md")
UNGUIDED = "no guide"


def moved(image: MetaTensor, millimeters: float) -> MetaTensor:
    """Return a volume (1, X, Y, Z) whose content has moved along the diagonal of its axes; the affine stays.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 9, 9, 9), affine=torch.eye(4))
        >>> image[0, 4, 4, 4] = 1
        >>> np.argwhere(moved(image, 3**0.5)[0].numpy() > 0.99).tolist()
        [[5, 5, 5]]
    """
    affine = np.asarray(image.affine, dtype=np.float64)
    shift = millimeters / np.sqrt(3) / voxel_sizes(affine)
    array = ndimage.shift(image.as_tensor()[0].numpy(), shift, order=3, mode="nearest") if millimeters else image[0]
    return with_affine(image, torch.as_tensor(array)[None], affine)


def load_guides(config: ConfigParser, volumes: Sequence[SlicePairs], millimeters: float) -> list[Tensor]:
    """Return the slices of the guide of each volume, (N, 1, H, W), in network intensities, moved by some millimeters.

    Args:
        config: an ``evaluate.json`` whose ``datalist`` lists the contrast of the guide.
        volumes: the volumes to guide.
        millimeters: see `moved`.

    Raises:
        DatasetError: if a patient has no guide.
    """
    get, guides = config.get_parsed_content, []
    paths = {item["subject"]: item["image"] for item in get("datalist")}
    load = Compose([*get("load_transforms"), *get("intensity_transforms")])  # scaled as a whole, as in inference
    cut = Compose([get("central_slices"), get("center_crop")])
    for volume in tqdm(volumes, desc=f"guides, {millimeters:g} mm", unit="volume"):
        if volume.subject not in paths:
            raise DatasetError(
                f"{volume.subject} has no volume of the guide's contrast: one for each patient is needed; add it."
            )
        item = load({"image": paths[volume.subject]})
        image = cut({"image": moved(item["image"], millimeters)})["image"]
        slices = image.as_tensor().movedim(-1, 0).contiguous()  # (N, 1, H, W)
        if slices.shape != volume.hr.shape:
            raise DatasetError(
                f"{paths[volume.subject]} has slices {tuple(slices.shape)}, but those of the image, "
                f"{tuple(volume.hr.shape)}, are needed; bring both to one grid first."
            )
        guides.append(slices)
    return guides


@torch.inference_mode()
def measure(
    grid: str,
    volumes: Sequence[SlicePairs],
    guides: Mapping[str, Sequence[Tensor]],
    networks: Mapping[str, Any],
    evaluation: SuperResolutionEvaluation,
    batch_size: int,
    amp: bool,
) -> list[Row]:
    """Return the rows of a grid: the linear inverse, and both estimates of each network with each guide and without.

    Args:
        grid: see `benchmarks.every_factor.degradation_of`.
        volumes: their HR slices are degraded here.
        guides: slices of the guides of the volumes, by name.
        networks: networks that accept guides, by name.
        evaluation: measures; has the degradation of the grid.
        batch_size: number of slices in a batch.
        amp: run the networks in bfloat16.
    """
    evaluation.rows.clear()
    for i, volume in enumerate(tqdm(volumes, desc=grid, unit="volume")):
        for slices, _, hr in batches(volume, batch_size, evaluation.device):
            lr = evaluation.degradation(hr)
            operator = evaluation.degradation.for_lr(lr)
            estimates = {"linear inverse": evaluation.baselines(lr)["linear inverse"]}
            given: dict[str, Tensor | None] = {UNGUIDED: None}
            given |= {name: guide[i][slices.start : slices.stop].to(hr) for name, guide in guides.items()}
            for name, network in networks.items():
                for title, guide in given.items():
                    with torch.autocast(hr.device.type, torch.bfloat16, enabled=amp):
                        maps = maps_of(network, lr, operator, guide=guide)
                    estimates |= {f"{name}, {key}, {title}": image for key, image in maps.items()}
            evaluation.add(estimates, hr, volume.subject, slices, volume.contrast)
    return [{"grid": grid, **row} for row in evaluation.rows]


def by_patient(rows: Sequence[Row], first: str, second: str, metric: str) -> dict[str, float]:
    """Return the difference of the means of two methods for each patient."""
    subjects = dict.fromkeys(row["subject"] for row in rows)
    result = {}
    for subject in subjects:
        (values,) = pairs([row for row in rows if row["subject"] == subject], first, second, metric)
        result[subject] = float(difference(values.mean(axis=0)))
    return result


def report(rows: Sequence[Row], networks: Sequence[str], guides: Sequence[str], metrics: Sequence[str]) -> str:
    """Return, in Markdown, means by grid, differences from no guide, and those of PSNR for each patient."""
    text = []
    for grid in dict.fromkeys(row["grid"] for row in rows):
        section = [row for row in rows if row["grid"] == grid]
        text += [f"## {grid}", "", results_table(section, metrics)[0], ""]
        for base in (f"{name}, {estimate}" for name in networks for estimate in MAPS):
            peer, ours = f"{base}, {UNGUIDED}", [f"{base}, {guide}" for guide in guides]
            text += [differences_table(section, ours, peer, metrics), ""]
            columns = [by_patient(section, method, peer, "PSNR") for method in ours] if "PSNR" in metrics else []
            cells = [
                (subject, *(f"{column[subject]:+.{KNOWN['PSNR'].decimals}f}" for column in columns))
                for subject in (columns[0] if columns else ())
            ]
            text += [markdown_table((f"PSNR, {base}", *guides), cells), ""] if columns else []
    return "\n".join([EXPLANATION, "", *text])


def main(
    *checkpoints: str,
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "guide_output",
    contrast: str = "t2",
    guide: str = "t1",
    grids: str | Sequence[str] = ("4x4",),
    shifts: float | Sequence[float] = (0, 0.5, 1, 2),
    overlay: str | None = None,
    **settings: Any,
) -> None:
    """Measure networks with and without a guide.

    Args:
        checkpoints: ``NAME=FILE`` for each network.
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of ``guide.csv`` and ``guide.md``.
        contrast: contrast of the images.
        guide: contrast of the guides.
        grids: see `benchmarks.every_factor.degradations_of`.
        shifts: displacements of the guides in millimeters.
        overlay: a config that is merged into the bundle's, for another network.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, metrics, num_slices, amp, ...

    Raises:
        ConfigurationError: if a network accepts no guide, or none is given.
        DatasetError: if a patient has no guide.
    """
    config, given = open_slices(bundle, dataset_dir, output_dir, contrast, settings, RESULTS, overlay)
    get, folder = config.get_parsed_content, Path(output_dir)
    parsed = [parse_checkpoint(text) for text in checkpoints]
    if not parsed:
        raise ConfigurationError("no network is given: one that accepts guides is needed; give NAME=FILE.")
    degradations = degradations_of(grids)
    networks = {one.name: network for one, network in load_networks(bundle, given, parsed, overlay)}
    for name, network in networks.items():
        if not getattr(network, "guide_channels", 0):
            raise ConfigurationError(f"the network {name} accepts no guide; use a config whose network does.")
    volumes = load_slice_pairs(config)
    of_guides = read_config(bundle, {**given, "datalist#contrasts": [guide]}, *overlay_files(overlay))
    guides = {f"{guide} moved by {float(mm):g} mm": load_guides(of_guides, volumes, mm) for mm in ensure_tuple(shifts)}
    rows: list[Row] = []
    metrics: list[str] = []
    missing: list[str] = []
    for grid, degradation in degradations.items():
        evaluation = SuperResolutionEvaluation(degradation, get("metrics"), device=get("device"))
        missing, metrics = evaluation.missing, list(evaluation.scores)
        rows += measure(grid, volumes, guides, networks, evaluation, get("sw_batch_size"), get("amp"))
    notes = [
        f"- Bundle {Path(bundle).name}, commit {commit()}, {machine(torch.device(get('device')))}.",
        f"- {patients_note(config, volumes)} {contrast}, guided by {guide}.",
        *(f"- {sentence}" for sentence in missing),
    ]
    write_csv(rows, folder / RESULTS[0], get("overwrite"))
    text = "\n".join(["# Guide", "", *notes, "", report(rows, list(networks), list(guides), metrics)])
    publish(text, folder / RESULTS[1], get("overwrite"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
