"""The paper's own system in the benchmarks: its configs, weights and decodings.

`table`, `ablations` and `figures` take it by their option ``--paper``. ``benchmarks/recipe.sh`` trains it;
``docs/paper.md`` says which command tests which claim of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from benchmarks.common import Method
from miar_monai.cli.workflow import read_config
from miar_monai.networks import MSVQVAE
from miar_monai.networks.weights import load_weights

__all__ = ["DECODINGS", "DEFAULT", "READINGS", "RUNS", "paper_config", "paper_methods", "paper_tokenizer"]

DEFAULT = "K = 1"
"""The decoding of the paper's main results."""

_BEAMS: dict[str, dict[str, Any]] = {f"K = {k}": {"strategy": "beam", "lookahead_tokens": k} for k in (1, 2, 3)}

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"strategy": "greedy"},
    "top-k": {"strategy": "top_k"},
    "top-p": {"strategy": "top_p"},
    **_BEAMS,
}
"""Settings of ``paper_evaluate.json`` for each decoding of the paper's Table 2.

It does not say what decodes "w/o Beam Search", so that there are greedy decoding and both kinds of sampling."""

_READINGS: dict[str, dict[str, Any]] = {
    "Eq. 4 literal": {"selection": "literal"},
    "joint score": {"score": "joint"},
    "Eq. 4 literal, joint score": {"selection": "literal", "score": "joint"},
}

READINGS: dict[str, dict[str, Any]] = {
    f"{beam}, {reading}": {**search, **change}
    for beam, search in _BEAMS.items()
    for reading, change in _READINGS.items()
}
"""Beam search by the other readings of Eq. 4 and Eq. 5.

As printed, Eq. 4 chooses the most certain tokens; its text, and `DECODINGS`, choose the least certain. Eq. 5 scores a
candidate by the next scale alone; the joint score adds the probability of the candidate itself."""

RUNS: dict[str, dict[str, Any]] = {"full": {}, "no-rope": {"positions": "learned"}, "no-dropout": {}}
"""Folders of ``recipe.sh``, with the settings in which their network differs."""


def paper_config(
    bundle: str, settings: Mapping[str, Any], workflow: str = "evaluate", run: str = "full"
) -> ConfigParser:
    """Return the config of a workflow of the bundle with the overlay of the paper, for a run among `RUNS`."""
    overlay = Path(bundle, "configs", f"paper_{workflow}.json")
    config = read_config(bundle, settings, overlay, workflow=workflow)
    for name, value in RUNS[run].items():
        config[f"network_def#{name}"] = value
    return config


def paper_methods(
    bundle: str,
    settings: Mapping[str, Any],
    weights: str | Path,
    decodings: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    run: str = "full",
) -> dict[str, Method]:
    """Return the trained system of the paper with each decoding, by the names of the decodings.

    Args:
        bundle: folder of the bundle.
        settings: values of keys of its ``evaluate.json``.
        weights: ``model.pt``.
        decodings: settings of each decoding, such as `DECODINGS`.
        device: device of the network.
        run: the run among `RUNS` that wrote the weights.

    Raises:
        CheckpointError: if the weights are missing, damaged, or of another network.
    """
    network = paper_config(bundle, settings, run=run).get_parsed_content("network_def")
    load_weights(network, weights, "train the paper's system with benchmarks/recipe.sh.").to(device).eval()
    methods: dict[str, Method] = {}
    for name, changes in decodings.items():
        inferer = paper_config(bundle, {**settings, **changes, "progress": False}).get_parsed_content("inferer")
        methods[name] = partial(inferer, network=network)
    return methods


def paper_tokenizer(bundle: str) -> MSVQVAE:
    """Return the untrained tokenizer of the paper's system."""
    tokenizer: MSVQVAE = paper_config(bundle, {}, "train").get_parsed_content("tokenizer_def")
    return tokenizer
