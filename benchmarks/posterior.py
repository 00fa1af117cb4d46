"""Posterior samples: their distance to the truth, spread, intervals, spectrum, order of errors, and time.

    python -m benchmarks.posterior --checkpoint runs/posterior/model.pt --noise_channels 2 --dataset_dir BraTS \
        --split_file split.json --output_dir posterior_output [--contrasts t1,t2] [--samples 16] [--every 4] \
        [--grid 4x4] [--num_slices 40] [--device cuda:0] ...

The network is that of the bundle's ``evaluate.json``, which samples with ``--noise_channels``. Two numbers are fitted
to the validation patients: the conformal factor of the intervals, and the scale of the expected error, by the bundle's
error model for the faithful estimate, with which the samples are compared. Everything else is measured on the patients
of the ``section``, the test patients. Writes ``posterior.csv`` (a row for each patient, contrast, slice and method),
``posterior_patients.csv`` (a row for each patient), ``posterior.md``, and a picture of one slice, ``posterior.png``.
Needs the extra demo.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import batches, commit, every_nth, machine, publish, write_csv
from benchmarks.every_factor import degradation_of, open_slices
from benchmarks.measuring import median_ms
from benchmarks.paired import EXPLANATION, differences_table, log_ratio, paired
from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs, patients_note, read_config
from miar_monai.degradation import SeparableOperator
from miar_monai.errors import check_range, report_errors_in_one_sentence
from miar_monai.evaluation import Row, SuperResolutionEvaluation
from miar_monai.evaluation.metrics import body_mask
from miar_monai.evaluation.probabilistic import (
    fair_crps,
    laplace_crps,
    radial_power,
    sparsification_error,
    spread_over_skill,
)
from miar_monai.evaluation.tables import markdown_table, results_table
from miar_monai.inference.error_model import ErrorModel
from miar_monai.inference.samples import LEVEL, SampleSummary
from miar_monai.networks import SuperResolutionNetwork
from miar_monai.networks.weights import load_weights
from miar_monai.visualize.figures import enlarged_panels

RESULTS = ("posterior.csv", "posterior_patients.csv", "posterior.md", "posterior.png")
METRICS = ("PSNR", "SSIM", "LPIPS")
FAITHFUL, PERCEPTUAL, SAMPLE = "faithful", "perceptual", "one sample"
BANDS = tuple(round(0.1 * i, 1) for i in range(9))  # shares of the Nyquist frequency
_SCALES = np.geomspace(0.25, 4, 81)  # of the expected error
_COLUMNS = {
    "spread over skill": 2,
    "coverage": 3,
    "coverage, conformal": 3,
    "CRPS, samples": 5,
    "CRPS, Laplace": 5,
    "rank correlation, samples": 3,
    "rank correlation, regression": 3,
    "AUSE, samples": 3,
    "AUSE, regression": 3,
}
_DEFINITIONS = f"""\
All figures but the metrics of the first tables are of the voxels inside the body, in network intensities, unclamped.
Spread over skill is the root of (N + 1) / N · mean variance / mean squared error of the mean of N samples, 1 for the
true distribution. Coverage is the share of the voxels whose true intensity lies in the interval of {100 * LEVEL:g} %.
CRPS, the continuous ranked probability score, is the mean over voxels (fair, for samples), beside that of a Laplace
distribution around the faithful estimate. Rank correlation (Spearman, within slices, their mean) and AUSE (area under
the sparsification error, relative to the mean error) compare the standard deviation of the samples with the error of
their mean, and the expected error with that of the faithful estimate."""


class Body(NamedTuple):
    """The n voxels of the body in one slice."""

    truth: Tensor
    """(n,)."""
    faithful: Tensor
    """(n,)."""
    expected: Tensor
    """Expected absolute error of the faithful estimate by the error model, (n,)."""
    samples: Tensor
    """(n, N)."""

    @classmethod
    def joined(cls, slices: Sequence[Body]) -> Body:
        """Return the voxels of several slices together."""
        return cls(*(torch.cat(parts) for parts in zip(*slices, strict=True)))


class Calibration(NamedTuple):
    """What is fitted to the validation patients."""

    interval_factor: float
    """Widens the intervals to their probability."""
    error_scale: float
    """Factor of the expected error that gives the Laplace distribution its lowest CRPS."""

    @classmethod
    def of(cls, slices: Sequence[Body]) -> Calibration:
        """Fit both to the voxels of some slices."""
        required = torch.cat([SampleSummary.of(one.samples).required_factor(one.truth) for one in slices])
        voxels = Body.joined(slices)
        scores = [
            laplace_crps(voxels.faithful, float(scale) * voxels.expected, voxels.truth).mean() for scale in _SCALES
        ]
        best = int(torch.stack(scores).argmin())
        return cls(float(np.quantile(required.numpy(), LEVEL)), float(_SCALES[best]))


class Measured(NamedTuple):
    """What is measured of some volumes, by patient."""

    bodies: dict[str, list[Body]]
    power: dict[str, dict[str, Tensor]]
    """Power in `BANDS`, summed over the slices, by patient and method; ``"truth"`` is one of them."""


class Sampler(NamedTuple):
    """Estimates and samples of LR slices by a network."""

    network: SuperResolutionNetwork
    error_model: ErrorModel
    count: int
    generator: torch.Generator
    amp: bool

    def __call__(self, lr: Tensor, operator: SeparableOperator) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return both estimates, the expected error of the faithful one, (B, 1, H, W), and samples, (B, N, H, W)."""
        with torch.autocast(lr.device.type, torch.bfloat16, enabled=self.amp):
            estimate = self.network.super_resolve(lr, fidelity=1.0, operator=operator, error_model=self.error_model)
            noise = self.network.white_noise(operator, (len(lr), self.count), self.generator)
            samples = self.network.posterior_samples(lr, noise, operator, error_model=self.error_model).float()
        assert estimate.error is not None
        maps = {FAITHFUL: estimate.faithful.float(), PERCEPTUAL: estimate.perceptual.float()}
        return maps, estimate.error.float(), samples


