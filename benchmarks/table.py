"""The comparison table: MIAR, untrained baselines and trained peers on the same slices.

    python -m benchmarks.table --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        --output_dir table_output [--contrasts t1,t2] [--peers_dir runs/peers] [--guides t1,t2] \
        [--control runs/estimator.pt] [--paper runs/brats/paper/full] [--off_the_shelf photographs] \
        [--zero_shot other/models/model.pt] [--section validation] [--device cuda:0] [--num_slices 2] ...

The bundle's ``evaluate.json`` defines data, degradation, networks, metrics and inferer; each of its top-level keys is
an option. Writes ``table.csv`` (a row for each patient, contrast, slice and method), ``table.md``, ``plane.png`` and
``table.html``: tables that can be sorted and pictures of each patient. Needs the extras metrics, demo and bench.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from monai.utils import ensure_tuple
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import Method, batches, consistent_title, load_network, open_run, provenance, publish
from benchmarks.guide import load_guides
from benchmarks.paired import EXPLANATION, differences_table, headline_table
from benchmarks.paper import DECODINGS, DEFAULT, paper_methods, paper_tokenizer
from benchmarks.peers.loading import GUIDED, TITLES, load_peers
from benchmarks.peers.off_the_shelf import load_off_the_shelf
from benchmarks.plane import perception_distortion
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs, read_config, with_contrasts
from miar_monai.errors import DatasetError, report_errors_in_one_sentence
from miar_monai.evaluation import Row, SlicePictures, SuperResolutionEvaluation, by_contrast, write_results_page
from miar_monai.evaluation.tables import markdown_table
from miar_monai.inference.bundle import model_notes, weights_sha256
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.networks import MIAR, MSVQVAE
from miar_monai.networks.weights import load_weights

logger = logging.getLogger(__name__)

RESULTS = ("table.csv", "table.md", "table.html", "plane.png")
ZERO_SHOT = "MIAR, zero-shot"
"""Title of the row of the same network from training on other data."""
CONTROL = "estimator"
"""Title of the rows of the network without tokens."""
PAPER = "paper"
"""Title of the rows of the paper's own system."""


def miar_inferers(
    bundle: str, settings: Mapping[str, Any], has_tokens: bool = True, title: str = "MIAR"
) -> tuple[dict[str, BeamSearchInferer], list[str], str]:
    """Return the inferers of MIAR by their row titles, the titles of the fidelity sweep, and that of the default.

    Args:
        bundle: folder of the bundle.
        settings: values of keys of its ``evaluate.json``.
        has_tokens: whether its network has tokens; without them, inferers differ in fidelity only.
        title: of the network.
    """

    def inferer(**changes: Any) -> tuple[str, BeamSearchInferer]:
        built = read_config(bundle, {**settings, **changes, "progress": False}).get_parsed_content("inferer")
        if not has_tokens:
            return f"{title}, fidelity {built.fidelity:g}", built
        decoding = built.decoding
        search = f"K = {decoding.num_branching}" if decoding.num_branching else "greedy"
        if decoding.strategy in ("top_k", "top_p"):
            search = decoding.strategy
        return f"{title}, fidelity {built.fidelity:g}, {search}", built

    default = inferer()
    sweep = [inferer(strategy="greedy", fidelity=value) for value in sorted({0.0, default[1].fidelity, 1.0})]
    searches = [inferer(strategy="beam", lookahead_tokens=k) for k in (1, 2, 3) if has_tokens]
    return dict([*sweep, *searches, default]), [name for name, _ in sweep], default[0]


def timed(method: Method, lr: Tensor) -> tuple[Tensor, float]:
    """Return the SR slices of a method for LR slices (N, 1, h, w), and its milliseconds per slice."""
    synchronize = torch.cuda.synchronize if lr.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    sr = method(lr)
    synchronize()
    return sr, 1e3 * (time.perf_counter() - start) / len(lr)


