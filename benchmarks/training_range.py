"""What a bundle was trained on, in numbers that an input can be compared with.

    python -m benchmarks.training_range --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        [--contrasts t1,t2] ...

It looks at the whole volumes of the training patients, degraded as the bundle does it, and prints the
``training_range`` of its ``metadata.json``: lowest and highest in-plane spacing of the low-resolution voxels, and of
the minimum and the maximum of a volume after the preprocessing of ``inference.json``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import fire
from monai.transforms import Orientation
from nibabel.affines import voxel_sizes
from tqdm import tqdm

from benchmarks.table import read_config, with_contrasts
from miar_monai.data.io import Volume
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.transforms import LoadVolume, SimulateLowResolution
from miar_monai.transforms.metatensor import metatensor_to_volume


def low_resolution(path: str, degradation: Any) -> Volume:
    """Return a volume in its units, in RAS+, degraded; rows and columns that do not fill an LR voxel are cut off."""
    image = Orientation(axcodes="RAS", labels=None)(LoadVolume()(path))
    scale = int(degradation.scales[0])
    width, height = (size // scale * scale for size in image.shape[1:3])
    lr = SimulateLowResolution(scale, degradation.sigma, degradation.blur_on)(image[:, :width, :height])
    return metatensor_to_volume(lr)


def main(
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    contrasts: str | Sequence[str] | None = None,
    **settings: Any,
) -> None:
    """Print the range of the training volumes.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        contrasts: of a BraTS folder; the bundle's by default.
        settings: keys of the bundle's ``evaluate.json``: split_file, ...
    """
    given = {"dataset_dir": dataset_dir, "section": "training", **settings}
    config = read_config(bundle, with_contrasts(given, contrasts))
    degradation, items = config.get_parsed_content("degradation"), config.get_parsed_content("dataset").data
    preprocessing = read_config(bundle, {}, workflow="inference").get_parsed_content("preprocessing")
    spacings, minima, maxima = [], [], []
    for item in tqdm(items, unit="volume"):
        volume = low_resolution(item["image"], degradation)
        scaled = preprocessing({"image": volume})["image"]
        spacings += voxel_sizes(volume.affine)[:2].tolist()
        minima.append(float(scaled.min()))
        maxima.append(float(scaled.max()))
    found = {"in_plane_spacing_mm": spacings, "minimum": minima, "maximum": maxima}
    print(json.dumps({name: [round(min(x), 3), round(max(x), 3)] for name, x in found.items()}, indent=4))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")  # to stderr
    report_errors_in_one_sentence()
    fire.Fire(main)