def mean_title(count: int) -> str:
    """Return the title of the row of the mean of some samples."""
    return f"mean of {count} samples"


@torch.inference_mode()
def measure(
    volumes: Sequence[SlicePairs], sampler: Sampler, evaluation: SuperResolutionEvaluation, batch_size: int
) -> Measured:
    """Measure the slices of volumes; rows of estimates, of one sample and of the mean are added to ``evaluation``.

    Args:
        volumes: their HR slices are degraded here.
        sampler: the network.
        evaluation: measures; has the degradation.
        batch_size: number of slices in a batch.
    """
    bodies: dict[str, list[Body]] = {}
    power: dict[str, dict[str, Tensor]] = {}
    for volume in tqdm(volumes, desc="sampling", unit="volume"):
        for slices, _, hr in batches(volume, batch_size, evaluation.device):
            lr = evaluation.degradation(hr)
            maps, expected, samples = sampler(lr, evaluation.degradation.for_lr(lr))
            mean = samples.mean(dim=1, keepdim=True)
            estimates = {**maps, SAMPLE: samples[:, :1], mean_title(sampler.count): mean}
            evaluation.add(estimates, hr, volume.subject, slices, volume.contrast)
            sums = power.setdefault(volume.subject, {})
            for name, images in {"truth": hr, **estimates, SAMPLE: samples}.items():
                found = radial_power(images.flatten(0, 1), BANDS).sum(dim=0).cpu() / images.shape[1]
                sums[name] = sums.get(name, torch.zeros(len(BANDS) - 1)) + found
            mask = body_mask(hr.clamp(0, 1), evaluation.body_threshold)[:, 0]
            for i, body in enumerate(mask):
                values = (x[i, 0][body].cpu() for x in (hr, maps[FAITHFUL], expected))
                bodies.setdefault(volume.subject, []).append(Body(*values, samples[i, :, body].T.cpu()))
    return Measured(bodies, power)


def patient_row(slices: Sequence[Body], calibration: Calibration) -> dict[str, float]:
    """Return the figures of one patient, by the names in the table."""
    voxels = Body.joined(slices)

    def coverage(factor: float) -> float:
        summary = SampleSummary.of(voxels.samples, factor=factor)
        return float(((summary.lower <= voxels.truth) & (voxels.truth <= summary.upper)).float().mean())

    def ranks(values: Callable[[Body], tuple[Tensor, Tensor]]) -> float:
        return float(np.mean([spearmanr(*values(one)).statistic for one in slices if len(one.truth) > 2]))

    crps = crps_of(voxels, calibration)
    return {
        "spread over skill": float(spread_over_skill(voxels.samples - voxels.truth[:, None])),
        "coverage": coverage(1.0),
        "coverage, conformal": coverage(calibration.interval_factor),
        "CRPS, samples": crps[0],
        "CRPS, Laplace": crps[1],
        "rank correlation, samples": ranks(_spread_and_error),
        "rank correlation, regression": ranks(_expected_and_error),
        "AUSE, samples": sparsification_error(*_spread_and_error(voxels)),
        "AUSE, regression": sparsification_error(*_expected_and_error(voxels)),
    }


