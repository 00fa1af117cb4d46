"""Locations of the bundles, and checks of their settings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

from miar_monai.errors import ConfigurationError, SettingError

__all__ = [
    "ALIASES",
    "MODELS",
    "WEIGHTS_PACKAGE",
    "check_command_line",
    "check_switches",
    "find_bundle",
    "locate_bundle",
    "metadata",
    "model_facts",
    "model_notes",
    "models",
    "number_or_text",
    "read_json",
    "weights_path",
    "weights_sha256",
]

logger = logging.getLogger(__name__)

MODELS = ("brats", "lidc")
"""Short names of the shipped bundles ``miar_brats`` and ``miar_lidc``, after their training data."""

ALIASES = {"brain_mri": "brats", "chest_ct": "lidc"}
"""Names of the shipped bundles by anatomy and modality."""

WEIGHTS_PACKAGE = "miar-monai-bundles"
"""Name of the package with both bundles; ``make dist`` builds its wheel from ``bundles/``."""


def find_bundle(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle.

    The bundle of the model ``brats`` is the folder ``miar_brats`` in the first of these places that has it; likewise
    for ``lidc`` and for bundles added there:

    1. the folder in the environment variable ``MIAR_BUNDLES``; if it is set, the only place;
    2. ``bundles/`` next to the package, in a clone of the repository;
    3. the installed package ``miar-monai-bundles``.

    Args:
        model: a name in `models` or `ALIASES`, or the folder of a bundle (``./brats`` for a folder with the name of a
            model). The configs of a bundle can run Python code: only use bundles that you trust.

    Raises:
        SettingError: if the bundle does not exist.
    """
    return locate_bundle(model)[0]


def locate_bundle(model: str | os.PathLike[str]) -> tuple[Path, str]:
    """Return the folder of a bundle, see `find_bundle`, and a phrase for its origin.

    Raises:
        SettingError: if the bundle does not exist.
    """
    name = ALIASES.get(str(model), str(model))
    places = {origin: home / f"miar_{name}" for origin, home in _homes().items()} if name.isidentifier() else {}
    if name not in MODELS:
        places["the given folder"] = Path(model)
    for origin, folder in places.items():
        config = folder / "configs" / "inference.json"
        if config.is_file():
            return folder, origin
    if name not in MODELS:
        advice = f"give the folder of a bundle, or a name among {', '.join([*ALIASES, *models()])}."
    elif "MIAR_BUNDLES" in places:
        advice = "set MIAR_BUNDLES to the folder that holds miar_brats and miar_lidc, or give the folder of the bundle."
    else:
        raise SettingError(
            f"the weights of the model {model} are not installed: the package {WEIGHTS_PACKAGE} is needed; install its "
            "wheel (make dist in the repository builds it), set MIAR_BUNDLES to the folder that holds miar_brats and "
            "miar_lidc, or give the folder of the bundle."
        )
    raise SettingError(f"{config} does not exist: the folder of a bundle is needed; {advice}")


def models() -> list[str]:
    """Return the short names of the shipped bundles, and of other ``miar_<name>`` folders next to them.

    Example:
        >>> models()
        ['brats', 'lidc']
    """
    configs = [path for home in _homes().values() for path in home.glob("miar_*/configs/inference.json")]
    return [*MODELS, *sorted({path.parents[1].name.removeprefix("miar_") for path in configs} - {*MODELS})]


def _homes() -> dict[str, Path]:
    """Return the folders that can hold bundles, by their origin, in the order of precedence."""
    if home := os.environ.get("MIAR_BUNDLES"):
        return {"MIAR_BUNDLES": Path(home)}
    homes = {"the repository": Path(__file__).parents[2] / "bundles"}
    with suppress(PackageNotFoundError):
        package = distribution(WEIGHTS_PACKAGE)
        homes[f"{WEIGHTS_PACKAGE} {package.version}"] = Path(str(package.locate_file("miar_monai_bundles")))
    return homes


def weights_path(bundle: Path) -> Path:
    """Return the path of the weights of a bundle."""
    return bundle / "models" / "model.pt"


