"""Configs and zip files of the bundles, as in MONAI's model zoo: ``python -m miar_monai.cli.build_bundles``."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

from miar_monai.cli.compose_configs import write_configs
from miar_monai.data.atomic_write import atomic_file
from miar_monai.errors import CheckpointError, ConfigurationError, report_errors_in_one_sentence
from miar_monai.inference.bundle import metadata, weights_path

__all__ = ["build", "build_zip", "bundle_files", "render"]

logger = logging.getLogger(__name__)

_TIMESTAMP = (2022, 5, 20, 0, 0, 0)  # that of the model zoo, so that equal contents give equal bytes
_SHIPPED = ("LICENSE", "configs/*", "docs/*", "models/model.pt")


def bundle_files(bundle: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a bundle to ship, sorted: license, configs, documents and weights.

    Raises:
        ConfigurationError: if the folder is not a bundle.
        CheckpointError: if the weights are missing.
    """
    bundle = Path(bundle)
    if not (bundle / "configs" / "metadata.json").is_file():
        raise ConfigurationError(
            f"{bundle} has no configs/metadata.json: the folder of a bundle is needed; correct the folder, or run "
            "make bundles if it has a source.json."
        )
    if not weights_path(bundle).is_file():
        raise CheckpointError(
            f"{bundle} has no models/model.pt: a bundle is shipped with its weights; train it (see its "
            "docs/README.md) and copy model.pt from the output folder to models/."
        )
    return sorted(path for pattern in _SHIPPED for path in bundle.glob(pattern) if path.is_file())


def build_zip(bundle: str | os.PathLike[str], output: str | os.PathLike[str] = "dist", overwrite: bool = False) -> Path:
    """Write ``<name>_v<version>.zip`` with one top folder ``<name>``; equal contents give equal bytes.

    Args:
        bundle: folder of the bundle.
        output: folder of the zip file; created if needed.
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
    with atomic_file(path, overwrite) as part, zipfile.ZipFile(part, "w") as archive:
        for file in files:
            info = zipfile.ZipInfo(f"{bundle.name}/{file.relative_to(bundle).as_posix()}", _TIMESTAMP)
            info.external_attr = 0o644 << 16
            info.create_system = 3  # Unix, on every platform
            archive.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    return path


def render(folder: str = "bundles") -> None:
    """Write the configs of the bundles from their sources, see `miar_monai.cli.compose_configs`.

    Args:
        folder: folder of the bundles, with ``common`` and ``<name>/source.json``.
    """
    for source in sorted(Path(folder).glob("*/source.json")):
        for path in write_configs(source.parent):
            print(path)


def build(output: str = "dist", folder: str = "bundles") -> None:
    """Build the zip files of the bundles; earlier ones of the same version are replaced.

    A bundle without weights is skipped with a warning.

    Args:
        output: folder of the zip files.
        folder: folder of the bundles.
    """
    for bundle in sorted(path.parents[1] for path in Path(folder).glob("*/configs/metadata.json")):
        try:
            print(build_zip(bundle, output, overwrite=True))
        except CheckpointError as error:
            logger.warning("skipped: %s", error)


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    report_errors_in_one_sentence()
    fire.Fire({"render": render, "build": build})