@torch.inference_mode()
def measure(
    evaluation: SuperResolutionEvaluation,
    volumes: Iterable[SlicePairs],
    trained: Mapping[str, Method],
    batch_size: int,
    guided: Mapping[str, Method] | None = None,
    guides: Sequence[Tensor] = (),
    consistent: bool = True,
    shown: Sequence[str] = (),
) -> SlicePictures:
    """Add the rows of the baselines and of the trained methods.

    All methods get the same batches. The first batch is run twice, and only the second run is timed.

    Args:
        evaluation: collects the rows.
        volumes: the slices.
        trained: the trained methods by name.
        batch_size: number of slices in a batch.
        guided: trained methods with an argument ``guide``, by name.
        guides: slices of the guide of each volume, (N, 1, H, W); needed if there are guided methods.
        consistent: add rows of the trained methods with data consistency.
        shown: methods with a picture of the middle slice of each volume.

    Returns:
        The pictures.
    """
    warm, pictures = False, SlicePictures()
    for i, volume in enumerate(tqdm(list(volumes), desc="measuring", unit="volume")):
        for slices, lr, hr in batches(volume, batch_size, evaluation.device):
            estimates, milliseconds = {}, {}
            learned = dict(trained)
            for name, method in (guided or {}).items():
                learned[name] = partial(method, guide=guides[i][slices.start : slices.stop].to(hr))
            for name, method in {**evaluation.baseline_methods, **learned}.items():
                if not warm:
                    method(lr)
                estimates[name], milliseconds[name] = timed(method, lr)
                if consistent and name in learned:
                    sr, corrected = estimates[name].float(), consistent_title(name)
                    estimates[corrected], more = timed(partial(evaluation.make_consistent, sr), lr)
                    milliseconds[corrected] = milliseconds[name] + more
            evaluation.add(estimates, hr, volume.subject, slices, volume.contrast, milliseconds)
            middle = len(volume.hr) // 2
            if middle in slices:
                one = slice(middle - slices.start, middle - slices.start + 1)
                drawn = {name: estimates[name][one] for name in shown}
                pictures.add(volume.subject, volume.contrast, middle, lr[one], drawn, hr[one])
            warm = True
    return pictures


@torch.inference_mode()
def tokenizer_report(
    evaluation: SuperResolutionEvaluation, volumes: Iterable[SlicePairs], tokenizer: MSVQVAE, batch_size: int
) -> str:
    """Return, as Markdown, the reconstruction quality of a tokenizer and the share of its codebook in use.

    Args:
        evaluation: without rows; collects them.
        volumes: the slices.
        tokenizer: the tokenizer, on the device of the evaluation.
        batch_size: number of slices in a batch.
    """
    usage: Tensor | int = 0
    for volume in tqdm(list(volumes), desc="tokenizer", unit="volume"):
        for slices, _, hr in batches(volume, batch_size, evaluation.device):
            tokens = tokenizer.encode(hr)
            estimates = {"reconstruction": tokenizer.decode(tokens)}
            estimates["without the quantizer"] = tokenizer.reconstruct_unquantized(hr)
            evaluation.add(estimates, hr, volume.subject, slices, volume.contrast)
            usage = usage + tokenizer.quantizer.usage(tokens)
    seen = torch.as_tensor(usage).flatten(1) > 0  # (K, codes of all codebooks)
    used = {f"{side} × {side}": codes for side, codes in zip(tokenizer.schedule.sides, seen, strict=True)}
    used["all"] = seen.any(dim=0)
    rows = [(scale, int(codes.sum()), f"{100 * codes.float().mean():.1f} %") for scale, codes in used.items()]
    columns = ("scale", f"codes in use of {seen.shape[1]}", "share")
    return "\n".join([evaluation.table(), markdown_table(columns, rows), ""])


def guided_title(method: str) -> str:
    """Return the title of the row of a method with a guide."""
    return f"{method}, guided"


def guides_of(
    bundle: str, settings: Mapping[str, Any], volumes: Sequence[SlicePairs], contrasts: Sequence[str]
) -> list[Tensor]:
    """Return the slices of the guide of each volume, (N, 1, H, W): the first contrast that is not its own.

    Args:
        bundle: folder of the bundle.
        settings: values of keys of its ``evaluate.json``.
        volumes: the volumes to guide.
        contrasts: contrasts of the guides.

    Raises:
        DatasetError: if a volume has no other contrast.
    """
    found: dict[int, Tensor] = {}
    for contrast in contrasts:
        chosen = [i for i, volume in enumerate(volumes) if i not in found and volume.contrast != contrast]
        if chosen:
            config = read_config(bundle, with_contrasts(settings, contrast))
            found |= zip(chosen, load_guides(config, [volumes[i] for i in chosen], 0.0), strict=True)
    for i, volume in enumerate(volumes):
        if i not in found:
            raise DatasetError(
                f"{volume.subject} has no guide for its {volume.contrast} among {', '.join(contrasts)}: another "
                "contrast is needed; add it to --guides."
            )
    return [found[i] for i in range(len(volumes))]


def best_peer(rows: Sequence[Row], peers: Iterable[str]) -> str | None:
    """Return the title of the data-consistent peer with the highest mean PSNR over all slices, None without peers.

    Data consistency needs the degradation, which is known in this table, and improves every peer; so the headline
    compares with the best that is possible with the peers.
    """

    def mean_psnr(method: str) -> float:
        return float(np.mean([row["PSNR"] for row in rows if row["method"] == method]))

    return max(map(consistent_title, peers), key=mean_psnr, default=None)


