"""Ablations: networks trained without one of MIAR's components, on the same slices.

    python -m benchmarks.ablations --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        --runs_dir runs/brats/ablations --output_dir ablations_output [--contrasts t1,t2] [--section test] ...
    python -m benchmarks.ablations --paper True --runs_dir runs/brats/paper [--zero_shot runs/lidc/paper/full/model.pt]

``runs_dir`` holds a folder for each network, a `MIAR` of the bundle's ``train.json``, written by
``benchmarks/recipe.sh``. Each network is measured with the settings of the bundle, with greedy decoding, and with zeros
for the token latents, by default on the patients of the validation section. With ``--paper True`` the networks are the
paper's own system (`benchmarks.paper`): every decoding with its time, or those of ``--decodings "['greedy','K = 1']"``,
the components, and the tokenizers, paired by patient. Writes ``ablations.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.common import Method, open_run, provenance, publish
from benchmarks.paired import EXPLANATION, differences_table
from benchmarks.paper import DECODINGS, DEFAULT, READINGS, RUNS, paper_methods, paper_tokenizer
from benchmarks.robustness import METRICS, measured_section, without_tokens
from benchmarks.table import measure, tokenizer_report
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs, read_config
from miar_monai.errors import ConfigurationError, report_errors_in_one_sentence
from miar_monai.evaluation import Row, SuperResolutionEvaluation, by_contrast
from miar_monai.inference.bundle import check_switches
from miar_monai.networks.weights import load_weights

RESULT = "ablations.md"
SETTINGS: dict[str, dict[str, Any]] = {"no-rope": {"positions": "learned"}}
"""Settings of the network in a folder that differ from those of the bundle."""
ZERO_SHOT = "zero-shot"


def ablated_methods(
    bundle: str, given: Mapping[str, Any], weights: Mapping[str, Path], device: torch.device
) -> dict[str, Method]:
    """Return the networks of the bundle's ``train.json`` by name: by default, greedy, and without tokens."""
    default, greedy = (
        read_config(bundle, {**given, **changes}).get_parsed_content("inferer")
        for changes in ({}, {"strategy": "greedy"})
    )
    blur = {key: value for key, value in given.items() if key.startswith("blur_")}
    methods: dict[str, Method] = {}
    for name, path in weights.items():
        own = read_config(bundle, blur, workflow="train")  # the bundle itself may ship a network without tokens
        for key, value in SETTINGS.get(name, {}).items():
            own[f"network_def#{key}"] = value
        network = load_weights(own.get_parsed_content("network_def"), path, "train it again.").to(device).eval()
        methods[name] = partial(default, network=network)
        methods[f"{name}, greedy"] = partial(greedy, network=network)
        methods[f"{name}, without tokens"] = partial(without_tokens, network, default.fidelity)
    return methods


def paper_ablations(
    bundle: str,
    given: Mapping[str, Any],
    weights: Mapping[str, Path],
    zero_shot: str | None,
    device: torch.device,
    decodings: Sequence[str] | None = None,
) -> dict[str, Method]:
    """Return the paper's system by each decoding, and without each component and from other data by two of them.

    Args:
        bundle: folder of the bundle.
        given: values of keys of its ``evaluate.json``.
        weights: ``model.pt`` of runs among `RUNS`.
        zero_shot: ``model.pt`` of the paper's system from training on other data.
        device: device of the networks.
        decodings: of the full system, names in `DECODINGS` and `READINGS`; all of them by default.

    Raises:
        ConfigurationError: if a decoding is unknown.
    """
    known = {**DECODINGS, **READINGS}
    if unknown := [name for name in decodings or () if name not in known]:
        raise ConfigurationError(f"there is no decoding {unknown[0]!r}: choose from {', '.join(known)}.")
    of_full = known if decodings is None else {name: known[name] for name in decodings}
    two = {name: DECODINGS[name] for name in ("greedy", DEFAULT)}
    methods: dict[str, Method] = {}
    for run, path in weights.items():
        decoded = paper_methods(bundle, given, path, of_full if run == "full" else two, device, run)
        methods |= {f"{run}, {name}": method for name, method in decoded.items()}
    if zero_shot is not None:
        decoded = paper_methods(bundle, given, zero_shot, two, device)
        methods |= {f"{ZERO_SHOT}, {name}": method for name, method in decoded.items()}
    return methods


