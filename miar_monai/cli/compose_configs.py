"""Composes the configs of a bundle from the shared layers in ``bundles/common`` and the bundle's ``source.json``.

    python -m miar_monai.cli.build_bundles render

A workflow is a list of layers. Each layer is a file in ``common`` and, optionally, a section of ``source.json``. They
are merged in this order by the rules of MONAI's `ConfigParser`: ``"train#trainer#amp"`` sets a nested value,
``"+imports"`` extends a list or a dictionary. The results are complete configs that need neither the layers nor this
module. The ``"network"`` of ``source.json`` is the network of evaluation and inference: ``"estimator"`` or ``"miar"``.
"""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

from miar_monai.data.atomic_write import atomic_file
from miar_monai.errors import ConfigurationError
from miar_monai.inference.bundle import read_json

__all__ = ["composed_files", "write_configs"]

WORKFLOWS = {
    "train": ("base", "data", "tokenizer_sizes", "miar", "tokenizer", "simulation", "training", "validation", "train"),
    "train_estimator": ("base", "data", "estimator", "simulation", "training", "validation", "train_estimator"),
    "train_stage1": ("base", "data", "tokenizer_sizes", "tokenizer", "training", "train_stage1"),
    "evaluate": ("base", "data", "network", "simulation", "prediction", "evaluate"),
    "inference": ("base", "network", "prediction", "inference"),
    "metadata": ("metadata",),
}
OVERLAYS = {
    "train_posterior": ("train_posterior",),
    "multi_gpu_train": ("multi_gpu", "multi_gpu_training", "multi_gpu_train"),
    "multi_gpu_train_stage1": ("multi_gpu", "multi_gpu_training", "multi_gpu_train_stage1"),
    "multi_gpu_inference": ("multi_gpu", "multi_gpu_inference"),
    "paper_train_stage1": ("paper_sizes", "paper_tokenizer"),
    "paper_train": ("paper_sizes", "paper_tokenizer", "paper_network", "paper_train"),
    "paper_evaluate": ("paper_sizes", "paper_network", "paper_evaluate"),
}
"""Configs that users lay over a workflow; their ``+`` keys are kept for MONAI."""

NETWORKS = {"estimator": ("estimator",), "miar": ("tokenizer_sizes", "miar")}
"""Layers of each network; ``"network"`` in a workflow stands for those of the one that the bundle chooses."""

_COPIES = {"logging.conf": "configs/logging.conf", "LICENSE": "LICENSE"}
_STEPS = ("initialize", "prepare", "check_results", "load_weights", "save", "run", "training", "evaluating")


def composed_files(bundle: str | os.PathLike[str]) -> dict[Path, str]:
    """Return the contents of the files that a bundle shares with others, by path.

    Args:
        bundle: folder with ``source.json``; the shared layers are in ``common`` next to it.

    Raises:
        ConfigurationError: if a source is missing or is not a JSON object, or two sources do not fit together.
    """
    bundle = Path(bundle)
    common, own = bundle.parent / "common", read_json(bundle / "source.json")
    network = own.pop("network", "estimator")
    if network not in NETWORKS:
        raise ConfigurationError(
            f"{bundle / 'source.json'} has the network {network!r}: {' or '.join(NETWORKS)} is needed; correct it."
        )
    unknown = own.keys() - {layer for layers in (WORKFLOWS | OVERLAYS).values() for layer in layers} - {*NETWORKS}
    if unknown:
        raise ConfigurationError(
            f"{bundle / 'source.json'} has a section {min(unknown)!r}: the name of a layer in {common} is needed; "
            "correct it."
        )
    files = {bundle / path: (common / name).read_text(encoding="utf-8") for name, path in _COPIES.items()}
    for name, generic in (WORKFLOWS | OVERLAYS).items():
        layers = [part for layer in generic for part in (NETWORKS[network] if layer == "network" else (layer,))]
        sections = [part for layer in layers for part in (read_json(common / f"{layer}.json"), own.get(layer, {}))]
        content = _ordered(_merged(bundle, sections)) if name in WORKFLOWS else _united(sections)
        files[bundle / "configs" / f"{name}.json"] = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
    return files


def write_configs(bundle: str | os.PathLike[str]) -> list[Path]:
    """Write the files of `composed_files` whose contents have changed, and return their paths."""
    changed = []
    for path, text in composed_files(bundle).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, overwrite=True) as part:
                part.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def _merged(bundle: Path, sections: list[dict[str, Any]]) -> dict[str, Any]:
    from monai.bundle import ConfigParser
    from monai.bundle.utils import merge_kv

    parser = ConfigParser({})
    for section in sections:
        for key, value in section.items():
            try:
                if key.startswith("+"):
                    parser[key[1:]]  # MONAI would only warn if it is missing
                merge_kv(parser, key, deepcopy(value))  # a section is merged into several workflows
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ConfigurationError(
                    f"{key!r} in the sources of {bundle} cannot be merged ({error}): a key of an earlier layer is "
                    "needed; correct it."
                ) from error
    merged: dict[str, Any] = parser.get()
    return merged


def _united(sections: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for section in sections for key, value in section.items()}


def _ordered(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with its keys in the order of reading: imports, settings, components, steps."""

    def rank(key: str) -> tuple[bool, int, bool]:
        return key != "imports", _STEPS.index(key) if key in _STEPS else -1, not _is_setting(config, key)

    return {key: config[key] for key in sorted(config, key=rank)}


def _is_setting(config: dict[str, Any], key: str) -> bool:
    """Return whether a key is a setting for users: a plain value, or an expression of other settings."""
    from monai.bundle import ReferenceResolver

    value = config.get(key, {})  # a nested key belongs to a component
    if isinstance(value, str):
        references = ReferenceResolver.match_refs_pattern(value)
        return not value.startswith(("@", "%")) and all(_is_setting(config, name) for name in references)
    return not any(isinstance(part, dict) for part in (value if isinstance(value, list) else [value]))
