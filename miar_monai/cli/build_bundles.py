"""Configs, zip files and Hugging Face repositories of the bundles: ``python -m miar_monai.cli.build_bundles``.

Zip files are those of MONAI's model zoo, repositories are laid out as those of https://huggingface.co/MONAI.
"""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from pathlib import Path

from miar_monai.cli.compose_configs import write_configs
from miar_monai.data.atomic_write import atomic_file, atomic_folder
from miar_monai.errors import CheckpointError, ConfigurationError, report_errors_in_one_sentence
from miar_monai.inference.bundle import metadata, weights_path

__all__ = ["build", "build_repository", "build_zip", "bundle_files", "render"]

logger = logging.getLogger(__name__)

_TIMESTAMP = (2022, 5, 20, 0, 0, 0)  # that of the model zoo, so that equal contents give equal bytes
_SHIPPED = ("LICENSE", "configs/*", "docs/*", "models/model.pt")

_FRONT_MATTER = """---
tags:
- monai
- medical
- super-resolution
library_name: monai
pipeline_tag: image-to-image
license: {license}
---
"""
_GIT_ATTRIBUTES = "*.pt filter=lfs diff=lfs merge=lfs -text\n"  # weights are stored as large files, not in the history


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


def build_repository(
    bundle: str | os.PathLike[str], output: str | os.PathLike[str] = "dist/huggingface", overwrite: bool = False
) -> Path:
    """Write the folder ``<name>`` with the files of a repository on Hugging Face, for `monai.bundle.download`.

    It has the files of the bundle and ``README.md``, the model card after a header that Hugging Face reads. Versions
    are tags of the repository, so that the folder has none in its name.

    Args:
        bundle: folder of the bundle.
        output: folder of the repository; created if needed.
        overwrite: replace an existing folder.

    Returns:
        The path of the repository.

    Raises:
        ConfigurationError: if the folder is not a bundle, or has no license or model card.
        CheckpointError: if the weights are missing.
        OutputError: if the folder exists or cannot be written.
    """
    bundle = Path(bundle).resolve()
    files = bundle_files(bundle)
    for name in ("LICENSE", "docs/README.md"):
        if bundle / name not in files:
            raise ConfigurationError(f"{bundle} has no {name}: Hugging Face shows it to users; add the file.")
    is_apache = "Apache License" in (bundle / "LICENSE").read_text(encoding="utf-8")
    front_matter = _FRONT_MATTER.format(license="apache-2.0" if is_apache else "other")
    card = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    path = Path(output, bundle.name)
    with atomic_folder(path, overwrite) as part:
        for file in files:
            copy = part / file.relative_to(bundle)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        (part / "README.md").write_text(f"{front_matter}\n{card}", encoding="utf-8")
        (part / ".gitattributes").write_text(_GIT_ATTRIBUTES, encoding="utf-8")
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
    """Build the zip files and, in ``huggingface``, the repositories of the bundles; earlier ones are replaced.

    A bundle without weights is skipped with a warning.

    Args:
        output: folder of the zip files and of ``huggingface``.
        folder: folder of the bundles.
    """
    for bundle in sorted(path.parents[1] for path in Path(folder).glob("*/configs/metadata.json")):
        try:
            print(build_zip(bundle, output, overwrite=True))
            print(build_repository(bundle, Path(output, "huggingface"), overwrite=True))
        except CheckpointError as error:
            logger.warning("skipped: %s", error)


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    report_errors_in_one_sentence()
    fire.Fire({"render": render, "build": build})