def crps_of(voxels: Body, calibration: Calibration) -> tuple[float, float]:
    """Return the mean CRPS of the samples, and of the calibrated Laplace distribution around the faithful estimate."""
    scale = calibration.error_scale * voxels.expected
    scores = fair_crps(voxels.samples, voxels.truth), laplace_crps(voxels.faithful, scale, voxels.truth)
    return float(scores[0].mean()), float(scores[1].mean())


def _spread_and_error(voxels: Body) -> tuple[Tensor, Tensor]:
    return voxels.samples.std(dim=1), (voxels.samples.mean(dim=1) - voxels.truth).abs()


def _expected_and_error(voxels: Body) -> tuple[Tensor, Tensor]:
    return voxels.expected, (voxels.faithful - voxels.truth).abs()


def spectrum_rows(power: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, ...]]:
    """Return, for each method, its power relative to the truth in each band, in dB, the mean over patients."""
    methods = [name for name in next(iter(power.values())) if name != "truth"]
    rows = []
    for method in methods:
        ratios = torch.stack([10 * (one[method] / one["truth"]).log10() for one in power.values()])  # (patients, bands)
        rows.append((method, *(f"{value:+.2f}" for value in ratios.mean(dim=0).tolist())))
    return rows


def draw(hr: Tensor, sampler: Sampler, evaluation: SuperResolutionEvaluation, path: Path, overwrite: bool) -> None:
    """Draw a slice (1, 1, H, W): the truth, the faithful estimate and samples; their mean, spread and error.

    Args:
        hr: the slice, on the device.
        sampler: the network.
        evaluation: has the degradation.
        path: the picture.
        overwrite: replace an existing file.
    """
    lr = evaluation.degradation(hr)
    maps, _, samples = sampler(lr, evaluation.degradation.for_lr(lr))
    summary = SampleSummary.of(samples)
    faithful, truth = maps[FAITHFUL], hr[:, 0]
    images = {"truth": truth, **{f"sample {i + 1}": samples[:, i] for i in range(min(sampler.count, 4))}}
    images |= {FAITHFUL: faithful[:, 0], "mean of samples": summary.mean}
    outside = torch.maximum(summary.lower - truth, truth - summary.upper).clamp(min=0)
    differences = {
        "standard deviation": summary.std,
        "|mean - truth|": (summary.mean - truth).abs(),
        f"outside of {100 * LEVEL:g} %, by": outside,
    }
    arrays = ({title: x[0].cpu().numpy() for title, x in group.items()} for group in (images, differences))
    enlarged_panels(*arrays, path, columns=5, overwrite=overwrite)


def sampling_ms(sampler: Sampler, lr: Tensor, operator: SeparableOperator, repeats: int = 20) -> float:
    """Return the median time of the samples of LR slices, on a GPU as a CUDA graph whose input is the noise.

    Args:
        sampler: the network, in bfloat16 if its ``amp`` is on.
        lr: LR slices, (B, 1, h, w).
        operator: their operator.
        repeats: number of timed calls.
    """
    network = sampler.network.cast(torch.bfloat16) if sampler.amp else sampler.network
    noise = network.white_noise(operator, (len(lr), sampler.count), sampler.generator)

    def samples(lr: Tensor, noise: Tensor, *tensors: Tensor) -> dict[str, Tensor]:
        drawn = SeparableOperator.from_tensors(tensors)
        return {"samples": network.posterior_samples(lr, noise, drawn, error_model=sampler.error_model)}

    step = CUDAGraphed(samples)
    return median_ms(lambda: step(lr, noise, *operator.tensors), lr.device, repeats)


def report(
    rows: Sequence[Row],
    measured: Measured,
    calibration: Calibration,
    patients: Mapping[str, Mapping[str, float]],
    metrics: Sequence[str],
    count: int,
) -> str:
    """Return the tables in Markdown.

    Args:
        rows: metrics of the slices.
        measured: what they are measured of.
        calibration: fitted to other patients.
        patients: `patient_row` of each patient.
        metrics: columns of the first tables.
        count: number of samples.
    """
    pairs = [np.array([crps_of(one, calibration) for one in slices]) for slices in measured.bodies.values()]
    ratio = paired(pairs, log_ratio).exp()
    cells = [(name, *_cells(row)) for name, row in patients.items()]
    means = {column: float(np.mean([row[column] for row in patients.values()])) for column in _COLUMNS}
    low, high = ratio.t_interval
    bands = [f"{a:g}–{b:g}" for a, b in pairwise(BANDS)]
    ours = [SAMPLE, mean_title(count)]
    return "\n".join([
        "## Metrics", "", results_table(rows, metrics)[0], "",
        "Minus the faithful estimate:", "", differences_table(rows, ours, FAITHFUL, metrics), "",
        EXPLANATION, "", "## By patient", "", _DEFINITIONS, "",
        f"Fitted to the validation patients: conformal factor of the intervals {calibration.interval_factor:.3f}, "
        f"factor of the expected error {calibration.error_scale:.3f}.", "",
        markdown_table(("patient", *_COLUMNS), [*cells, ("mean", *_cells(means))]), "",
        f"CRPS of the samples, times that of the Laplace distribution (geometric mean over the patients): "
        f"{ratio.estimate:.3f} [{low:.3f}, {high:.3f}].", "",
        "## Power spectrum", "",
        "Power relative to the truth in dB, by bands in shares of the Nyquist frequency; mean over the patients.", "",
        markdown_table(("method", *bands), spectrum_rows(measured.power)),
    ])  # fmt: skip


