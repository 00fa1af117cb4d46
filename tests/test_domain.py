"""What an input is compared with, and what is said where it is unlike it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_runs import BUNDLES, NAMES

from miar_monai.bundles import metadata
from miar_monai.domain import TrainingDomain
from miar_monai.errors import ConfigurationError
from miar_monai.io import Volume

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
            "the darkest voxel is 0, but in the volumes of the training it was -1024 to -983: the intensities may be in"
            " other units.",
        ),
        (
            (-1024, 4096, 2.75, "CT"),
            "the brightest voxel is 4096, but in the volumes of the training it was 819.2 to 1843: the intensities may"
            " be in other units.",
        ),
    ],
)
def test_an_input_that_is_not_is_named(given: Any, sentence: str) -> None:
    assert warnings(volume(*given)) == [sentence]


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


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_bundles_say_what_they_were_trained_on(name: str) -> None:
    domain = TrainingDomain.of(metadata(BUNDLES / name))
    assert domain.modality == {"miar_brats": "MR", "miar_lidc": "CT"}[name]
    for low, high in (domain.in_plane_spacing_mm, domain.minimum, domain.maximum):  # type: ignore[misc]
        assert low <= high
    assert json.loads(json.dumps(domain.as_dict()))["modality"] == domain.modality
