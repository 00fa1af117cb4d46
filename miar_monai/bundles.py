"""What the bundles need around their configs: where they are, checks of their switches, and their zip files.

``python -m miar_monai.bundles build`` makes one zip file a bundle, as MONAI's model zoo does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

from miar_monai.errors import CheckpointError, ConfigurationError, SettingError, report_errors_in_one_sentence
from miar_monai.files import whole_file

__all__ = [
    "MODELS",
    "WEIGHTS_PACKAGE",
    "build",
    "build_zip",
    "bundle_files",
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

_TIMESTAMP = (2022, 5, 20, 0, 0, 0)  # the model zoo's: equal contents give equal bytes
_SHIPPED = ("LICENSE", "configs/*", "docs/*", "models/model.pt")

MODELS = ("brats", "lidc")
"""Short names of the bundles ``miar_brats`` and ``miar_lidc``."""

WEIGHTS_PACKAGE = "miar-monai-bundles"
"""Name of the package with both bundles; ``make dist`` builds its wheel from ``bundles/``."""


def find_bundle(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle.

    The wheel of the code holds no bundles. A short name is looked for

    1. in the folder that the environment variable ``MIAR_BUNDLES`` names, and with that variable nowhere else;
    2. in ``bundles/`` beside the package, where a clone of the repository has it;
    3. in the installed package ``miar-monai-bundles``.

    Args:
        model: a short name among `MODELS`, or the folder of a bundle (``./brats`` if its name is a short name too).
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
    known = str(model) in MODELS
    places = _places(f"miar_{model}") if known else {"the given folder": Path(model)}
    for origin, folder in places.items():
        config = folder / "configs" / "inference.json"
        if config.is_file():
            return folder, origin
    advice = "set MIAR_BUNDLES to the folder that holds miar_brats and miar_lidc, or give the folder of the bundle."
    if not known:
        advice = f"give the folder of a bundle, or a name among {', '.join(MODELS)}."
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
    places = {"the repository": Path(__file__).parents[1] / "bundles" / bundle}
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


def bundle_files(bundle: str | os.PathLike[str]) -> list[Path]:
    """Return what belongs to a bundle, sorted: license, configs, documents and the weights.

    Raises:
        ConfigurationError: if the folder is not a bundle.
        CheckpointError: if the weights are missing.
    """
    bundle = Path(bundle)
    if not (bundle / "configs" / "metadata.json").is_file():
        raise ConfigurationError(
            f"{bundle} holds no configs/metadata.json: the folder of a bundle is needed; "
            "call from the repository's folder, or give --bundles."
        )
    if not weights_path(bundle).is_file():
        raise CheckpointError(
            f"{bundle} has no models/model.pt: a bundle is given away with its weights; train it (see its "
            "docs/README.md) and copy model.pt from the output folder to models/."
        )
    return sorted(path for pattern in _SHIPPED for path in bundle.glob(pattern) if path.is_file())


def build_zip(
    bundle: str | os.PathLike[str], output: str | os.PathLike[str] = "dist", overwrite: bool = False
) -> Path:
    """Write ``<name>_v<version>.zip`` with one top folder ``<name>``; equal contents give equal bytes.

    Args:
        bundle: folder of the bundle.
        output: folder of the zip file; made if needed.
        overwrite: replace an existing file.

    Returns:
        The path of the zip file.

    Raises:
        ConfigurationError: if the folder is not a bundle.
        CheckpointError: if the weights are missing.
        OutputError: if the file exists or cannot be written.
    """
    bundle = Path(bundle).resolve()
    files = bundle_files(bundle)
    path = Path(output, f"{bundle.name}_v{metadata(bundle)['version']}.zip")
    with whole_file(path, overwrite) as part, zipfile.ZipFile(part, "w") as archive:
        for file in files:
            info = zipfile.ZipInfo(f"{bundle.name}/{file.relative_to(bundle).as_posix()}", _TIMESTAMP)
            info.external_attr = 0o644 << 16
            info.create_system = 3  # Unix, wherever it is built
            archive.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    return path


def build(output: str = "dist", bundles: Iterable[str] = ("bundles/miar_brats", "bundles/miar_lidc")) -> None:
    """Build the zip files of the bundles; earlier ones of the same version are replaced.

    A bundle that has no weights yet is named and left out.

    Args:
        output: folder of the zip files.
        bundles: folders of the bundles.
    """
    for bundle in bundles:
        try:
            print(build_zip(bundle, output, overwrite=True))
        except CheckpointError as error:
            logger.warning("left out: %s", error)


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    report_errors_in_one_sentence()
    fire.Fire({"build": build})
