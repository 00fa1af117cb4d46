"""How well the error that MIAR expects of its voxels agrees with the error that they have.

    python -m benchmarks.calibration fit --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        --output_dir calibration_output [--contrasts t1,t2] [--every 4] ...
    python -m benchmarks.calibration measure ...

``fit`` looks at the validation patients: which sign of an error tells most about it, and which `ErrorModel` fits; its
numbers go into ``source.json``. It writes ``fit.md``. ``measure`` looks at the test patients: expected beside
observed error, as a table, ``calibration.md``, and a picture, ``<name of the bundle>_calibration.png``. All is measured
within the body, on every n-th slice, in network intensities. It needs the extras demo and bench.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
from monai.bundle import ConfigParser
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from benchmarks.robustness import FAULTS, noisy
from benchmarks.table import Volume, load_volumes, open_run, provenance, publish, read_config
from miar_monai.data.atomic_write import atomic_file
from miar_monai.degradation import with_blurs
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.evaluation import SuperResolutionEvaluation
from miar_monai.evaluation.metrics import body_mask
from miar_monai.inference.error_model import PREDICTORS, ErrorModel, error_predictors, smoothed
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.weights import load_weights

FIT, MEASURED = "fit.md", "calibration.md"
BINS = 10
NOISES = {f"noise {level}": partial(noisy, level) for level in (0.003, 0.01, 0.03)}
LEARNED = PREDICTORS[:3]  # from slices as in the training, which have no noise
SAMPLES = 4  # decodings whose spread is looked at


Method = Callable[[Tensor, torch.nn.Module], Tensor]
"""From LR slices (N, 1, h, w) and a network to SR slices, and what is beside them: (N, 1 + C, H, W)."""


class Found(NamedTuple):
    """Voxels of the body of one slice."""

    patient: str
    error: np.ndarray
    """Absolute errors: (n,)."""
    values: np.ndarray
    """What is compared with them: (n, C)."""


class Run(NamedTuple):
    """What is looked at."""

    config: ConfigParser
    inferer: BeamSearchInferer
    """That of ``inference.json``, with uncertainty."""
    network: torch.nn.Module
    volumes: list[Volume]
    """Of every n-th slice."""
    evaluation: SuperResolutionEvaluation
    notes: list[str]

    def look(self, inferer: Method, fault: Callable[[Volume], Tensor] = lambda volume: volume.lr) -> list[Found]:
        """Return the errors of an inferer, slice by slice, and what it returns beside the images."""
        found = []
        for volume in tqdm(self.volumes, desc="measuring", unit="volume"):
            with torch.inference_mode():
                result = inferer(fault(volume).to(self.evaluation.device), self.network).float().cpu()
            bodies = body_mask(volume.hr, self.evaluation.body_threshold)
            patient = " ".join(filter(None, (volume.subject, volume.contrast)))
            for sr, hr, body in zip(result, volume.hr, bodies, strict=True):
                error, values = (sr[0] - hr[0]).abs()[body[0]], sr[1:, body[0]].T
                found.append(Found(patient, error.numpy(), values.numpy()))
        return found


def rank_correlations(found: Sequence[Found], channel: int = 0) -> np.ndarray:
    """Return Spearman's rank correlation of values and errors for each slice; slices without a body are left out."""
    return np.array([spearmanr(one.values[:, channel], one.error).statistic for one in found if len(one.error) > 2])


def _cell(correlations: np.ndarray) -> str:
    return f"{correlations.mean():.3f} | {correlations.min():.3f}"


def spread_of_samples(run: Run) -> list[Found]:
    """Return, as values, the standard deviation of SR over decodings that draw their tokens: branches at all scales."""

    def sampled(lr: Tensor, network: torch.nn.Module) -> Tensor:
        images = []
        for seed in range(SAMPLES):
            other = copy(run.inferer)
            other.decoding, other.uncertainty = Decoding("top_p", seed=seed * 1000), False
            images.append(other(lr, network))
        own = copy(run.inferer)
        own.uncertainty = False
        return torch.cat([own(lr, network), smoothed(torch.stack(images).std(dim=0))], dim=1)

    return run.look(sampled)


