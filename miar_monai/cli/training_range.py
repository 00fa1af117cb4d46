"""``miar training-range``: the range of factors, spacings and intensities of the training of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.bundle import ConfigParser
from monai.transforms import Orientation
from nibabel.affines import voxel_sizes
from tqdm import tqdm

from miar_monai.cli.workflow import read_config
from miar_monai.data.io import Volume
from miar_monai.degradation import Degradation
from miar_monai.networks import Estimator
from miar_monai.transforms import LoadVolume, SimulateLowResolution
from miar_monai.transforms.metatensor import metatensor_to_volume

__all__ = ["training_range"]


def training_range(bundle: str, config: ConfigParser) -> dict[str, list[float]]:
    """Measure the ``training_range`` of a bundle's ``metadata.json``, with which inputs are compared at inference.

    Factors and spacings are those of all degradations of the training: of an estimator, the family of its
    ``train_estimator.json``. For the intensities, the volumes are degraded as a whole, by the default degradation of
    the bundle.

    Args:
        bundle: folder of the bundle.
        config: its ``evaluate.json``, with the section ``training``.

    Returns:
        Lowest and highest values: factors above 1 within the axial plane and, if any, across it; in-plane spacing of
        the LR voxels; minimum and maximum of an LR volume after the preprocessing of ``inference.json``.
    """
    in_plane, through_plane = _factors(_degradations(bundle, config))
    degradation, items = config.get_parsed_content("degradation"), config.get_parsed_content("dataset").data
    preprocessing = read_config(bundle, {}, workflow="inference").get_parsed_content("preprocessing")
    spacings, minima, maxima = [], [], []
    for item in tqdm(items, unit="volume"):
        volume = _low_resolution(item["image"], degradation)
        scaled: Any = preprocessing({"image": volume})["image"]
        spacings += np.outer(voxel_sizes(volume.affine)[:2] / degradation.scales, in_plane).ravel().tolist()
        minima.append(float(scaled.min()))
        maxima.append(float(scaled.max()))
    ranges = {
        "in_plane_factor": [factor for factor in in_plane if factor > 1],
        "through_plane_factor": through_plane,
        "in_plane_spacing_mm": spacings,
        "minimum": minima,
        "maximum": maxima,
    }
    return {name: [round(end(values), 3) + 0.0 for end in (min, max)] for name, values in ranges.items() if values}


def _degradations(bundle: str, config: ConfigParser) -> list[Degradation]:
    """Return the degradations of the training: those of the family of an estimator, otherwise that of the bundle."""
    if not isinstance(config.get_parsed_content("network_def"), Estimator):
        return [config.get_parsed_content("degradation")]
    members = read_config(bundle, {}, workflow="train_estimator").get_parsed_content("family#members")
    return [degradation for degradations, _ in members for degradation in degradations]


def _factors(degradations: Sequence[Degradation]) -> tuple[list[float], list[float]]:
    """Return the factors of axes within the axial plane, also 1, and those of axes with a slice profile, above 1."""
    in_plane, through_plane = [], []
    for one in degradations:
        for factor, profile in zip(one.scales, one.profiles, strict=True):
            if profile == "bicubic":
                in_plane.append(float(factor))
            elif factor > 1:
                through_plane.append(float(factor))
    return in_plane, through_plane


def _low_resolution(path: str, degradation: Any) -> Volume:
    """Return a degraded volume in its own units, in RAS+; rows and columns that do not fill an LR voxel are cropped."""
    image = Orientation(axcodes="RAS", labels=None)(LoadVolume()(path))
    scale = int(degradation.scales[0])
    width, height = (size // scale * scale for size in image.shape[1:3])
    lr: Any = SimulateLowResolution(scale, degradation.sigma, degradation.blur_on)(image[:, :width, :height])
    return metatensor_to_volume(lr)
