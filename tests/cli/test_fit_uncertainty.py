"""Fitting the model of errors, and measuring how well it holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundle_runs import TOKENS
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle

from benchmarks import calibration
from miar_monai.cli.fit_uncertainty import SliceErrors, fit_error_model, fit_noise_weight, rank_correlations
from miar_monai.cli.main import main
from miar_monai.errors import ConfigurationError
from miar_monai.inference.error_model import ErrorModel

pytestmark = pytest.mark.usefixtures("elsewhere")

MODEL = ErrorModel(offset=-0.5, disagreement=0.6, edges=0.3, entropy=1.5, noise=0.1)


def slice_errors(errors: np.ndarray, values: np.ndarray) -> SliceErrors:
    return SliceErrors("p", errors, values)


def test_the_fit_finds_the_model_that_made_the_errors() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(-4, 1, 40000), rng.normal(-4, 1, 40000), rng.uniform(0, 1, 40000)], axis=1)
    weights = [MODEL.disagreement, MODEL.edges, MODEL.entropy, MODEL.noise]
    levels = []
    for noise in (0.0, 2.0, 4.0):
        noisy = np.concatenate([values, np.full((len(values), 1), noise)], axis=1)
        levels.append([slice_errors(rng.exponential(np.exp(MODEL.offset + noisy @ weights)), noisy)])
    model = fit_error_model(levels[0])
    model = replace(model, noise=fit_noise_weight(model, levels[1:]))
    for name, value in vars(MODEL).items():
        assert getattr(model, name) == pytest.approx(value, abs=0.1 if name != "noise" else 0.02)


def test_bins_and_correlations_follow_their_definitions() -> None:
    expected = np.arange(20.0)
    one = slice_errors(2 * expected, expected[:, None])
    np.testing.assert_allclose(calibration.bins([one], 4), [[x, 2 * x] for x in (2, 7, 12, 17)])
    other = slice_errors(-expected, expected[:, None])
    assert rank_correlations([one, other]) == pytest.approx([1, -1])
    assert calibration.summary_row("x", [one]) == ("x", "1.000", "1.000", "9.5000", "19.0000", "0.50")


PATIENTS = [f"BraTS_{i:05d}" for i in range(3)]


@pytest.fixture
def split(tmp_path: Path) -> str:
    """Write a split with one patient in each section."""
    path = tmp_path / "split.json"
    path.write_text(json.dumps({name: [PATIENTS[i]] for i, name in enumerate(("training", "validation", "test"))}))
    return str(path)


def fitted(data: Path, split: str, bundle: Path) -> str:
    """Return what the command prints for a bundle."""
    options = ["--split-file", split, "--num-slices", "4", "--every", "2", "--device", "cpu"]
    result = CliRunner().invoke(main, ["fit-uncertainty", str(data), "--model", str(bundle), *options])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout.split("```")[1].removeprefix("json"))) == {"_target_", *vars(MODEL)}
    return result.stdout


def test_the_entropy_of_tokens_and_the_spread_of_samples_are_predictors_too(split: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    for i, patient in enumerate(PATIENTS):
        write_nifti_phantom(tmp_path / "data" / f"{patient}.nii.gz", (40, 36, 6), seed=i, low=-1000, high=400)
    fit = fitted(tmp_path / "data", split, write_tiny_bundle(tmp_path / "tiny", TOKENS))
    rows = [line.split(" | ") for line in fit.splitlines() if line.startswith("| ")]
    ranks = {cells[0].removeprefix("| "): cells[1] for cells in rows[1:]}
    assert list(ranks) == [
        "disagreement", "edges", "entropy", "spread of 4 sampled decodings", "all predictors but the spread, fitted"
    ]  # fmt: skip
    assert all(-1 < float(rank) < 1 for rank in ranks.values())


def test_a_bundle_is_fitted_and_measured(bundle: Path, split: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    data = write_brats_folder(tmp_path / "data", 3, (40, 36, 6), ("t2",))
    fit = fitted(data, split, bundle)
    assert "Section validation of the split by split.json: BraTS_00001." in fit
    assert "| edges |" in fit
    assert "| entropy |" not in fit  # an estimator has no tokens
    assert "sampled decodings" not in fit
    calibration.main(
        str(data),
        str(bundle),
        str(tmp_path / "o"),
        every=2,
        split_file=split,
        num_slices=4,
        device="cpu",
    )
    table = (tmp_path / "o" / "calibration.md").read_text(encoding="utf-8")
    assert "Section test of the split by split.json: BraTS_00002." in table
    assert "- One in 2 of the 4 slices of a volume, 2 in all; inside the body." in table
    for title in ("BraTS_00002 t2", "all", "all, 10 bits", "all, noise 0.03", "all, not blurred"):
        assert f"| {title} |" in table
    assert (tmp_path / "o" / f"{bundle.name}_calibration.png").is_file()


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miar_monai.cli.fit_uncertainty.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"install it with pip install miar-monai\[bench\]"):
        fit_error_model([])
