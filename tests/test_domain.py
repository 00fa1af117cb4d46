"""What an input is compared with, and what is said where it is unlike it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, NAMES
from click.testing import CliRunner, Result
from phantoms import write_brats_folder, write_dicom_series, write_nifti_phantom
from tiny_bundle import write_tiny_bundle

from benchmarks import training_range
from miar_monai.app import main
from miar_monai.bundles import metadata
from miar_monai.degradation import Degradation
from miar_monai.domain import TrainingDomain, oddities
from miar_monai.errors import ConfigurationError
from miar_monai.io import Volume, read_volume, what_it_is
from miar_monai.transforms import ScaleIntensityRobust

pytestmark = [
    pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
]

CHEST = TrainingDomain("CT", (2.5, 3.0), (0.0, 0.02), (0.9, 1.4))


def volume(low: float, high: float, spacing: float, modality: str = "") -> Volume:
    array = np.linspace(low, high, 60, dtype=np.float32).reshape(5, 4, 3)
    return Volume(array, np.diag([1.0, spacing, spacing, 1]), np.dtype(np.int16), Path("x"), modality)


def warnings(input: Volume, domain: TrainingDomain = CHEST) -> list[str]:
    """Compare a CT, whose slices lie along the first axis, as the chest bundle sees it."""
    turned = input._replace(affine=input.affine[[2, 1, 0, 3]])
    return domain.warnings(turned, (input.array + 1024) / 2048)


@pytest.mark.parametrize("spacing", [2.3, 2.75, 3.25])
@pytest.mark.parametrize("modality", ["", "CT"])
def test_an_input_like_those_of_the_training_is_passed(spacing: float, modality: str) -> None:
    assert warnings(volume(-1050, 1600, spacing, modality)) == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((-1024, 1600, 2.75, "MR"), "the modality is MR, but the model was trained on CT."),
        (
            (-1024, 1600, 0.7, "CT"),
            "the axial voxels are 0.7 x 0.7 mm, but those of the training were 2.5 to 3 mm: structures of this size"
            " are new to the model.",
        ),
        (
            (0, 1600, 2.75, "CT"),
            "the darkest voxel is 0, but in the volumes of the training it was -1024 to -983: such intensities are new"
            " to the model, or in other units.",
        ),
        (
            (-1024, 4096, 2.75, "CT"),
            "the brightest voxel is 4096, but in the volumes of the training it was 819.2 to 1843: such intensities"
            " are new to the model, or in other units.",
        ),
    ],
)
def test_an_input_that_is_not_is_named(given: Any, sentence: str) -> None:
    assert warnings(volume(*given)) == [sentence]


def test_what_makes_a_result_doubtful_is_named() -> None:
    axial = volume(0, 1, 1)._replace(affine=np.diag([-1.0, 1, 5, 1]))
    assert oddities(axial) == []
    assert oddities(axial._replace(affine=np.diag([1.4, 1, 1, 1]))) == []  # as good as isotropic
    assert [sentence.split(",")[0] for sentence in oddities(axial._replace(affine=np.diag([5.0, 1, 1, 1])))] == [
        "the slices are sagittal"
    ]
    coronal = np.array([[1.0, 0, 0, 0], [0, 0, 4, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert oddities(axial._replace(affine=coronal)) == [
        "the slices are coronal, 4 mm apart: it is the axial plane that becomes finer, which cuts across them; give an"
        " axial series."
    ]
    assert "qform_code and sform_code are 0" in oddities(axial._replace(space=0))[0]
    assert "is a result itself" in oddities(axial._replace(description=what_it_is()))[0]


def test_what_the_metadata_do_not_say_is_not_compared() -> None:
    assert warnings(volume(5, 9000, 77, "US"), TrainingDomain.of({})) == []


@pytest.mark.parametrize(
    "content",
    [
        {"training_range": 3},
        {"training_range": {"minimum": [1]}},
        {"training_range": {"maximum": ["low", "high"]}},
        {"training_range": {"median": [1, 2]}},
        {"network_data_format": []},
    ],
)
def test_damaged_metadata_are_named(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^the metadata\.json of the bundle cannot be used \("):
        TrainingDomain.of(content)


def sr(bundle: Path, *parts: object) -> Result:
    return CliRunner().invoke(main, ["sr", *map(str, parts), "--model", str(bundle), "--device", "cpu"])


def test_the_command_warns_and_the_report_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    bundle, series = write_tiny_bundle(tmp_path / "tiny"), write_dicom_series(tmp_path / "ct", (11, 9, 3))
    report = tmp_path / "run.json"
    result = sr(bundle, series, "-o", tmp_path / "out", "--report", report)
    assert result.exit_code == 0, result.output
    content = json.loads(report.read_text())
    (case,) = content["cases"]
    assert case["modality"] == "CT"
    assert case["warnings"][0] == "the modality is CT, but the model was trained on MR."
    assert case["warnings"][1].startswith("the axial voxels are 0.8 x 0.9 mm, but those of the training were 4 mm")
    assert [f"warning: {sentence}" in result.stderr for sentence in case["warnings"]] == [True] * len(case["warnings"])
    assert "the axial slices have 11 x 9 voxels, and a blur is measured in 32" in "\n".join(case["warnings"])
    assert content["model"]["trained_on"]["in_plane_spacing_mm"] == [4, 4]
    assert "maximum_after_preprocessing" in content["model"]["trained_on"]
    quiet = sr(bundle, series, "-o", tmp_path / "out", "--overwrite", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_damaged_metadata_stop_the_command_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    bundle = write_tiny_bundle(tmp_path / "tiny")
    scan = write_nifti_phantom(tmp_path / "scan.nii", (11, 9, 3))
    (bundle / "configs" / "metadata.json").write_text("[" * 100_000)
    result = sr(bundle, scan, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "metadata.json cannot be read" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_range_of_the_training_is_measured_on_degraded_volumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_brats_folder(tmp_path / "data", 3, (41, 36, 4), ("t2",))
    split = {"training": ["BraTS_00000", "BraTS_00002"], "validation": ["BraTS_00001"], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    training_range.main(str(data), str(BUNDLES / "miar_brats"), split_file=str(tmp_path / "split.json"))
    found = json.loads(capsys.readouterr().out)
    assert found["in_plane_spacing_mm"] == [4, 4]
    assert found["minimum"] == pytest.approx([0, 0], abs=0.1)
    maxima = []
    for name in split["training"]:
        hr = read_volume(data / name / f"{name}_t2.nii.gz").array[:40].transpose(2, 0, 1)
        lr = Degradation()(torch.from_numpy(np.ascontiguousarray(hr))).movedim(0, -1)[None]
        maxima.append(float(ScaleIntensityRobust()(lr).max()))
    assert found["maximum"] == pytest.approx([min(maxima), max(maxima)], abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_bundles_say_what_they_were_trained_on(name: str) -> None:
    domain = TrainingDomain.of(metadata(BUNDLES / name))
    assert domain.modality == {"miar_brats": "MR", "miar_lidc": "CT"}[name]
    for low, high in (domain.in_plane_spacing_mm, domain.minimum, domain.maximum):  # type: ignore[misc]
        assert low <= high
    assert json.loads(json.dumps(domain.as_dict()))["modality"] == domain.modality
