"""``miar fit-uncertainty``: fit the `ErrorModel` of a bundle to the errors of its validation patients.

All errors are measured within the body, on every n-th slice, in network intensities.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from miar_monai._version import __version__
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs, patients_note, read_config
from miar_monai.errors import ConfigurationError
from miar_monai.evaluation import SuperResolutionEvaluation, markdown_table
from miar_monai.evaluation.metrics import body_mask
from miar_monai.inference.error_model import PREDICTORS, ErrorModel, error_predictors, smoothed
from miar_monai.networks import MIAR
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.weights import load_weights

__all__ = [
    "NOISE_LEVELS",
    "ErrorMeasurement",
    "SliceErrors",
    "add_noise",
    "fit_error_model",
    "fit_noise_weight",
    "fit_report",
    "rank_correlations",
]

NOISE_LEVELS = (0.003, 0.01, 0.03)
_WITHOUT_NOISE = PREDICTORS[:3]  # fitted to slices as in training, which have no noise
_NUM_SAMPLES = 4  # decodings whose spread is compared with the error

Method = Callable[[Tensor, torch.nn.Module], Mapping[str, Tensor]]
"""From LR slices (N, 1, h, w) and a network to ``"image"``, (N, 1, H, W), and C values per voxel, ``"error"``."""


class SliceErrors(NamedTuple):
    """The n voxels of the body in one slice.

    Attributes:
        patient: subject and contrast.
        error: absolute errors, (n,).
        values: what the errors are compared with, (n, C).
    """

    patient: str
    error: np.ndarray
    values: np.ndarray


class ErrorMeasurement(NamedTuple):
    """The network and the slices on which errors are measured.

    Attributes:
        inferer: the `BeamSearchInferer` of ``inference.json``, with uncertainty.
        network: of the bundle, with its weights.
        volumes: every n-th slice of each volume.
        evaluation: of ``evaluate.json``.
        notes: sentences for the report.
    """

    inferer: Any
    network: torch.nn.Module
    volumes: list[SlicePairs]
    evaluation: SuperResolutionEvaluation
    notes: list[str]

    @classmethod
    def of(cls, bundle: str, config: ConfigParser, every: int) -> ErrorMeasurement:
        """Load network and slices of a bundle.

        Args:
            bundle: folder of the bundle.
            config: its ``evaluate.json``.
            every: n; every n-th slice is measured.
        """
        get = config.get_parsed_content
        evaluation, network = get("evaluation"), get("network")
        load_weights(network, get("checkpoint"), "train the bundle first.").to(evaluation.device).eval()
        inference = read_config(bundle, {"progress": False, "uncertainty": True}, workflow="inference")
        chosen = slice(every // 2, None, every)
        volumes = [volume._replace(lr=volume.lr[chosen], hr=volume.hr[chosen]) for volume in load_slice_pairs(config)]
        count = sum(len(volume.hr) for volume in volumes)
        notes = [
            f"- {patients_note(config, volumes)}",
            f"- One in {every} of the {get('num_slices')} slices of a volume, {count} in all; inside the body.",
        ]
        return cls(inference.get_parsed_content("inferer"), network, volumes, evaluation, notes)

    @torch.inference_mode()
    def errors(
        self, method: Method, lr: Callable[[SlicePairs], Tensor] = lambda volume: volume.lr
    ) -> list[SliceErrors]:
        """Return the errors of a method and its values per voxel, slice by slice.

        Args:
            method: the method.
            lr: gives the LR slices that the method gets of a volume.
        """
        measured = []
        for volume in tqdm(self.volumes, desc="measuring", unit="volume"):
            result = method(lr(volume).to(self.evaluation.device), self.network)
            images, values = (result[name].float().cpu() for name in ("image", "error"))
            bodies = body_mask(volume.hr, self.evaluation.body_threshold)
            patient = " ".join(filter(None, (volume.subject, volume.contrast)))
            for sr, compared, hr, (body,) in zip(images, values, volume.hr, bodies, strict=True):
                error = (sr[0] - hr[0]).abs()[body]
                measured.append(SliceErrors(patient, error.numpy(), compared[:, body].T.numpy()))
        return measured


def add_noise(level: float, lr: Tensor) -> Tensor:
    """Add white Gaussian noise with this standard deviation, the same in each run."""
    return lr + level * torch.randn(lr.shape, generator=torch.Generator().manual_seed(0))


def _noisy_lr(level: float, volume: SlicePairs) -> Tensor:
    return add_noise(level, volume.lr)


def rank_correlations(slices: Sequence[SliceErrors], channel: int = 0) -> np.ndarray:
    """Return Spearman's rank correlation of values and errors for each slice with at least three body voxels."""
    return np.array([spearmanr(one.values[:, channel], one.error).statistic for one in slices if len(one.error) > 2])


