"""``miar training-range``: the range of spacings and intensities of the training volumes of a bundle."""

from __future__ import annotations

from typing import Any

from monai.bundle import ConfigParser
from monai.transforms import Orientation
from nibabel.affines import voxel_sizes
from tqdm import tqdm

from miar_monai.cli.workflow import read_config
from miar_monai.data.io import Volume
from miar_monai.transforms import LoadVolume, SimulateLowResolution
from miar_monai.transforms.metatensor import metatensor_to_volume

__all__ = ["training_range"]


def training_range(bundle: str, config: ConfigParser) -> dict[str, list[float]]:
    """Measure the ``training_range`` of a bundle's ``metadata.json``, with which inputs are compared at inference.

    The training volumes are degraded as a whole, by the degradation of the bundle.

    Args:
        bundle: folder of the bundle.
        config: its ``evaluate.json``, with the section ``training``.

    Returns:
        Lowest and highest values: in-plane spacing of the LR voxels, and minimum and maximum of an LR volume after the
        preprocessing of ``inference.json``.
    """
    degradation, items = config.get_parsed_content("degradation"), config.get_parsed_content("dataset").data
    preprocessing = read_config(bundle, {}, workflow="inference").get_parsed_content("preprocessing")
    spacings, minima, maxima = [], [], []
    for item in tqdm(items, unit="volume"):
        volume = _low_resolution(item["image"], degradation)
        scaled: Any = preprocessing({"image": volume})["image"]
        spacings += voxel_sizes(volume.affine)[:2].tolist()
        minima.append(float(scaled.min()))
        maxima.append(float(scaled.max()))
    ranges = {"in_plane_spacing_mm": spacings, "minimum": minima, "maximum": maxima}
    return {name: [round(min(values), 3), round(max(values), 3)] for name, values in ranges.items()}


def _low_resolution(path: str, degradation: Any) -> Volume:
    """Return a degraded volume in its own units, in RAS+; rows and columns that do not fill an LR voxel are cropped."""
    image = Orientation(axcodes="RAS", labels=None)(LoadVolume()(path))
    scale = int(degradation.scales[0])
    width, height = (size // scale * scale for size in image.shape[1:3])
    lr: Any = SimulateLowResolution(scale, degradation.sigma, degradation.blur_on)(image[:, :width, :height])
    return metatensor_to_volume(lr)
