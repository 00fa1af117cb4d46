"""Ablations: networks trained without one of MIAR's components, on the same slices.

    python -m benchmarks.ablations --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        --runs_dir runs/brats/ablations --output_dir ablations_output [--contrasts t1,t2] [--section test] ...

``runs_dir`` holds a folder for each network, a `MIAR` of the bundle's ``train.json``, written by
``benchmarks/recipe.sh``. Each network is measured with the settings of the bundle, with greedy decoding, and with zeros
for the token latents, by default on the patients of the validation section. Writes ``ablations.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.common import Method, open_run, provenance, publish
from benchmarks.robustness import METRICS, measured_section, without_tokens
from miar_monai.cli.workflow import load_slice_pairs, read_config
from miar_monai.errors import ConfigurationError, report_errors_in_one_sentence
from miar_monai.networks.weights import load_weights

RESULT = "ablations.md"
SETTINGS: dict[str, dict[str, Any]] = {"no-rope": {"positions": "learned"}}
"""Settings of the network in a folder that differ from those of the bundle."""


def main(
    dataset_dir: str | Sequence[str],
    runs_dir: str,
    bundle: str = "bundles/miar_brats",
    output_dir: str = "ablations_output",
    contrasts: str | Sequence[str] | None = None,
    **settings: Any,
) -> None:
    """Measure the networks of the ablations.

    Args:
        dataset_dir: folder of the data, or several folders.
        runs_dir: folder with ``<name>/model.pt``.
        bundle: folder of the bundle.
        output_dir: folder of ``ablations.md``.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, num_slices, ...

    Raises:
        ConfigurationError: if there is no network.
    """
    weights = {path.parent.name: path for path in sorted(Path(runs_dir).glob("*/model.pt"))}
    if not weights:
        raise ConfigurationError(f"{runs_dir} holds no <name>/model.pt: train the ablations with benchmarks/recipe.sh.")
    settings = {"section": "validation", "metrics": list(METRICS), **settings}
    config, given = open_run(bundle, dataset_dir, output_dir, contrasts, settings, [RESULT])
    get = config.get_parsed_content
    evaluation, batch_size, default = get("evaluation"), get("sw_batch_size"), get("inferer")
    greedy = read_config(bundle, {**given, "strategy": "greedy"}).get_parsed_content("inferer")
    blur = {key: value for key, value in given.items() if key.startswith("blur_")}
    methods: dict[str, Method] = {}
    for name, path in weights.items():
        own = read_config(bundle, blur, workflow="train")  # the bundle itself may ship a network without tokens
        for key, value in SETTINGS.get(name, {}).items():
            own[f"network_def#{key}"] = value
        network = (
            load_weights(own.get_parsed_content("network_def"), path, "train it again.").to(evaluation.device).eval()
        )
        methods[name] = partial(default, network=network)
        methods[f"{name}, greedy"] = partial(greedy, network=network)
        methods[f"{name}, without tokens"] = partial(without_tokens, network, default.fidelity)
    volumes = load_slice_pairs(config)
    with torch.autocast(evaluation.device.type, torch.bfloat16, enabled=get("amp")):
        table = measured_section("All networks", volumes, methods, evaluation, batch_size)
    notes = provenance(bundle, config, volumes, batch_size)[:2]
    publish("\n".join(["# Ablations", "", *notes, "", table]), Path(output_dir, RESULT), get("overwrite"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