def fit_error_model(slices: Sequence[SliceErrors]) -> ErrorModel:
    """Fit all weights but that of noise: a Poisson regression, whose expected errors have the mean of the observed.

    Args:
        slices: errors of slices as in training, without noise, and their predictors.
    """
    if find_spec("sklearn") is None:
        raise ConfigurationError(
            "the fit needs scikit-learn, which is not installed: install it with pip install miar-monai[bench]."
        )
    from sklearn.linear_model import PoissonRegressor

    values = np.concatenate([one.values[:, : len(_WITHOUT_NOISE)] for one in slices])
    errors = np.concatenate([one.error for one in slices])
    fit = PoissonRegressor(alpha=0, tol=1e-7, max_iter=1000).fit(values.astype(np.float64), errors.astype(np.float64))
    weights = dict(zip(_WITHOUT_NOISE, (round(float(weight), 4) for weight in fit.coef_), strict=True))
    return ErrorModel(offset=round(float(fit.intercept_), 4), **weights)


def fit_noise_weight(model: ErrorModel, levels: Iterable[Sequence[SliceErrors]]) -> float:
    """Fit the weight of noise to slices with noise of several levels; the other weights stay.

    The logarithm of observed over expected error grows with the noise: least squares of its mean at each level.
    """
    points = []
    for slices in levels:
        values, errors = np.concatenate([one.values for one in slices]), np.concatenate([one.error for one in slices])
        expected = np.exp(model.offset + values @ [getattr(model, name) for name in PREDICTORS])
        points.append([values[:, PREDICTORS.index("noise")].mean(), np.log(errors.mean() / expected.mean())])
    noise, log_ratio = np.array(points).T
    return round(float(noise @ log_ratio / (noise @ noise)), 4)


def fit_report(bundle: str, config: ConfigParser, every: int) -> str:
    """Return, as Markdown, how well each predictor ranks the errors, and the fitted `ErrorModel`.

    Args:
        bundle: folder of the bundle.
        config: its ``evaluate.json``, with the section ``validation``.
        every: n; every n-th slice is used.
    """
    measurement = ErrorMeasurement.of(bundle, config, every)
    with_predictors = copy(measurement.inferer)
    with_predictors.error_model = error_predictors  # returns the predictors themselves
    slices = measurement.errors(with_predictors)
    model = fit_error_model(slices)
    noisy = (measurement.errors(with_predictors, partial(_noisy_lr, level)) for level in NOISE_LEVELS)
    model = replace(model, noise=fit_noise_weight(model, noisy))
    weights = np.array([getattr(model, name) for name in PREDICTORS])
    fitted = [one._replace(values=(one.values @ weights)[:, None]) for one in slices]
    has_tokens = isinstance(measurement.network, MIAR)
    names = [name for name in _WITHOUT_NOISE if has_tokens or name != "entropy"]
    rows = {name: rank_correlations(slices, _WITHOUT_NOISE.index(name)) for name in names}
    if has_tokens:
        rows[f"spread of {_NUM_SAMPLES} sampled decodings"] = rank_correlations(_spread_of_samples(measurement))
    rows["all predictors but the spread, fitted"] = rank_correlations(fitted)
    numbers = json.dumps({"_target_": "miar_monai.inference.error_model.ErrorModel", **vars(model)}, indent=4)
    lines = ["# Predictors of the error", "", f"- Bundle {Path(bundle).name}, MIAR {__version__}."]
    cells = [(name, f"{ranks.mean():.3f}", f"{ranks.min():.3f}") for name, ranks in rows.items()]
    table = markdown_table(("predictor", "rank correlation ↑", "of the worst slice"), cells)
    return "\n".join([*lines, *measurement.notes, "", table, "", "```json", numbers, "```", ""])


def _spread_of_samples(measurement: ErrorMeasurement) -> list[SliceErrors]:
    """Return, as values, the standard deviation of SR over decodings that sample their tokens."""

    def sampled(lr: Tensor, network: torch.nn.Module) -> dict[str, Tensor]:
        plain = copy(measurement.inferer)
        plain.uncertainty = False
        images = []
        for seed in range(_NUM_SAMPLES):
            sampler = copy(plain)
            sampler.decoding = Decoding("top_p", seed=seed * 1000)
            images.append(sampler(lr, network))
        return {"image": plain(lr, network), "error": smoothed(torch.stack(images).std(dim=0))}

    return measurement.errors(sampled)