def _cells(row: Mapping[str, float]) -> list[str]:
    return [f"{row[column]:.{decimals}f}" for column, decimals in _COLUMNS.items()]


def main(
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "posterior_output",
    contrasts: str | Sequence[str] | None = None,
    grid: str = "4x4",
    samples: int = 16,
    every: int = 4,
    sample_seed: int = 0,
    overlay: str | None = None,
    **settings: Any,
) -> None:
    """Measure the posterior samples of a network.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of the results.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        grid: see `benchmarks.every_factor.degradation_of`.
        samples: N, at least 2.
        every: n; every n-th slice is measured.
        sample_seed: seed of the noise.
        overlay: a config that is merged into the bundle's, for another network.
        settings: keys of the bundle's ``evaluate.json``: checkpoint, noise_channels, split_file, device, metrics,
            num_slices, amp, ...

    Raises:
        SettingError: if the network does not sample, or there are fewer than 2 samples.
    """
    check_range("samples", samples, 2, float("inf"))
    config, given = open_slices(
        bundle, dataset_dir, output_dir, contrasts, {"metrics": list(METRICS), **settings}, RESULTS, overlay
    )
    get, folder = config.get_parsed_content, Path(output_dir)
    network = load_weights(get("network"), get("checkpoint"), "train it with train_posterior.json.").eval()
    network.check_samples()
    error_model = read_config(bundle, {}, workflow="inference").get_parsed_content("inferer").error_model
    evaluation = SuperResolutionEvaluation(degradation_of(grid), get("metrics"), device=get("device"))
    generator = torch.Generator().manual_seed(sample_seed)
    sampler = Sampler(network, error_model, samples, generator, get("amp"))

    def chosen(section: str) -> list[SlicePairs]:
        overlays = [Path(overlay)] if overlay else []
        return every_nth(load_slice_pairs(read_config(bundle, {**given, "section": section}, *overlays)), every)

    fitted = measure(chosen("validation"), sampler, evaluation, get("sw_batch_size"))
    calibration = Calibration.of([one for slices in fitted.bodies.values() for one in slices])
    evaluation.rows.clear()
    volumes = chosen(get("section"))
    measured = measure(volumes, sampler, evaluation, get("sw_batch_size"))
    lr = evaluation.degradation(volumes[0].hr[:1].to(evaluation.device))
    milliseconds = sampling_ms(sampler, lr, evaluation.degradation.for_lr(lr))
    side = " × ".join(map(str, volumes[0].hr.shape[2:]))
    notes = [
        f"- Bundle {Path(bundle).name}, {Path(get('checkpoint')).name}, commit {commit()}, grid {grid}.",
        f"- {patients_note(config, volumes)} One in {every} of the {get('num_slices')} slices of a volume.",
        f"- {samples} samples of one slice of {side} voxels: {milliseconds:.1f} ms, "
        f"{machine(evaluation.device)}, {'bfloat16' if sampler.amp else 'float32'}.",
        *(f"- {sentence}" for sentence in evaluation.missing),
    ]
    overwrite = get("overwrite")
    write_csv(evaluation.rows, folder / RESULTS[0], overwrite)
    shown = volumes[0].hr[[len(volumes[0].hr) // 2]].to(evaluation.device)
    draw(shown, sampler, evaluation, folder / RESULTS[3], overwrite)
    patients = {name: patient_row(one, calibration) for name, one in measured.bodies.items()}
    write_csv([{"subject": name, **row} for name, row in patients.items()], folder / RESULTS[1], overwrite)
    text = report(evaluation.rows, measured, calibration, patients, list(evaluation.scores), samples)
    publish("\n".join(["# Posterior samples", "", *notes, "", text, ""]), folder / RESULTS[2], overwrite)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
