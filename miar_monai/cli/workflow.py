"""Configs and data of a bundle, for commands and benchmarks that need parts of a workflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch import Tensor
from tqdm import tqdm

from miar_monai.errors import ConfigurationError

__all__ = ["SlicePairs", "load_slice_pairs", "patients_note", "read_config", "with_contrasts"]


class SlicePairs(NamedTuple):
    """The low- and high-resolution slices of one volume.

    Attributes:
        subject: the patient.
        contrast: of an MRI data set, such as ``"t2"``.
        lr: (N, 1, h, w), in network intensities.
        hr: (N, 1, H, W), in network intensities.
    """

    subject: str
    contrast: str | None
    lr: Tensor
    hr: Tensor


def read_config(bundle: str, settings: Mapping[str, Any], *overlays: Path, workflow: str = "evaluate") -> ConfigParser:
    """Read a config of a bundle without instantiating anything.

    Args:
        bundle: folder of the bundle.
        settings: values that replace those of keys of the config.
        overlays: configs that are merged into it first.
        workflow: name of the config.

    Raises:
        ConfigurationError: if the config or one of the keys does not exist.
    """
    path = Path(bundle, "configs", f"{workflow}.json")
    if not path.is_file():
        raise ConfigurationError(
            f"{path} does not exist: a bundle folder is needed; call from the repository's folder or give --bundle."
        )
    parser = ConfigParser()
    parser.read_config([path, *overlays])
    parser["bundle_root"] = bundle
    unknown = [key for key in settings if key not in parser]
    if unknown:
        raise ConfigurationError(
            f"{path} has no key {' or '.join(unknown)}: an option of this command or a key of this config is needed; "
            "correct the option."
        )
    for key, value in settings.items():
        parser[key] = value
    return parser


def with_contrasts(settings: Mapping[str, Any], contrasts: str | Sequence[str] | None) -> dict[str, Any]:
    """Return settings that include the contrasts to load from a BraTS folder; None keeps those of the bundle."""
    if contrasts is None:
        return dict(settings)
    return {**settings, "datalist#contrasts": list(ensure_tuple(contrasts))}


def load_slice_pairs(config: ConfigParser) -> list[SlicePairs]:
    """Load the volumes that an ``evaluate.json`` evaluates, degraded as it describes."""
    dataset, volumes = config.get_parsed_content("dataset"), []
    for i in tqdm(range(len(dataset)), desc="loading", unit="volume"):
        item = dataset[i]
        lr, hr = (item[key].as_tensor().movedim(-1, 0).contiguous() for key in ("image", "label"))
        volumes.append(SlicePairs(item["subject"], item.get("contrast"), lr, hr))
    return volumes


def patients_note(config: ConfigParser, volumes: Sequence[SlicePairs]) -> str:
    """Return a sentence that names the section of the split and its patients."""
    split = config["split_file"]
    by = f"the split by {Path(split).name}" if split else f"the split by seed {config.get_parsed_content('seed')}"
    patients = ", ".join(dict.fromkeys(volume.subject for volume in volumes))
    return f"Section {config.get_parsed_content('section')} of {by}: {patients}."
