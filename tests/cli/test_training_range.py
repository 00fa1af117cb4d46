from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.bundle_runs import BUNDLES
from helpers.phantoms import write_brats_folder

from miar_monai.cli.main import main
from miar_monai.data.io import read_volume
from miar_monai.degradation import Degradation
from miar_monai.transforms import ScaleIntensityRobust


def test_the_range_is_that_of_degraded_training_volumes(tmp_path: Path) -> None:
    data = write_brats_folder(tmp_path / "data", 3, (41, 36, 4), ("t2",))
    split = {"training": ["BraTS_00000", "BraTS_00002"], "validation": ["BraTS_00001"], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    options = ["--model", str(BUNDLES / "miar_brats"), "--split-file", str(tmp_path / "split.json")]
    result = CliRunner().invoke(main, ["training-range", str(data), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["in_plane_spacing_mm"] == [4, 4]
    assert found["minimum"] == pytest.approx([0, 0], abs=0.1)
    maxima = []
    for name in split["training"]:
        hr = read_volume(data / name / f"{name}_t2.nii.gz").array[:40].transpose(2, 0, 1)
        lr = Degradation()(torch.from_numpy(np.ascontiguousarray(hr))).movedim(0, -1)[None]
        maxima.append(float(ScaleIntensityRobust()(lr).max()))
    assert found["maximum"] == pytest.approx([min(maxima), max(maxima)], abs=0.03)