def weights_sha256(weights: Path) -> str:
    """Return the SHA-256 of a file of weights, in hexadecimal."""
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def metadata(bundle: Path) -> dict[str, Any]:
    """Return a bundle's ``metadata.json``, see `read_json`."""
    return read_json(bundle / "configs" / "metadata.json")


def model_facts(model: Mapping[str, Any]) -> dict[str, str]:
    """Return what pages say of a model, by name.

    Args:
        model: its ``weights_sha256``, and ``name`` and ``version`` if it is that of a bundle.

    Example:
        >>> model_facts({"name": "Chest CT (MIAR)", "version": "0.1.0", "weights_sha256": "82801a52"})
        {'Model': 'Chest CT (MIAR), version 0.1.0', 'Weights (SHA-256)': '82801a52'}
        >>> model_facts({"weights_sha256": "82801a52"})
        {'Weights (SHA-256)': '82801a52'}
    """
    named = {"Model": f"{model['name']}, version {model['version']}"} if "name" in model else {}
    return {**named, "Weights (SHA-256)": str(model["weights_sha256"])}


def model_notes(bundle: str | os.PathLike[str], weights: str | os.PathLike[str]) -> list[str]:
    """Return the `model_facts` of a bundle with these weights, its own or others, as notes of a page of results.

    Args:
        bundle: folder of the bundle; without ``configs/metadata.json``, only the weights are named.
        weights: file of the weights.
    """
    has_name = Path(bundle, "configs", "metadata.json").is_file()
    about = metadata(Path(bundle)) if has_name else {}
    facts = model_facts({**about, "weights_sha256": weights_sha256(Path(weights))})
    return [f"{name}: {text}" for name, text in facts.items()]


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a bundle.

    Raises:
        ConfigurationError: if it is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): a JSON object is needed; restore it.") from error
    return content


def check_switches(**switches: object) -> None:
    """Check that switches are booleans.

    `monai.bundle` parses ``--overwrite false`` as a string, and a non-empty string counts as true.

    Args:
        switches: values by name.

    Raises:
        SettingError: if one is neither True nor False.

    Example:
        >>> check_switches(resume=True, amp=False)
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise SettingError(
                f"{name} is {value!r}, but it must be True or False; on the command line give --{name} True or "
                f"--{name} False, with a capital letter."
            )


def check_command_line(argv: Sequence[str] | None = None) -> None:
    """Check that the configs have every setting in a ``python -m monai.bundle run`` command, as MONAI ignores others.

    Args:
        argv: the command, that of this process by default; other commands are not checked.

    Raises:
        SettingError: if the configs lack a setting.

    Example:
        >>> check_command_line(["miar", "sr", "scan.nii.gz", "--blurr", "1"])
    """
    from inspect import signature

    from fire.parser import DefaultParseValue
    from monai.bundle import ConfigParser, run

    words = list(sys.argv if argv is None else argv)
    words = words[: words.index("--")] if "--" in words else words  # the rest is for Fire
    if not (Path(words[0]).as_posix().endswith("monai/bundle/__main__.py") and words[1:2] == ["run"]):
        return
    options = [word.removeprefix("--").partition("=") for word in words if word.startswith("--")]
    following = dict(pairwise(words))
    files = [value or following.get("--config_file") for name, _, value in options if name == "config_file"]
    if not files or files[-1] is None:
        return  # they are in an arguments file, or missing, which MONAI reports
    config = ConfigParser.load_config_files(DefaultParseValue(files[-1]))
    known = {*config, *signature(run).parameters}
    for name, _, _ in options:
        top = name.replace("::", "#").split("#")[0].replace("-", "_")  # as Fire does
        if top not in known:
            close = get_close_matches(top, sorted(known), 1)
            hint = f"the closest is {close[0]!r}" if close else f"its settings are {', '.join(sorted(config))}"
            raise SettingError(f"{files[-1]} has no setting {top!r}: {hint}; correct the command.")


def number_or_text(value: str | None) -> float | str | None:
    """Convert text to a number if possible; settings such as ``blur`` take a number or a word.

    Example:
        >>> number_or_text("0.8"), number_or_text("auto")
        (0.8, 'auto')
    """
    try:
        return None if value is None else float(value)
    except ValueError:
        return value