def paper_differences(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return the paired differences of the paper's ablations, per contrast and for all, in Markdown.

    Args:
        rows: of the methods of `paper_ablations`.
        metrics: to compare.
    """
    titles = list(dict.fromkeys(row["method"] for row in rows))
    full = [title for title in titles if title.startswith("full, ")]
    default = f"full, {DEFAULT}"
    compared = {
        "full, greedy": [title for title in full if title != "full, greedy"],
        "full, top-k": [default],
        "full, top-p": [default],
        default: [
            *(f"full, {name}" for name in ("K = 2", "K = 3")),
            *(title for title in titles if title not in full and title.endswith(f", {DEFAULT}")),
        ],
    }
    sections, lines = by_contrast(rows), [EXPLANATION, ""]
    for contrast, section in sections.items():
        if len(sections) > 1:
            lines += [f"### {contrast}", ""]
        for reference, others in compared.items():
            measured = [title for title in others if title in titles]
            if measured and reference in titles:
                lines += [differences_table(section, measured, reference, metrics), ""]
    return "\n".join(lines)


def paper_tokenizers(
    bundle: str,
    weights: Mapping[str, Path],
    evaluation: SuperResolutionEvaluation,
    volumes: Sequence[SlicePairs],
    batch_size: int,
) -> str:
    """Return the reports on the tokenizers of runs, and their paired differences from the first, in Markdown.

    Args:
        bundle: folder of the bundle.
        weights: ``tokenizer.pt`` of each run; may be empty.
        evaluation: has the metrics and the device.
        volumes: the slices.
        batch_size: number of slices in a batch.
    """
    lines: list[str] = []
    rows: list[Row] = []
    for run, path in weights.items():
        tokenizer = load_weights(paper_tokenizer(bundle), path, "train it with benchmarks/recipe.sh.")
        own = SuperResolutionEvaluation(evaluation.degradation, evaluation.metrics, device=evaluation.device)
        report = tokenizer_report(own, volumes, tokenizer.to(evaluation.device).eval(), batch_size)
        lines += [f"## Tokenizer, {run}", "", report]
        rows += [{**row, "method": run} for row in own.rows if row["method"] == "reconstruction"]
    if len(weights) > 1:
        first, *others = weights
        lines += ["## Paired differences of the tokenizers", ""]
        lines += [differences_table(rows, others, first, list(evaluation.scores)), ""]
    return "\n".join(lines)


def main(
    dataset_dir: str | Sequence[str],
    runs_dir: str,
    bundle: str = "bundles/miar_brats",
    output_dir: str = "ablations_output",
    contrasts: str | Sequence[str] | None = None,
    paper: bool = False,
    zero_shot: str | None = None,
    decodings: Sequence[str] | None = None,
    **settings: Any,
) -> None:
    """Measure the networks of the ablations.

    Args:
        dataset_dir: folder of the data, or several folders.
        runs_dir: folder with ``<name>/model.pt``.
        bundle: folder of the bundle.
        output_dir: folder of ``ablations.md``.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        paper: the networks are the paper's own system, in the folders ``full``, ``no-rope`` and ``no-dropout``; those
            with a ``tokenizer.pt`` are also measured as tokenizers.
        zero_shot: ``model.pt`` of the paper's system from training on other data, for two more rows.
        decodings: of the paper's full system, ``["greedy", "K = 1"]`` for example; all of them by default.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, num_slices, ...

    Raises:
        ConfigurationError: if there is no network, or not the full one of the paper's system, or a decoding is unknown.
    """
    check_switches(paper=paper)
    weights = {path.parent.name: path for path in sorted(Path(runs_dir).glob("*/model.pt"))}
    if paper:
        weights = {run: weights[run] for run in RUNS if run in weights}
    if not weights or (paper and "full" not in weights):
        needed = "full/model.pt: train the paper's system" if paper else "<name>/model.pt: train the ablations"
        raise ConfigurationError(f"{runs_dir} holds no {needed} with benchmarks/recipe.sh.")
    settings = {"section": "validation", "metrics": list(METRICS), **settings}
    config, given = open_run(bundle, dataset_dir, output_dir, contrasts, settings, [RESULT])
    get = config.get_parsed_content
    evaluation, batch_size = get("evaluation"), get("sw_batch_size")
    if paper:
        methods = paper_ablations(bundle, given, weights, zero_shot, evaluation.device, decodings)
    else:
        methods = ablated_methods(bundle, given, weights, evaluation.device)
    volumes = load_slice_pairs(config)
    notes = provenance(bundle, config, volumes, batch_size)
    autocast = torch.autocast(evaluation.device.type, torch.bfloat16, enabled=get("amp"))
    if paper:
        with autocast:
            measure(evaluation, volumes, methods, batch_size, consistent=False)
        tables = [evaluation.table(), "## Paired differences", ""]
        tables.append(paper_differences(evaluation.rows, list(evaluation.scores)))
        tokenizers = {run: path.with_name("tokenizer.pt") for run, path in weights.items()}
        tokenizers = {run: path for run, path in tokenizers.items() if path.is_file()}
        tables.append(paper_tokenizers(bundle, tokenizers, evaluation, volumes, batch_size))
    else:
        with autocast:
            tables = [measured_section("All networks", volumes, methods, evaluation, batch_size)]
        notes = notes[:2]  # without the sentence about times
    publish("\n".join(["# Ablations", "", *notes, "", *tables]), Path(output_dir, RESULT), get("overwrite"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
