"""Warnings about inputs that differ from the training data, or are doubtful with any model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.bundle_runs import BUNDLES, NAMES
from helpers.phantoms import head, write_dicom_series, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle

from miar_monai.cli.main import main
from miar_monai.data.io import Volume, read_volume, result_description
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError
from miar_monai.inference.acquisition import Acquisition
from miar_monai.inference.bundle import metadata
from miar_monai.inference.input_checks import TrainingDomain, volume_warnings
from miar_monai.inference.passes import plan_passes

CHEST = TrainingDomain("CT", (2.5, 3.0), (0.0, 0.02), (0.9, 1.4))
BRAIN = TrainingDomain("MR", (4.0, 4.0), (0.0, 0.0), (1.0, 1.8))


def volume(array: np.ndarray, modality: str = "", spacing: float = 0.7) -> Volume:
    return Volume(array.astype(np.float32), np.diag([spacing, spacing, 1, 1]), np.dtype(np.int16), Path("x"), modality)


def ct(seed: int = 0) -> np.ndarray:
    """Return a chest: air, lung, fat, muscle and bone in HU, with noise."""
    generator = np.random.default_rng(seed)
    kinds, shares = [-1000, -850, -100, 50, 700], [0.35, 0.25, 0.15, 0.22, 0.03]
    return np.rint(generator.choice(kinds, (40, 30, 5), p=shares) + 15 * generator.standard_normal((40, 30, 5)))


def mr(scale: float = 1000.0) -> np.ndarray:
    return scale * head((40, 30, 5))


@pytest.mark.parametrize("spacing", [0.1, 0.7, 2.75, 9.0])
@pytest.mark.parametrize("modality", ["", "CT"])
def test_a_ct_suits_the_chest_model(spacing: float, modality: str) -> None:
    padded = ct()
    padded[:4] = -3024
    metal = ct()
    metal[20, 15, 2] = 14_000
    for array in (ct(), padded, metal):
        assert CHEST.warnings(volume(array, modality, spacing)) == []


@pytest.mark.parametrize("scale", [0.01, 1.0, 255, 700, 1000, 1300, 2000, 4000, 30_000])
@pytest.mark.parametrize("modality", ["", "MR"])
def test_an_mr_suits_the_brain_model(scale: float, modality: str) -> None:
    for array in (mr(scale), np.rint(mr(scale)), mr(scale) - 0.4 * scale):  # skull-stripped, rounded, standardized
        assert BRAIN.warnings(volume(array, modality)) == []


def test_an_mr_phase_image_is_not_taken_for_a_ct(rng: np.random.Generator) -> None:
    assert BRAIN.warnings(volume(rng.integers(-2048, 2048, (40, 36, 3)))) == []


HU, OFFSET, NOT_HU = (
    "the intensities are those of a CT in HU, but the model was trained on MR.",
    "the intensities are those of a CT in HU + 1024, but the model was trained on MR.",
    "the intensities are not in HU, or were clipped, but the model was trained on HU.",
)


@pytest.mark.parametrize(
    ("array", "modality", "domain", "sentence"),
    [
        (ct(), "", BRAIN, HU),
        (np.where(ct() < -980, -3024, ct()), "", BRAIN, HU),
        (np.maximum(ct() + 1024, 0), "", BRAIN, OFFSET),
        (ct(), "CT", BRAIN, "the modality is CT, but the model was trained on MR."),
        (ct(), "MR", CHEST, "the modality is MR, but the model was trained on CT."),
        (mr(), "", CHEST, f"the darkest voxel is 0, but air in a CT has -1000 HU: {NOT_HU}"),
        (mr(3.0) - 1, "", CHEST, f"the darkest voxel is -1, but air in a CT has -1000 HU: {NOT_HU}"),
        (np.clip(ct(), -160, 240), "CT", CHEST, f"the darkest voxel is -160, but air in a CT has -1000 HU: {NOT_HU}"),
        (
            np.maximum(ct() + 1024, 0), "", CHEST,
            "the darkest voxel is 0, but air in a CT has -1000 HU: the intensities are in HU + 1024 (subtract"
            " 1024), but the model was trained on HU.",
        ),
    ],
)  # fmt: skip
def test_inputs_unlike_the_training_data_cause_a_warning(
    array: np.ndarray, modality: str, domain: TrainingDomain, sentence: str
) -> None:
    assert domain.warnings(volume(array, modality)) == [sentence]


def test_real_scans_are_recognized(real_data: Path) -> None:
    chest = sorted((real_data / "chest").glob("*.nii.gz"))
    brain = [*sorted((real_data / "native").glob("*.nii.gz")), *sorted((real_data / "brain").glob("*/*.nii.gz"))[::5]]
    assert len(chest) > 5
    assert len(brain) > 5
    for path in chest:
        scan = read_volume(path)
        unsigned = scan._replace(array=np.maximum(scan.array, -1024) + 1024)
        assert CHEST.warnings(scan) == []
        assert BRAIN.warnings(scan) == [HU]
        assert BRAIN.warnings(unsigned) == [OFFSET]
        assert "HU + 1024" in CHEST.warnings(unsigned)[0]
    for path in brain:
        scan = read_volume(path)
        assert BRAIN.warnings(scan) == []
        assert NOT_HU in CHEST.warnings(scan)[0]


def test_doubtful_inputs_cause_a_warning() -> None:
    axial = volume(mr())._replace(affine=np.diag([-1.0, 1, 5, 1]))
    assert volume_warnings(axial) == []
    assert volume_warnings(axial._replace(affine=np.diag([1.4, 1, 1, 1]))) == []  # as good as isotropic
    assert [sentence.split(",")[0] for sentence in volume_warnings(axial._replace(affine=np.diag([5.0, 1, 1, 1])))] == [
        "the slices are sagittal"
    ]
    coronal = np.array([[1.0, 0, 0, 0], [0, 0, 4, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert volume_warnings(axial._replace(affine=coronal)) == [
        "the slices are coronal, 4 mm apart: only the axial plane becomes finer, which crosses them; ask for isotropic"
        " voxels, or for a factor or a spacing of each axis."
    ]
    assert volume_warnings(axial._replace(affine=coronal), asked=True) == []
    assert "qform_code and sform_code are 0" in volume_warnings(axial._replace(space=0))[0]
    assert "already a super-resolved image" in volume_warnings(axial._replace(description=result_description()))[0]


def test_only_described_properties_are_compared() -> None:
    for array in (ct(), mr()):
        assert TrainingDomain.of({}).warnings(volume(array, "US")) == []


@pytest.mark.parametrize(
    "content",
    [
        {"training_range": 3},
        {"training_range": {"minimum": [1]}},
        {"training_range": {"maximum": ["low", "high"]}},
        {"training_range": {"minimum": [2, 1]}},
        {"training_range": {"minimum": [float("nan"), 1]}},
        {"network_data_format": []},
    ],
)
def test_malformed_metadata_are_reported(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^the metadata\.json of the bundle cannot be used \("):
        TrainingDomain.of(content)


def test_an_unknown_part_of_the_training_range_is_named() -> None:
    problem = r"\(training_range has 'median', which is none of in_plane_spacing_mm,"
    with pytest.raises(ConfigurationError, match=problem):
        TrainingDomain.of({"training_range": {"median": [1, 2]}})


def sr(bundle: Path, *parts: object) -> Result:
    return CliRunner().invoke(main, ["sr", *map(str, parts), "--model", str(bundle), "--device", "cpu"])


def test_warnings_are_printed_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    bundle, series = write_tiny_bundle(tmp_path / "tiny"), write_dicom_series(tmp_path / "ct", (11, 9, 3))
    report = tmp_path / "run.json"
    result = sr(bundle, series, "-o", tmp_path / "out", "--report", report)
    assert result.exit_code == 0, result.output
    content = json.loads(report.read_text())
    (case,) = content["cases"]
    assert case["modality"] == "CT"
    assert case["warnings"][0] == "the modality is CT, but the model was trained on MR."
    assert "4 mm" not in result.stderr  # every real scan has smaller voxels
    assert [f"warning: {sentence}" in result.stderr for sentence in case["warnings"]] == [True] * len(case["warnings"])
    assert "the axial slices have 11 x 9 voxels, but at least 32 x 32 are needed" in "\n".join(case["warnings"])
    assert content["model"]["trained_on"]["in_plane_spacing_mm"] == [1, 8]
    assert "maximum_after_preprocessing" in content["model"]["trained_on"]
    quiet = sr(bundle, series, "-o", tmp_path / "out", "--overwrite", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_damaged_metadata_stop_the_command_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    bundle = write_tiny_bundle(tmp_path / "tiny")
    scan = write_nifti_phantom(tmp_path / "scan.nii", (11, 9, 3))
    (bundle / "configs" / "metadata.json").write_text("[" * 100_000)
    result = sr(bundle, scan, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "metadata.json cannot be read" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_bundles_describe_their_training_data(name: str) -> None:
    domain = TrainingDomain.of(metadata(BUNDLES / name))
    assert domain.modality == {"miar_brats": "MR", "miar_lidc": "CT"}[name]
    for low, high in (domain.in_plane_spacing_mm, domain.minimum, domain.maximum):  # type: ignore[misc]
        assert low <= high
    assert json.loads(json.dumps(domain.as_dict()))["modality"] == domain.modality


@pytest.mark.parametrize(
    ("factors", "thick", "expected"),
    [
        ((4, 4, 1), "4 x", []),
        ((2, 2, 1), "4 x", ["pixels become 2 x finer, but the model was trained for factors by 4:"]),
        ((1, 1, 5), "4 x", ["slices become 5 x finer, but the model was trained for the axial plane alone:"]),
        ((2, 2, 5), "any", []),
        ((2, 2, 7), "any", ["slices become 7 x finer, but the model was trained for factors from 1.25 to 6:"]),
    ],
)
def test_grids_that_were_not_trained_are_named(
    factors: tuple[float, float, float], thick: str, expected: list[str]
) -> None:
    domain = {
        "4 x": TrainingDomain(in_plane_factor=(4, 4)),
        "any": TrainingDomain(in_plane_factor=(1.25, 8), through_plane_factor=(1.25, 6)),
    }[thick]
    plan = plan_passes(factors, (1, 1, 6), lambda _: Degradation(factors[:2]), Acquisition(2, 6.0, 6.0))
    sentences = domain.grid_warnings(plan)
    assert [sentence.startswith(start) for sentence, start in zip(sentences, expected, strict=True)] == [True] * len(
        expected
    )
    assert TrainingDomain().grid_warnings(plan) == []