def fitted(found: Sequence[Found]) -> ErrorModel:
    """Fit the error model to `error_predictors`: a Poisson regression, which meets the mean of the observed errors.

    The slices are as in the training, so that there is nothing to learn of noise from them.
    """
    from sklearn.linear_model import PoissonRegressor

    values = np.concatenate([one.values[:, : len(LEARNED)] for one in found])
    errors = np.concatenate([one.error for one in found])
    fit = PoissonRegressor(alpha=0, tol=1e-7, max_iter=1000).fit(values.astype(np.float64), errors.astype(np.float64))
    weights = dict(zip(LEARNED, (round(float(weight), 4) for weight in fit.coef_), strict=True))
    return ErrorModel(offset=round(float(fit.intercept_), 4), **weights)


def weight_of_noise(model: ErrorModel, kinds: Iterable[Sequence[Found]]) -> float:
    """Fit the weight of noise to `error_predictors` of slices with noise of several kinds, all else as it is.

    The logarithm of how much too low the other signs are grows with the noise: least squares of its mean in each kind.
    """
    points = []
    for found in kinds:
        values, errors = np.concatenate([one.values for one in found]), np.concatenate([one.error for one in found])
        expected = np.exp(model.offset + values @ [getattr(model, name) for name in PREDICTORS])
        points.append([values[:, PREDICTORS.index("noise")].mean(), np.log(errors.mean() / expected.mean())])
    noise, lacking = np.array(points).T
    return round(float(noise @ lacking / (noise @ noise)), 4)


def bins(found: Sequence[Found], count: int = BINS) -> np.ndarray:
    """Return the mean expected and the mean observed error of voxels, in bins of equally many: (count, 2)."""
    expected, observed = np.concatenate([one.values[:, 0] for one in found]), np.concatenate([o.error for o in found])
    order = np.argsort(expected)
    parts = zip(np.array_split(expected[order], count), np.array_split(observed[order], count), strict=True)
    return np.array([[a.mean(), b.mean()] for a, b in parts])


def summary_line(title: str, found: Sequence[Found]) -> str:
    """Return a row of the table: means of voxels, and rank correlations of slices."""
    expected, observed = np.concatenate([one.values[:, 0] for one in found]), np.concatenate([o.error for o in found])
    correlations = rank_correlations(found)
    ratio = expected.mean() / observed.mean()
    return f"| {title} | {_cell(correlations)} | {expected.mean():.4f} | {observed.mean():.4f} | {ratio:.2f} |"


