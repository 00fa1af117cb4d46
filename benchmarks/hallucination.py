"""Detail that is plausible but not true: where it is, how often, and how plausible.

    python -m benchmarks.hallucination --dataset_dir BraTS --split_file split.json --output_dir hallucination_output \
        [--bundle bundles/miar_brats] [--contrasts t1,t2] [--peers_dir runs/peers] [--num_slices 40] [--every 4] \
        [--checkpoint runs/posterior/model.pt --noise_channels 2] [--device cuda:0] ...

Where and how often: scanning Fourier ring correlation (`miar_monai.evaluation.ring_correlation`) of patches. How
plausible: the Fréchet distance between the features of the results and those of the truths
(`miar_monai.evaluation.frechet`). The methods are MIAR at fidelities from 0 to 1, one posterior sample if the network
samples, and the peers with weights, with and without data consistency; the linear inverse and the detail of the mirror
image are the controls. Writes ``hallucination.csv`` (a row for each patient, contrast, slice and method),
``hallucination.md``, and ``hallucination.png``, the patches of one slice. Needs the extras demo and bench, and the
weights of LPIPS for the Fréchet distance.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import (
    Method,
    batches,
    commit,
    consistent_title,
    every_nth,
    load_network,
    machine,
    open_run,
    publish,
    write_csv,
)
from benchmarks.correlation_scans import CEILING, FLOOR, Limits, Scans
from benchmarks.frechet import EXPLANATION, FeatureSets
from benchmarks.peers.loading import load_peers
from benchmarks.posterior import SAMPLE
from benchmarks.table import miar_inferers
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs, patients_note
from miar_monai.errors import MissingWeightsError, report_errors_in_one_sentence
from miar_monai.evaluation import SuperResolutionEvaluation
from miar_monai.evaluation.frechet import alexnet_features
from miar_monai.evaluation.metrics import body_mask
from miar_monai.evaluation.ring_correlation import CUTOFF, PATCH_SIDE, THRESHOLD
from miar_monai.networks import MIAR, SuperResolutionNetwork

logger = logging.getLogger(__name__)

RESULTS = ("hallucination.csv", "hallucination.md", "hallucination.png")


@torch.inference_mode()
def measure(
    volumes: Sequence[SlicePairs],
    methods: Mapping[str, Method],
    peers: Mapping[str, Method],
    evaluation: SuperResolutionEvaluation,
    scans: Scans,
    sets: FeatureSets | None,
    batch_size: int,
    every: int = 1,
    amp: bool = False,
) -> None:
    """Measure every n-th slice of volumes by all methods, by the peers with data consistency, and by `CEILING`.

    Args:
        volumes: all slices.
        methods: methods by name.
        peers: further methods, which also have a row with data consistency.
        evaluation: has the degradation and the device.
        scans: gets the slices.
        sets: gets their features, if it is given.
        batch_size: number of slices in a batch.
        every: n.
        amp: run the methods in bfloat16.
    """
    for volume in tqdm(every_nth(volumes, every), desc="measuring", unit="volume"):
        for slices, lr, hr in batches(volume, batch_size, evaluation.device):
            with torch.autocast(evaluation.device.type, torch.bfloat16, enabled=amp):
                results = {name: method(lr) for name, method in {**methods, **peers}.items()}
            estimates = {name: sr.as_subclass(Tensor).float() for name, sr in results.items()}
            estimates |= {consistent_title(name): evaluation.make_consistent(estimates[name], lr) for name in peers}
            estimates[CEILING] = evaluation.make_consistent(hr.flip(2), lr)
            body = body_mask(hr.clamp(0, 1), evaluation.body_threshold)
            numbers = [every // 2 + every * i for i in slices]  # as in other tables
            scans.add(estimates, hr, body, volume.subject, numbers, volume.contrast)
            if sets is not None:
                sets.add(estimates, hr, body, volume.subject)


def one_sample(network: SuperResolutionNetwork, generator: torch.Generator, lr: Tensor) -> Tensor:
    """Return a posterior sample of each LR slice (N, 1, h, w): (N, 1, H, W)."""
    operator = network.degradation.for_lr(lr)
    return network.posterior_samples(lr, network.white_noise(operator, (len(lr), 1), generator), operator)


def methods_of(
    bundle: str,
    given: Mapping[str, Any],
    network: SuperResolutionNetwork,
    evaluation: SuperResolutionEvaluation,
    seed: int,
) -> tuple[dict[str, Method], str]:
    """Return the linear inverse and the methods of MIAR, and the one to be compared: the sample, or else fidelity 0.

    Args:
        bundle: folder of the bundle.
        given: values of keys of its ``evaluate.json``.
        network: the network.
        evaluation: has the linear inverse.
        seed: seed of the sample.
    """
    inferers, sweep, _ = miar_inferers(bundle, given, isinstance(network, MIAR))
    methods: dict[str, Method] = {FLOOR: evaluation.baseline_methods[FLOOR]}
    methods |= {name: partial(inferers[name], network=network) for name in sweep}
    if network.noise_channels:
        methods[SAMPLE] = partial(one_sample, network, torch.Generator().manual_seed(seed))
    return methods, SAMPLE if network.noise_channels else sweep[0]


def main(
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "hallucination_output",
    contrasts: str | Sequence[str] | None = None,
    peers_dir: str | None = None,
    every: int = 1,
    patch_side: int = PATCH_SIDE,
    threshold: float = THRESHOLD,
    cutoff: float = CUTOFF,
    sample_seed: int = 0,
    **settings: Any,
) -> None:
    """Scan the results of MIAR and of its peers, and measure the Fréchet distance of their features.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of the results.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        peers_dir: see `benchmarks.table`.
        every: n; every n-th slice is measured.
        patch_side: side of the patches in voxels.
        threshold: of the correlation.
        cutoff: share of the Nyquist frequency, below which a lost correlation is labelled.
        sample_seed: seed of the noise of the sample.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, checkpoint, noise_channels,
            num_slices, sw_batch_size, overwrite, amp, ...

    Raises:
        SettingError: if a setting is out of range.
        ConfigurationError: if the slices are smaller than a patch.
    """
    limits = Limits(patch_side, threshold, cutoff)
    limits.check()
    config, given = open_run(bundle, dataset_dir, output_dir, contrasts, settings, RESULTS)
    get, folder = config.get_parsed_content, Path(output_dir)
    evaluation, overwrite = get("evaluation"), get("overwrite")
    network = load_network(config)
    loaded, notes = load_peers(bundle, peers_dir)
    peers = {name: peer.to(evaluation.device).eval() for name, peer in loaded.items()}
    methods, ours = methods_of(bundle, given, network, evaluation, sample_seed)
    sets = None
    try:
        sets = FeatureSets(alexnet_features(evaluation.device))
    except MissingWeightsError as error:
        notes.append(str(error))
    for sentence in notes:
        logger.warning(sentence)

    volumes, scans = load_slice_pairs(config), Scans(limits, ours)
    measure(volumes, methods, peers, evaluation, scans, sets, get("sw_batch_size"), every, get("amp"))
    write_csv(scans.rows, folder / RESULTS[0], overwrite)
    scans.draw(folder / RESULTS[2], overwrite)
    by = f"Bundle {Path(bundle).name}, {Path(get('checkpoint')).name}, commit {commit()}, {machine(evaluation.device)}."
    which = f"{patients_note(config, volumes)} One in {every} of the {get('num_slices')} slices of a volume."
    lines = [f"- {sentence}" for sentence in (by, which, *notes)]
    text = ["# Hallucination", "", *lines, "", scans.report(1 / evaluation.degradation.scale)]
    if sets is not None:
        text += ["## Fréchet distance", "", EXPLANATION, "", sets.table(ours), ""]
    publish("\n".join(text), folder / RESULTS[1], overwrite)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_errors_in_one_sentence()
    fire.Fire(main)
