"""What the bundles need around their configs: where they are, and checks of their switches."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
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
    "number_or_text",
    "weights_path",
    "weights_sha256",
]

logger = logging.getLogger(__name__)


MODELS = ("brats", "lidc")
"""Short names of the bundles ``miar_brats`` and ``miar_lidc``, after the data that they were trained on."""

ALIASES = {"brain_mri": "brats", "chest_ct": "lidc"}
"""The same models by what they are for."""

WEIGHTS_PACKAGE = "miar-monai-bundles"
"""Name of the package with both bundles; ``make dist`` builds its wheel from ``bundles/``."""


def find_bundle(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle.

    The wheel of the code holds no bundles. A short name is looked for

    1. in the folder that the environment variable ``MIAR_BUNDLES`` names, and with that variable nowhere else;
    2. in ``bundles/`` beside the package, where a clone of the repository has it;
    3. in the installed package ``miar-monai-bundles``.

    Args:
        model: a name among `MODELS` or `ALIASES`, or the folder of a bundle (``./brats`` if its name is one of these).
            The configs of a bundle hold Python expressions: use bundles that you trust.

    Raises:
        SettingError: if there is no bundle.
    """
    return locate_bundle(model)[0]


def locate_bundle(model: str | os.PathLike[str]) -> tuple[Path, str]:
    """Return the folder of a bundle, see `find_bundle`, and where it comes from, in words.

    Raises:
        SettingError: if there is no bundle.
    """
    name = ALIASES.get(str(model), str(model))
    known = name in MODELS
    places = _places(f"miar_{name}") if known else {"the given folder": Path(model)}
    for origin, folder in places.items():
        config = folder / "configs" / "inference.json"
        if config.is_file():
            return folder, origin
    advice = "set MIAR_BUNDLES to the folder that holds miar_brats and miar_lidc, or give the folder of the bundle."
    if not known:
        advice = f"give the folder of a bundle, or a name among {', '.join([*ALIASES, *MODELS])}."
    elif "MIAR_BUNDLES" not in places:
        raise SettingError(
            f"no weights of the model {model} are installed: the package {WEIGHTS_PACKAGE} is needed; install its "
            f"wheel (make dist in the repository builds it), {advice}"
        )
    raise SettingError(f"{config} does not exist: the folder of a bundle is needed; {advice}")


def _places(bundle: str) -> dict[str, Path]:
    """Return the folders where a bundle of this project may be, by their origin, in the order of precedence."""
    if home := os.environ.get("MIAR_BUNDLES"):
        return {"MIAR_BUNDLES": Path(home, bundle)}
    places = {"the repository": Path(__file__).parents[2] / "bundles" / bundle}
    with suppress(PackageNotFoundError):
        package = distribution(WEIGHTS_PACKAGE)
        folder = Path(str(package.locate_file("miar_monai_bundles")), bundle)
        places[f"{WEIGHTS_PACKAGE} {package.version}"] = folder
    return places


def weights_path(bundle: Path) -> Path:
    """Return where a bundle keeps its weights."""
    return bundle / "models" / "model.pt"


def weights_sha256(bundle: Path) -> str:
    """Return the SHA-256 of a bundle's weights, in hexadecimal."""
    digest = hashlib.sha256()
    with weights_path(bundle).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def metadata(bundle: Path) -> dict[str, Any]:
    """Return a bundle's ``metadata.json``.

    Raises:
        ConfigurationError: if it is missing or no JSON object.
    """
    path = bundle / "configs" / "metadata.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): a JSON object is needed; restore it.") from error
    return content


def check_switches(**switches: object) -> None:
    """Check that switches are on or off, as JSON and Python say it.

    On the command line ``--overwrite false`` is a text to `monai.bundle`, and every text counts as true.

    Args:
        switches: values by name.

    Raises:
        ConfigurationError: if one is neither True nor False.

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
    """Check that ``python -m monai.bundle run`` is given no setting that no config has, which it takes without a word.

    Args:
        argv: the words of the command, those of this process by default; of another command nothing is checked.

    Raises:
        SettingError: if a name is none of the configs'.

    Example:
        >>> check_command_line(["miar", "sr", "scan.nii.gz", "--blurr", "1"])
    """
    from inspect import signature

    from fire.parser import DefaultParseValue
    from monai.bundle import ConfigParser, run

    words = list(sys.argv if argv is None else argv)
    words = words[: words.index("--")] if "--" in words else words  # what follows is for Fire
    if not (Path(words[0]).as_posix().endswith("monai/bundle/__main__.py") and words[1:2] == ["run"]):
        return
    options = [word.removeprefix("--").partition("=") for word in words if word.startswith("--")]
    following = dict(pairwise(words))
    files = [value or following.get("--config_file") for name, _, value in options if name == "config_file"]
    if not files or files[-1] is None:
        return  # they are in a file of arguments, or missing, which MONAI says
    config = ConfigParser.load_config_files(DefaultParseValue(files[-1]))
    known = {*config, *signature(run).parameters}
    for name, _, _ in options:
        top = name.replace("::", "#").split("#")[0].replace("-", "_")  # as Fire does
        if top not in known:
            close = get_close_matches(top, sorted(known), 1)
            hint = f"{close[0]!r} may be meant" if close else f"there are {', '.join(sorted(config))}"
            raise SettingError(f"there is no setting {top!r} in {files[-1]}: {hint}; correct the command.")


def number_or_text(value: str | None) -> float | str | None:
    """Return a number where a text is one; a setting such as ``blur`` can be either.

    Example:
        >>> number_or_text("0.8"), number_or_text("auto")
        (0.8, 'auto')
    """
    try:
        return None if value is None else float(value)
    except ValueError:
        return value
