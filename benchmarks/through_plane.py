"""Through-plane super-resolution: truly isotropic volumes, made thick along the inferior-superior axis and thin again.

    python -m benchmarks.thick_slices --dataset_dir BraTS --split_file split.json --output_dir runs/thick [...]
    python -m benchmarks.run_program --input_dir runs/thick --output_dir runs/eclare
    python -m benchmarks.through_plane ECLARE=runs/eclare MIAR=bundles/miar_brats --dataset_dir BraTS \
        --split_file split.json --output_dir through_plane_output [--rcan runs/brats/rcan_through_plane.pt] \
        [--contrasts t1,t2] [--slices 5,0] [--profile slr] [--every 4] ...

compares the cubic B-spline, the linear inverse, RCAN trained for such slices (see benchmarks/peers), bundles, and the
results of other methods on the same thick slices, one folder each, in sagittal, coronal and axial planes. Writes
``through_plane.csv`` (a row for each patient, contrast, thickness, plane, slice and method) and ``through_plane.md``.
Thickness and gap are in millimeters, ``5‖1`` for slices of 5 mm with gaps of 1 mm; with ``--changes noise0.01,box``
also for slices that are not as the methods are told. The slice profile is that of a Shinnar-Le Roux pulse, or another
one by ``--profile``, and the methods are told it.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import commit, machine, open_run, publish, write_csv
from benchmarks.paired import EXPLANATION, differences_table
from benchmarks.peers.volumes import rcan_method
from benchmarks.thick_slices import ThickSlices, load_cases, parse_changes, parse_slices
from benchmarks.through_plane_methods import VolumeMethod, bundled, cubic, linear_inverse, saved_results, single
from miar_monai.data.spectrum import PLANES
from miar_monai.errors import ConfigurationError, report_errors_in_one_sentence
from miar_monai.evaluation import Row, SuperResolutionEvaluation
from miar_monai.evaluation.metrics import body_mask
from miar_monai.evaluation.tables import markdown_table, results_table
from miar_monai.inference.acquisition import SLICE_PROFILES

logger = logging.getLogger(__name__)

RESULTS = ("through_plane.csv", "through_plane.md")
METRICS = ("PSNR", "SSIM", "PSNR body", "SSIM body", "LPIPS")
CUBIC = "cubic B-spline"
THICKNESS, SECONDS = "thickness‖gap", "s per volume"
_SHARE_OF_BODY = 0.25  # slices with less of the largest section of the body are left out


def slices_of_body(hr: Tensor, threshold: float, every: int) -> list[int]:
    """Return the indices of every n-th of the slices (N, 1, H, W) with a quarter or more of the body's largest section.

    Example:
        >>> hr = torch.zeros(6, 1, 8, 8)
        >>> hr[1:5, :, 2:6, 2:6] = 1
        >>> slices_of_body(hr, 0.5, 2)
        [1, 3]
    """
    sizes = body_mask(hr, threshold).sum((1, 2, 3))
    return torch.nonzero(sizes >= _SHARE_OF_BODY * sizes.max()).flatten().tolist()[::every]


def measure_case(
    case: ThickSlices,
    volumes: Mapping[str, np.ndarray],
    evaluation: SuperResolutionEvaluation,
    window: tuple[float, float],
    every: int,
) -> list[Row]:
    """Return the rows of all methods for one volume, in all three planes.

    Args:
        case: the volume.
        volumes: the results by method.
        evaluation: measures; its rows are dropped.
        window: the intensities that are 0 and 1 for the metrics.
        every: measure every n-th slice.
    """
    rows: list[Row] = []
    scaled = {name: (torch.from_numpy(x) - window[0]) / (window[1] - window[0]) for name, x in volumes.items()}
    truth = (torch.from_numpy(case.truth.array) - window[0]) / (window[1] - window[0])
    for plane, axis in PLANES.items():
        hr = truth.movedim(axis, 0)[:, None]  # (N, 1, H, W)
        chosen = slices_of_body(hr.clamp(0, 1), evaluation.body_threshold, every)
        evaluation.rows.clear()
        estimates = {name: x.movedim(axis, 0)[chosen][:, None] for name, x in scaled.items()}
        evaluation.add(estimates, hr[chosen], case.subject, chosen, case.contrast)
        rows += [{THICKNESS: case.title, "plane": plane, **row} for row in evaluation.rows]
    return rows


def measure_methods(
    cases: Iterable[ThickSlices],
    methods: Sequence[VolumeMethod],
    evaluation: SuperResolutionEvaluation,
    config: ConfigParser,
    every: int,
) -> tuple[list[Row], dict[tuple[str, str], list[float]]]:
    """Return the rows of all methods, and the seconds of each thickness and method.

    Args:
        cases: the volumes.
        methods: see `benchmarks.through_plane_methods.VolumeMethod`.
        evaluation: measures.
        config: an ``evaluate.json``, which scales the intensities.
        every: measure every n-th slice.
    """
    scaling = config.get_parsed_content("intensity_transforms")[0].transform
    rows: list[Row] = []
    seconds: dict[tuple[str, str], list[float]] = {}
    for case in tqdm(list(cases), desc="measuring", unit="volume"):
        results = {title: result for method in methods for title, result in method(case).items()}
        for title, result in results.items():
            known = [] if result.seconds is None else [result.seconds]
            seconds.setdefault((case.title, title), []).extend(known)
        window = scaling.window(torch.from_numpy(case.truth.array))
        arrays = {title: result.array for title, result in results.items()}
        rows += measure_case(case, arrays, evaluation, window, every)
    return rows, seconds


def report(rows: Sequence[Row], seconds: Mapping[tuple[str, str], Sequence[float]], metrics: Sequence[str]) -> str:
    """Return tables of means, of paired differences and of each plane, in Markdown."""
    titles = list(dict.fromkeys(row[THICKNESS] for row in rows))
    cells, details = [], []
    for title in titles:
        section = [row for row in rows if row[THICKNESS] == title]
        methods = list(dict.fromkeys(row["method"] for row in section))
        table, _ = results_table(section, metrics)
        for method, line in zip(methods, table.splitlines()[2:], strict=True):
            times = seconds.get((title, method), [])
            means = [cell.split(" ± ")[0] for cell in line.strip("| ").split(" | ")]
            cells.append((title, *means, f"{statistics.median(times):.3g}" if times else "–"))
        patients = len({row["subject"] for row in section})
        volumes = len({(row["subject"], row["contrast"]) for row in section})
        details += [f"## {title}", "", f"Volumes: {volumes}, of patients: {patients}.", ""]
        for peer in methods[:-1]:
            ours = methods[1:] if peer == CUBIC else [methods[-1]]
            details += [differences_table(section, ours, peer, metrics), ""]
        for plane in PLANES:
            table, notes = results_table([row for row in section if row["plane"] == plane], metrics)
            details += [f"### {title}, {plane} planes", "", table, *(["", *notes] if notes else []), ""]
    head = markdown_table((THICKNESS, "method", *metrics, SECONDS), cells)
    return "\n".join([head, "", EXPLANATION.replace("slices", "slices of all planes", 1), "", *details])


def open_methods(
    folders: Sequence[str], cases: Sequence[ThickSlices], device: str, fidelities: Sequence[float]
) -> list[VolumeMethod]:
    """Return other methods; for the arguments see `main`.

    Raises:
        ConfigurationError: if a folder has no name.
        DatasetError: if results are missing.
    """
    methods = []
    for text in folders:
        name, _, folder = str(text).partition("=")
        if not (name and folder):
            raise ConfigurationError(
                f"{text} is not NAME=FOLDER: the name of a method, and the folder of its results or of a bundle, are"
                " needed; correct it."
            )
        if Path(folder, "configs", "inference.json").is_file():
            methods.append(bundled(name, folder, device, fidelities))
        else:
            methods.append(saved_results(name, Path(folder), cases))
    return methods


def main(
    *folders: str,
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "through_plane_output",
    slices: Any = None,
    subjects: str | Sequence[str] = (),
    contrasts: str | Sequence[str] | None = None,
    every: int = 4,
    rcan: str | None = None,
    fidelities: float | Sequence[float] = (0, 1),
    limit: int | None = None,
    changes: str | Sequence[str] = (),
    profile: str = SLICE_PROFILES[0],
    **settings: Any,
) -> None:
    """Measure interpolation, the linear inverse, and the results of other methods.

    Args:
        folders: ``NAME=FOLDER`` for each other method: a folder of results, see
            `benchmarks.through_plane_methods.saved_results`, or a bundle.
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of ``through_plane.csv`` and ``through_plane.md``.
        slices: thickness and gap in millimeters, or several such pairs; `SLICES` by default.
        subjects: patients, isotropic or not; by default those of the section.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        every: measure every n-th slice of each plane.
        rcan: weights of the peer ``rcan_through_plane``, trained with the data of the bundle; needs the extra bench.
        fidelities: fidelities of the bundles, a method each; those between the lowest and the highest are mixed of the
            results of these two.
        limit: largest number of volumes.
        changes: names of `benchmarks.thick_slices.CHANGES`, or ``"all"``, for slices that are not as assumed.
        profile: the slice profile, one of `miar_monai.inference.acquisition.SLICE_PROFILES`.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, metrics, overwrite, ...

    Raises:
        ConfigurationError: if a folder has no name, or RCAN was trained for none of the slices.
        CheckpointError: if the weights of RCAN cannot be loaded.
        DatasetError: if results are missing.
    """
    config, _ = open_run(bundle, dataset_dir, output_dir, contrasts, {"metrics": list(METRICS), **settings}, RESULTS)
    evaluation, overwrite = (config.get_parsed_content(key) for key in ("evaluation", "overwrite"))
    parsed = parse_changes(changes, profile)
    cases = load_cases(config, parse_slices(slices), ensure_tuple(subjects), limit, parsed, profile)
    methods = [single(CUBIC, cubic), single("linear inverse", linear_inverse)]
    if rcan is not None:
        methods.append(rcan_method(bundle, rcan, cases, evaluation.device))
    methods += open_methods(folders, cases, str(evaluation.device), ensure_tuple(fidelities))
    for sentence in evaluation.missing:
        logger.warning(sentence)
    rows, seconds = measure_methods(cases, methods, evaluation, config, every)
    volumes = dict.fromkeys(f"{case.subject} {case.contrast}" for case in cases)
    notes = [
        f"- Commit {commit()}, {machine(evaluation.device)}, torch {torch.__version__}.",
        f"- Volumes: {', '.join(volumes)}.",
        f"- The slice profile is {profile}, which the methods are told.",
        f"- One in {every} slices of each plane with a quarter or more of the body's largest section; seconds are "
        "medians over the volumes, those of programs as they were measured when they ran.",
        *(f"- {sentence}" for sentence in evaluation.missing),
    ]
    write_csv(rows, Path(output_dir, RESULTS[0]), overwrite)
    text = "\n".join(["# Through-plane", "", *notes, "", report(rows, seconds, list(evaluation.scores))])
    publish(text, Path(output_dir, RESULTS[1]), overwrite)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
