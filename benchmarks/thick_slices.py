"""Thick slices of truly isotropic volumes, for programs and for `benchmarks.through_plane_methods`.

    python -m benchmarks.thick_slices --dataset_dir BraTS --split_file split.json --output_dir runs/thick \
        [--contrasts t1,t2] [--slices 5,0] [--profile slr] [--section test] ...

writes ``<subject>_<contrast>_<profile>_<thickness>_<gap>.nii.gz`` for `benchmarks.run_program`. The slice profile is
that of a Shinnar-Le Roux pulse, as SMORE and ECLARE simulate it, or another one by ``--profile``. A volume counts as
isotropic if it has detail in all three planes, see `miar_monai.data.spectrum.detailed_planes`. With ``--changes
noise0.01,box``, slices are also written that differ from what the methods are told, see `CHANGES`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
from monai.bundle import ConfigParser
from monai.transforms import Compose
from monai.utils import ensure_tuple
from tqdm import tqdm

from benchmarks.common import open_run
from miar_monai.data.datasets import split_by_patient
from miar_monai.data.io import Volume, write_volume
from miar_monai.data.outputs import check_output_folder
from miar_monai.data.spectrum import PLANES, detailed_planes
from miar_monai.data.volume import as_float
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, DatasetError, check_choice, report_errors_in_one_sentence
from miar_monai.inference.acquisition import SLICE_PROFILES
from miar_monai.transforms import CentralSlices
from miar_monai.transforms.degrade import degrade_volume
from miar_monai.transforms.metatensor import metatensor_to_volume, volume_to_metatensor

__all__ = [
    "CHANGES",
    "SLICES",
    "ThickSlices",
    "isotropic_volumes",
    "load_cases",
    "parse_changes",
    "parse_slices",
]

SLICES = ((3.0, 0.0), (4.0, 0.0), (4.0, 1.0), (5.0, 0.0), (5.0, 1.0), (8.0, 0.0))
"""Thickness and gap in millimeters."""

CHANGES: dict[str, dict[str, Any]] = {
    "8bits": {"levels": 2**8},
    "10bits": {"levels": 2**10},
    "noise0.003": {"noise": 0.003},
    "noise0.01": {"noise": 0.01},
    "noise0.02": {"noise": 0.02},
    "slr": {"profile": "slr"},
    "gaussian": {"profile": "gaussian"},
    "box": {"profile": "box"},
    "thinner": {"width": 0.8},
    "thicker": {"width": 1.25},
}
"""Slices that are not as assumed: rounded to levels of their range, with noise of a standard deviation relative to the
range, with another profile, or of another thickness, relative to the assumed one."""


class ThickSlices(NamedTuple):
    """A volume, and its thick axial slices.

    Attributes:
        subject: the patient.
        contrast: of an MRI data set, or ``"ct"``.
        thickness: full width at half maximum of the slice profile in millimeters.
        gap: distance between the slices less their thickness, in millimeters.
        truth: the volume, in RAS orientation, whose height is a multiple of the distance of the slices.
        thick: the slices, with the same field of view.
        change: how they differ from what is assumed, one of `CHANGES`, or empty.
        profile: the assumed slice profile, one of `miar_monai.inference.acquisition.SLICE_PROFILES`.
    """

    subject: str
    contrast: str
    thickness: float
    gap: float
    truth: Volume
    thick: Volume
    change: str = ""
    profile: str = SLICE_PROFILES[0]

    @classmethod
    def of(
        cls,
        subject: str,
        contrast: str,
        thickness: float,
        gap: float,
        volume: Volume,
        change: str = "",
        profile: str = SLICE_PROFILES[0],
    ) -> ThickSlices:
        """Degrade the central part of a volume in RAS orientation, which covers a whole number of slices."""
        factor = (thickness + gap) / float(volume.grid.spacing[2])
        height = round(int(volume.array.shape[2] / factor) * factor)
        truth = metatensor_to_volume(CentralSlices(height)(volume_to_metatensor(volume)))
        settings: dict[str, Any] = {
            "profile": profile,
            "noise": 0.0,
            "width": 1.0,
            "levels": 0,
            **CHANGES.get(change, {}),
        }
        relative = settings["width"] * thickness / (thickness + gap)
        thick = degrade_volume(
            truth, (1, 1, factor), settings["profile"], relative, blur=0, noise=settings["noise"], seed=0
        )
        if settings["levels"]:
            step = float(np.ptp(thick.array)) / (settings["levels"] - 1)
            thick = thick._replace(array=(np.rint(thick.array / step) * step).astype(np.float32))
        return cls(subject, contrast, thickness, gap, truth, thick, change, profile)

    @property
    def name(self) -> str:
        """Name of the files of this volume, without the suffix."""
        change = f"_{self.change}" if self.change else ""
        return f"{self.subject}_{self.contrast}_{self.profile}{change}_{self.thickness:g}_{self.gap:g}"

    @property
    def title(self) -> str:
        """Thickness and gap, and the change, such as ``5‖0`` or ``5‖0, box``."""
        return f"{self.thickness:g}‖{self.gap:g}" + (f", {self.change}" if self.change else "")

    @property
    def degradation(self) -> Degradation:
        """The assumed degradation of sagittal and coronal planes, whose columns are thick."""
        factor = float(self.thick.grid.spacing[2] / self.truth.grid.spacing[2])
        relative = self.thickness / (self.thickness + self.gap)
        return Degradation((1.0, factor), 0.0, profile=("bicubic", self.profile), thickness=(1.0, relative))


def isotropic_volumes(
    config: ConfigParser, subjects: Sequence[str] = (), limit: int | None = None
) -> Iterator[tuple[str, str, Volume]]:
    """Yield patient, contrast and volume, in RAS orientation, of volumes with detail in all three planes.

    Args:
        config: an ``evaluate.json``.
        subjects: patients to use, of any section, isotropic or not; by default those of the config's section.
        limit: largest number of volumes.

    Raises:
        DatasetError: if there is no such volume.
    """
    get = config.get_parsed_content
    items = get("datalist")
    if subjects:
        chosen = [item for item in items if item["subject"] in subjects]
    else:
        chosen = split_by_patient(items, get("section"), seed=get("seed"), split_file=get("split_file"))
    load, found = Compose(get("load_transforms")), 0
    for item in chosen:
        if limit is not None and found == limit:
            return
        volume = metatensor_to_volume(load({"image": item["image"]})["image"])
        if subjects or len(detailed_planes(volume.array, volume.grid.patient_spacing)) == len(PLANES):
            found += 1
            yield item["subject"], item.get("contrast") or "ct", volume
    if not found:
        raise DatasetError(
            f"none of the {len(chosen)} volumes has as much detail across its slices as within them: truly isotropic "
            "volumes are needed; give other subjects, or another section."
        )


def parse_slices(slices: str | Sequence[float] | Sequence[Sequence[float]] | None) -> list[tuple[float, float]]:
    """Return thicknesses and gaps: one pair, several, or None for `SLICES`.

    Raises:
        ConfigurationError: if they are not pairs of a positive and a non-negative number.
    """
    if slices is None:
        return list(SLICES)
    given: Any = ensure_tuple(slices)
    pairs = [tuple(pair) for pair in given] if isinstance(given[0], list | tuple) else [tuple(given)]
    for pair in pairs:
        numbers = all(isinstance(number, int | float) for number in pair)
        if len(pair) != 2 or not numbers or not (pair[0] > 0 and pair[1] >= 0):
            raise ConfigurationError(
                f"slices has {pair}, but a thickness above 0 and a gap of at least 0 in millimeters are needed; give"
                " pairs such as 5,0 or [[5,0],[4,1]]."
            )
    return [(float(thickness), float(gap)) for thickness, gap in pairs]


def parse_changes(changes: str | Sequence[str], profile: str = SLICE_PROFILES[0]) -> list[str]:
    """Return names of `CHANGES`, after an empty one for slices as assumed: one, several, or ``"all"``.

    Args:
        changes: the names.
        profile: the assumed slice profile, which is no change.

    Raises:
        ConfigurationError: if a name is unknown.

    Example:
        >>> parse_changes("box")
        ['', 'box']
    """
    check_choice("profile", profile, SLICE_PROFILES)
    known = [name for name in CHANGES if name != profile]
    names = known if changes == "all" else [str(name) for name in ensure_tuple(changes)]
    if unknown := [name for name in names if name not in known]:
        raise ConfigurationError(
            f"the changes {unknown} are unknown: the known ones are {', '.join(known)}, or all; correct the option."
        )
    return ["", *names]


def load_cases(
    config: ConfigParser,
    slices: Sequence[tuple[float, float]],
    subjects: Sequence[str] = (),
    limit: int | None = None,
    changes: Sequence[str] = ("",),
    profile: str = SLICE_PROFILES[0],
) -> list[ThickSlices]:
    """Return the volumes of a config with each thickness and gap, and each change."""
    volumes = tqdm(isotropic_volumes(config, subjects, limit), desc="loading", unit="volume")
    return [
        ThickSlices.of(subject, contrast, thickness, gap, volume, change, profile)
        for subject, contrast, volume in volumes
        for thickness, gap in slices
        for change in changes
    ]


def main(
    dataset_dir: str | Sequence[str],
    output_dir: str,
    bundle: str = "bundles/miar_brats",
    slices: Any = None,
    subjects: str | Sequence[str] = (),
    contrasts: str | Sequence[str] | None = None,
    limit: int | None = None,
    changes: str | Sequence[str] = (),
    profile: str = SLICE_PROFILES[0],
    **settings: Any,
) -> None:
    """Write thick slices, and print the paths of the files.

    Args:
        dataset_dir: folder of the data, or several folders.
        output_dir: folder of the files.
        bundle: folder of the bundle.
        slices: thickness and gap in millimeters, or several such pairs; `SLICES` by default.
        subjects: patients, isotropic or not; by default those of the section.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        limit: largest number of volumes.
        changes: names of `CHANGES`, or ``"all"``.
        profile: the slice profile, one of `miar_monai.inference.acquisition.SLICE_PROFILES`.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, overwrite, ...
    """
    config, _ = open_run(bundle, dataset_dir, output_dir, contrasts, settings, [])
    check_output_folder(output_dir)
    parsed = parse_changes(changes, profile)
    for case in load_cases(config, parse_slices(slices), ensure_tuple(subjects), limit, parsed, profile):
        path = Path(output_dir, f"{case.name}.nii.gz")
        print(write_volume(path, as_float(case.thick), config.get_parsed_content("overwrite")))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