def draw(patients: Mapping[str, np.ndarray], overall: np.ndarray, path: Path, overwrite: bool) -> Path:
    """Draw observed against expected error: bins of all voxels, and of each patient; on the diagonal they agree.

    Args:
        patients: `bins` by patient.
        overall: `bins` of all.
        path: the picture.
        overwrite: replace an existing file.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    with matplotlib.rc_context({"font.size": 9, "savefig.dpi": 150}):
        figure = Figure(figsize=(6, 5), layout="constrained")
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
        ax.legend(fontsize=7, frameon=False)
        with atomic_file(path, overwrite) as part:
            figure.savefig(part)
    return path


class Calibration:
    """Fit the model of errors of a bundle, or measure how well it holds.

    Args:
        dataset_dir: folder of the data, or several folders; the bundle's ``data`` by default.
        bundle: folder of the bundle.
        output_dir: where the results are written.
        contrasts: of a BraTS folder; the bundle's by default.
        every: n; each n-th slice is looked at.
        settings: keys of the bundle's ``evaluate.json``: split_file, device, checkpoint, num_slices, ...
    """

    def __init__(
        self,
        dataset_dir: str | Sequence[str] | None = None,
        bundle: str = "bundles/miar_brats",
        output_dir: str = "calibration_output",
        contrasts: str | Sequence[str] | None = None,
        every: int = 4,
        **settings: Any,
    ) -> None:
        self._dataset_dir = dataset_dir or str(Path(bundle, "data"))
        self._contrasts = contrasts
        self._bundle = bundle
        self._output = Path(output_dir)
        self._every = every
        self._settings = settings

    def fit(self) -> None:
        """Compare the signs of errors on the validation patients, and fit the model; write ``fit.md``."""
        run = self._open("validation", FIT)
        looking = copy(run.inferer)
        looking.error_model = error_predictors  # type: ignore[assignment]  # takes the same, and returns the signs themselves
        found = run.look(looking)
        model = fitted(found)
        kinds = [run.look(looking, lambda volume, fault=fault: fault(volume.lr)) for fault in NOISES.values()]
        model = replace(model, noise=weight_of_noise(model, kinds))
        lines = ["| sign of an error | rank correlation ↑ | of the worst slice |", "|---|---|---|"]
        lines += [f"| {name} | {_cell(rank_correlations(found, i))} |" for i, name in enumerate(LEARNED)]
        lines.append(f"| spread of {SAMPLES} sampled decodings | {_cell(rank_correlations(spread_of_samples(run)))} |")
        weights = np.array([getattr(model, name) for name in PREDICTORS])
        together = [one._replace(values=(one.values @ weights)[:, None]) for one in found]
        lines.append(f"| all signs but the spread, fitted | {_cell(rank_correlations(together))} |")
        numbers = json.dumps({"_target_": "miar_monai.inference.error_model.ErrorModel", **vars(model)}, indent=4)
        text = ["# Signs of errors", "", *run.notes, "", *lines, "", "```json", numbers, "```", ""]
        publish("\n".join(text), self._output / FIT, run.config.get_parsed_content("overwrite"))

    def measure(self) -> None:
        """Compare expected and observed errors on the test patients; write ``calibration.md`` and the picture.

        The errors are those of slices as in training, and of slices with a fault.
        """
        picture = f"{Path(self._bundle).name}_calibration.png"
        run = self._open("test", MEASURED, picture)
        overwrite = run.config.get_parsed_content("overwrite")
        found = run.look(run.inferer)
        by_patient: dict[str, list[Found]] = {}
        for one in found:
            by_patient.setdefault(one.patient, []).append(one)
        header = "| | rank correlation ↑ | of the worst slice | expected error | observed error | ratio |"
        lines = [header, "|---|---|---|---|---|---|"]
        lines += [summary_line(name, part) for name, part in by_patient.items()] + [summary_line("all", found)]
        for name, fault in {"10 bits": FAULTS["10 bits"], **NOISES}.items():
            lines.append(summary_line(f"all, {name}", run.look(run.inferer, lambda v, fault=fault: fault(v.lr))))
        sharp = with_blurs(run.evaluation.degradation, [0.0])[1]
        lines.append(summary_line("all, not blurred", run.look(run.inferer, lambda volume: sharp(volume.hr))))
        overall = bins(found)
        table = ["| bin | expected error | observed error | ratio |", "|---|---|---|---|"]
        table += [f"| {i} | {a:.4f} | {b:.4f} | {a / b:.2f} |" for i, (a, b) in enumerate(overall, 1)]
        draw({name: bins(part) for name, part in by_patient.items()}, overall, self._output / picture, overwrite)
        text = ["# Calibration", "", *run.notes, "", *lines, "", "Bins of equally many voxels:", "", *table, ""]
        publish("\n".join(text), self._output / MEASURED, overwrite)

    def _open(self, section: str, *results: str) -> Run:
        """Load what is needed; mistakes are found before the work."""
        settings = {"section": section, "metrics": ["PSNR"], **self._settings}
        config, _ = open_run(self._bundle, self._dataset_dir, str(self._output), self._contrasts, settings, results)
        get = config.get_parsed_content
        evaluation, network = get("evaluation"), get("network")
        load_weights(network, get("checkpoint"), "train the bundle first.").to(evaluation.device).eval()
        inference = read_config(self._bundle, {"progress": False, "uncertainty": True}, workflow="inference")
        chosen = slice(self._every // 2, None, self._every)
        volumes = [volume._replace(lr=volume.lr[chosen], hr=volume.hr[chosen]) for volume in load_volumes(config)]
        notes, count = provenance(self._bundle, config, volumes, 1)[:2], sum(len(volume.hr) for volume in volumes)
        slices = f"One in {self._every} of the {get('num_slices')} slices of a volume, {count} in all"
        notes.append(f"- {slices}; inside the body.")
        return Run(config, inference.get_parsed_content("inferer"), network, volumes, evaluation, notes)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # to stderr; the network's doubts are expected
    report_errors_in_one_sentence()
    fire.Fire(Calibration)
