from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.bundle_runs import BUNDLES, NAMES, TOKENS
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle

from miar_monai.cli.main import main
from miar_monai.cli.training_range import _degradations, _factors
from miar_monai.cli.workflow import read_config
from miar_monai.data.io import read_volume
from miar_monai.degradation import Degradation
from miar_monai.inference.input_checks import TrainingDomain
from miar_monai.transforms import ScaleIntensityRobust


def test_a_network_for_one_factor_has_its_range(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", TOKENS)
    for name, spacing in (("a", 0.5), ("b", 0.8), ("c", 9)):
        affine = np.diag([spacing, spacing, 2, 1])
        write_nifti_phantom(tmp_path / "data" / f"{name}.nii.gz", (41, 36, 4), affine, low=-1000, high=400)
    (tmp_path / "split.json").write_text(json.dumps({"training": ["a", "b"], "validation": ["c"], "test": []}))
    options = ["--model", str(bundle), "--split-file", str(tmp_path / "split.json")]
    result = CliRunner().invoke(main, ["training-range", str(tmp_path / "data"), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == ["in_plane_factor", "in_plane_spacing_mm", "minimum", "maximum"]
    assert found["in_plane_factor"] == [4, 4]
    assert found["in_plane_spacing_mm"] == [2, 3.2]
    assert TrainingDomain.of({"training_range": found}).in_plane_factor == (4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_factors_are_those_of_the_training(name: str) -> None:
    config = read_config(str(BUNDLES / name), {})
    in_plane, through_plane = _factors(_degradations(str(BUNDLES / name), config))
    stated = json.loads((BUNDLES / name / "configs" / "metadata.json").read_text())["training_range"]
    assert stated["in_plane_factor"] == [min(factor for factor in in_plane if factor > 1), max(in_plane)]
    assert stated["through_plane_factor"] == [min(through_plane), max(through_plane)]


@pytest.mark.parametrize(("model", "data", "contrasts"), [("miar_brats", "brain", "t1,t2"), ("miar_lidc", "chest", "")])
@pytest.mark.slow
def test_the_shipped_range_is_measured(model: str, data: str, contrasts: str, real_data: Path) -> None:
    options = ["--model", str(BUNDLES / model), "--split-file", str(real_data / data / "split.json")]
    options += ["--contrasts", contrasts] if contrasts else []
    result = CliRunner().invoke(main, ["training-range", str(real_data / data), *options])
    assert result.exit_code == 0, result.output
    stated = json.loads((BUNDLES / model / "configs" / "metadata.json").read_text())["training_range"]
    assert json.loads(result.stdout) == {key: pytest.approx(value, abs=2e-3) for key, value in stated.items()}


def test_the_range_is_that_of_degraded_training_volumes(tmp_path: Path) -> None:
    data = write_brats_folder(tmp_path / "data", 3, (41, 36, 4), ("t2",))
    split = {"training": ["BraTS_00000", "BraTS_00002"], "validation": ["BraTS_00001"], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    options = ["--model", str(BUNDLES / "miar_brats"), "--split-file", str(tmp_path / "split.json")]
    result = CliRunner().invoke(main, ["training-range", str(data), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    family = json.loads((BUNDLES / "common" / "train_estimator.json").read_text())
    assert found["in_plane_factor"] == found["through_plane_factor"] == [min(family["factors"]), max(family["factors"])]
    assert found["in_plane_spacing_mm"] == [1, max(family["factors"])]  # slices become thick, or pixels coarse
    assert found["minimum"] == pytest.approx([0, 0], abs=0.1)
    maxima = []
    for name in split["training"]:
        hr = read_volume(data / name / f"{name}_t2.nii.gz").array[:40].transpose(2, 0, 1)
        lr = Degradation()(torch.from_numpy(np.ascontiguousarray(hr))).movedim(0, -1)[None]
        maxima.append(float(ScaleIntensityRobust()(lr).max()))
    assert found["maximum"] == pytest.approx([min(maxima), max(maxima)], abs=0.03)
