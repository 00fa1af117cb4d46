"""Calibration of the expected error: how well it agrees with the observed error on the test patients.

    python -m benchmarks.calibration --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        --output_dir calibration_output [--contrasts t1,t2] [--every 4] ...

Writes expected and observed error as a table, ``calibration.md``, and as a picture,
``<name of the bundle>_calibration.png``. All errors are measured within the body, on every n-th slice, in network
intensities. Needs the extra demo. ``miar fit-uncertainty`` fits the model of the errors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fire
import numpy as np

from benchmarks.common import commit, open_run, publish
from benchmarks.robustness import PERTURBATIONS
from miar_monai.cli.fit_uncertainty import (
    NOISE_LEVELS,
    ErrorMeasurement,
    SliceErrors,
    add_noise,
    rank_correlations,
)
from miar_monai.data.atomic_write import atomic_file
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.evaluation.tables import markdown_table

RESULT = "calibration.md"
NUM_BINS = 10
_PERTURBATIONS = {
    "10 bits": PERTURBATIONS["10 bits"],
    **{f"noise {level}": partial(add_noise, level) for level in NOISE_LEVELS},
}
_COLUMNS = ("", "rank correlation ↑", "of the worst slice", "expected error", "observed error", "ratio")
_BIN_COLUMNS = ("bin", "expected error", "observed error", "ratio")


def _expected_and_observed(slices: Sequence[SliceErrors]) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected and the observed errors of all voxels, (n,) each."""
    return np.concatenate([one.values[:, 0] for one in slices]), np.concatenate([one.error for one in slices])


def bins(slices: Sequence[SliceErrors], count: int = NUM_BINS) -> np.ndarray:
    """Return the mean expected and the mean observed error of voxels in bins of equal size: (count, 2)."""
    expected, observed = _expected_and_observed(slices)
    order = np.argsort(expected)
    parts = zip(np.array_split(expected[order], count), np.array_split(observed[order], count), strict=True)
    return np.array([[a.mean(), b.mean()] for a, b in parts])


def summary_row(title: str, slices: Sequence[SliceErrors]) -> tuple[str, ...]:
    """Return a row of the table: means over voxels, and rank correlations within slices."""
    expected, observed = (errors.mean() for errors in _expected_and_observed(slices))
    correlations = rank_correlations(slices)
    ranks = f"{correlations.mean():.3f}", f"{correlations.min():.3f}"
    return title, *ranks, f"{expected:.4f}", f"{observed:.4f}", f"{expected / observed:.2f}"


def draw(patients: Mapping[str, np.ndarray], overall: np.ndarray, path: Path, overwrite: bool) -> Path:
    """Draw observed against expected error for bins of all voxels and of each patient; the diagonal is ideal.

    Args:
        patients: `bins` by patient.
        overall: `bins` of all.
        path: the picture.
        overwrite: replace an existing file.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    with rc_context({"font.size": 9, "savefig.dpi": 150}):
        figure = Figure(figsize=(7, 5), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        limits = [min(overall.min(), *(b.min() for b in patients.values())) / 1.2, overall.max() * 2]
        ax.plot(limits, limits, color="gray", linewidth=1, linestyle="--", label="expected = observed")
        for name, points in patients.items():
            ax.plot(*points.T, marker=".", linewidth=1, alpha=0.6, label=name)
        ax.plot(*overall.T, marker="o", color="black", label="all")
        ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
        ax.set(xlabel="expected absolute error (share of the intensity range)", ylabel="observed mean absolute error")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        ax.set_aspect("equal")
        ax.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
        with atomic_file(path, overwrite) as part:
            figure.savefig(part)
    return path


def main(
    dataset_dir: str | Sequence[str] | None = None,
    bundle: str = "bundles/miar_brats",
    output_dir: str = "calibration_output",
    contrasts: str | Sequence[str] | None = None,
    every: int = 4,
    **settings: Any,
) -> None:
    """Compare expected and observed errors on the test patients, for slices as in training and for perturbed slices.

    Args:
        dataset_dir: folder of the data, or several folders; the bundle's ``data`` by default.
        bundle: folder of the bundle.
        output_dir: folder of ``calibration.md`` and the picture.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        every: n; every n-th slice is measured.
        settings: keys of the bundle's ``evaluate.json``: split_file, device, checkpoint, num_slices, ...
    """
    picture = f"{Path(bundle).name}_calibration.png"
    settings = {"section": "test", "metrics": ["PSNR"], **settings}
    data = dataset_dir or str(Path(bundle, "data"))
    config, _ = open_run(bundle, data, output_dir, contrasts, settings, [RESULT, picture])
    overwrite = config.get_parsed_content("overwrite")
    measurement = ErrorMeasurement.of(bundle, config, every)
    inferer, sharp = measurement.inferer, replace(measurement.evaluation.degradation, sigma=0.0)
    slices = measurement.errors(inferer)
    by_patient: dict[str, list[SliceErrors]] = {}
    for one in slices:
        by_patient.setdefault(one.patient, []).append(one)
    rows = [summary_row(name, part) for name, part in by_patient.items()] + [summary_row("all", slices)]

    for name, change in _PERTURBATIONS.items():
        errors = measurement.errors(inferer, lambda volume, change=change: change(volume.lr))
        rows.append(summary_row(f"all, {name}", errors))
    rows.append(summary_row("all, not blurred", measurement.errors(inferer, lambda volume: sharp(volume.hr))))
    overall = bins(slices)
    bin_rows = [(str(i), f"{a:.4f}", f"{b:.4f}", f"{a / b:.2f}") for i, (a, b) in enumerate(overall, 1)]
    draw({name: bins(part) for name, part in by_patient.items()}, overall, Path(output_dir, picture), overwrite)
    text = ["# Calibration", "", f"- Bundle {Path(bundle).name}, commit {commit()}.", *measurement.notes, ""]
    text += [markdown_table(_COLUMNS, rows), "", "Bins of equally many voxels:", ""]
    text += [markdown_table(_BIN_COLUMNS, bin_rows), ""]
    publish("\n".join(text), Path(output_dir, RESULT), overwrite)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # to stderr; warnings on noise are expected
    report_errors_in_one_sentence()
    fire.Fire(main)