def paired_report(
    rows: Sequence[Row], ours: Sequence[str], peers: Sequence[str], metrics: Sequence[str], others: Sequence[str] = ()
) -> str:
    """Return, as Markdown, the paired differences between some methods and each peer, per contrast and for all.

    The headline, first in each section, is the comparison with the `best_peer`.

    Args:
        rows: of all methods.
        ours: titles of the methods.
        peers: titles of the peers.
        metrics: to compare.
        others: titles of methods that are compared, but are no peers for the headline.
    """
    sections, lines = by_contrast(rows), [EXPLANATION, ""]
    best = best_peer(rows, peers) if {"PSNR", "LPIPS"} <= set(metrics) else None
    compared = ["linear inverse", *peers, *others]
    if best:
        compared.append(best)
        lines += [f"{best}, is the peer with the highest mean PSNR; the first table of each section is about it.", ""]
    for contrast, section in sections.items():
        if len(sections) > 1:
            lines += [f"### {contrast}", ""]
        if best:
            lines += [headline_table(section, ours, best), ""]
        for peer in compared:
            lines += [differences_table(section, ours, peer, metrics), ""]
    return "\n".join(lines)


def main(
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "table_output",
    contrasts: str | Sequence[str] | None = None,
    peers_dir: str | None = None,
    tokenizer: str | None = None,
    zero_shot: str | None = None,
    guides: str | Sequence[str] | None = None,
    control: str | None = None,
    paper: str | None = None,
    off_the_shelf: str | None = None,
    **settings: Any,
) -> None:
    """Measure the table, the paired differences and a tokenizer; draw the perception-distortion plane.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of ``table.csv``, ``table.md``, ``table.html`` and ``plane.png``.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        peers_dir: folder with ``swinir.pt``, ``rcan.pt``, ``mhca.pt``, ``ldm.pt`` and ``vae.pt``, and those of the
            guided peers, ``mmhca.pt``, ``disc_diff.pt`` and ``diffmsr.pt``; missing peers are listed and left out.
        tokenizer: weights of the tokenizer; the bundle's ``models/tokenizer.pt`` by default. The tokenizer is measured
            if it is given, or if the network has tokens.
        zero_shot: weights of the same network from training on other data, for another row.
        guides: contrasts of guides, for rows of the guided peers and of a network that accepts guides. The guide of a
            volume is the first that is not its own contrast.
        control: weights of the bundle's ``train_estimator.json``, the network without tokens, as a control of a network
            with tokens.
        paper: folder with ``model.pt`` and ``tokenizer.pt`` of the paper's own system, see `benchmarks.paper`, for rows
            of its decodings and a section about its tokenizer.
        off_the_shelf: folder with weights for photographs, see `benchmarks.peers.off_the_shelf`.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, checkpoint, metrics, num_slices,
            sw_batch_size (slices in a batch of any method), overwrite, ...
    """
    config, given = open_run(bundle, dataset_dir, output_dir, contrasts, settings, RESULTS)
    get, folder = config.get_parsed_content, Path(output_dir)
    overwrite, batch_size = get("overwrite"), get("sw_batch_size")
    evaluation = get("evaluation")
    has_tokens = isinstance(get("network"), MIAR)
    inferers, sweep, default = miar_inferers(bundle, given, has_tokens)
    networks = {name: get("network") for name in inferers}
    load_network(config)
    if zero_shot is not None:
        other = read_config(bundle, given).get_parsed_content("network")
        networks[ZERO_SHOT] = load_weights(other, zero_shot, "give --zero_shot weights of the same network.")
        inferers[ZERO_SHOT] = copy(inferers[default])  # an inferer records CUDA graphs of one network
    control_default = []
    if control is not None:
        own, _, best = miar_inferers(bundle, given, has_tokens=False, title=CONTROL)
        network = read_config(bundle, {}, workflow="train_estimator").get_parsed_content("network_def")
        load_weights(network, control, "give --control weights of the bundle's train_estimator.json.")
        inferers, networks, control_default = inferers | own, networks | dict.fromkeys(own, network), [best]
    peers, missing = load_peers(bundle, peers_dir)
    photographs, absent = load_off_the_shelf(off_the_shelf)
    guided_peers, unguided = load_peers(bundle, peers_dir, GUIDED) if guides is not None else ({}, [])
    missing += [*absent, *unguided]
    for network in (*networks.values(), *peers.values(), *photographs.values(), *guided_peers.values()):
        network.to(evaluation.device).eval()
    trained: dict[str, Method] = {**photographs, **peers}
    for name, inferer in inferers.items():
        trained[name] = partial(inferer, network=networks[name])
    if paper is not None:
        decoded = paper_methods(bundle, given, Path(paper, "model.pt"), DECODINGS, evaluation.device)
        trained |= {f"{PAPER}, {name}": method for name, method in decoded.items()}
    guided: dict[str, Method] = dict(guided_peers)
    ours_guided = [guided_title(name) for name in sweep if guides and getattr(get("network"), "guide_channels", 0)]
    for title, name in zip(ours_guided, sweep, strict=False):
        guided[title] = partial(copy(inferers[name]), network=networks[name])  # CUDA graphs of one kind of input
    for sentence in (*missing, *evaluation.missing):
        logger.warning(sentence)

    volumes = load_slice_pairs(config)
    guide_slices = guides_of(bundle, given, volumes, ensure_tuple(guides)) if guided else []
    ours = list(dict.fromkeys([sweep[0], default, sweep[-1]]))
    papers = [f"{PAPER}, {DEFAULT}", consistent_title(f"{PAPER}, {DEFAULT}")] if paper is not None else []
    shown = [
        "bicubic",
        *ours,
        *peers,
        *papers[:1],
        *guided_peers,
        *control_default,
    ]  # the first of them, as many as fit
    with torch.autocast(evaluation.device.type, torch.bfloat16, enabled=get("amp")):
        pictures = measure(evaluation, volumes, trained, batch_size, guided, guide_slices, shown=shown)
    evaluation.write_rows(folder / "table.csv", overwrite)
    if {"PSNR", "LPIPS"} <= set(evaluation.scores):
        sweeps = [sweep, [consistent_title(name) for name in sweep]]
        perception_distortion(evaluation.rows, folder / "plane.png", sweeps, overwrite)
    else:
        missing.append("plane.png is left out: it needs PSNR and LPIPS.")

    notes = [*provenance(bundle, config, volumes, batch_size), f"- The bundle's default is {default}."]
    files = {ZERO_SHOT: zero_shot, CONTROL: control, PAPER: paper and Path(paper, "model.pt")}
    files |= {
        title: Path(str(peers_dir), f"{peer}.pt")
        for peer, title in {**TITLES, **GUIDED}.items()
        if title in peers or title in guided_peers
    }
    named = [*model_notes(bundle, get("checkpoint")), *weights_notes(files)]
    notes += [f"- {sentence}" for sentence in (*named, *missing)]
    text = ["# Comparison", "", *notes, "", evaluation.table(), "## Paired differences", ""]
    others = [*photographs, *control_default, *papers]
    text.append(paired_report(evaluation.rows, ours, list(peers), list(evaluation.scores), others))
    if ours_guided:
        text += ["## Paired differences, guided", ""]
        text.append(paired_report(evaluation.rows, ours_guided, list(guided_peers), list(evaluation.scores), sweep))
    if papers:
        text += ["## Paired differences, the paper's system", ""]
        text.append(paired_report(evaluation.rows, papers, list(peers), list(evaluation.scores), [*guided_peers]))
    tokenizer_path = Path(tokenizer or Path(bundle, "models", "tokenizer.pt"))
    if has_tokens or tokenizer is not None:
        network = read_config(bundle, {}, workflow="train").get_parsed_content("tokenizer_def")
        text += ["## Tokenizer", "", _tokenizer_section(network, tokenizer_path, evaluation, volumes, batch_size)]
    if paper is not None:
        network, path = paper_tokenizer(bundle), Path(paper, "tokenizer.pt")
        text += ["## Tokenizer of the paper", "", _tokenizer_section(network, path, evaluation, volumes, batch_size)]
    write_results_page(
        folder / "table.html",
        f"Comparison, {Path(bundle).name}",
        evaluation.rows,
        list(evaluation.scores),
        pictures,
        [note.removeprefix("- ") for note in [*notes, *evaluation.missing]],
        overwrite,
    )
    publish("\n".join(text), folder / "table.md", overwrite)


def weights_notes(files: Mapping[str, str | Path | None]) -> list[str]:
    """Return a note with the hash of each network's weights, by its title; None if the network is not there."""
    return [f"Weights of {title} (SHA-256): {weights_sha256(Path(file))}" for title, file in files.items() if file]


def _tokenizer_section(
    tokenizer: MSVQVAE,
    weights: Path,
    evaluation: SuperResolutionEvaluation,
    volumes: Sequence[SlicePairs],
    batch_size: int,
) -> str:
    """Return the report on a tokenizer, or a sentence if its weights are missing."""
    if not weights.is_file():
        return f"Left out: {weights.name} not found; train it (configs/train_stage1.json), and give --tokenizer.\n"
    load_weights(tokenizer, weights, "give --tokenizer.")
    metrics = [name for name in ("PSNR", "SSIM", "LPIPS") if name in evaluation.metrics]
    own = SuperResolutionEvaluation(evaluation.degradation, metrics, device=evaluation.device)
    return tokenizer_report(own, volumes, tokenizer.to(evaluation.device).eval(), batch_size)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")  # to stderr
    report_errors_in_one_sentence()
    fire.Fire(main)
