"""Quality on slices that differ from those of the training, with and without tokens.

    python -m benchmarks.robustness --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        --output_dir robustness_output [--contrasts t1,t2] [--peers_dir runs/peers] [--num_slices 8] ...

The LR slices of a bundle's ``evaluate.json`` are rounded, made noisy or blurred differently. MIAR measures their blur,
as for users; where the blur differs from that of the training, it is also given the true blur. The HR slices are
softened and sharpened, as by another reconstruction kernel of a CT scanner. On these and on the unchanged slices, a
network with tokens is also measured without them (latents of zero), to show the benefit of predicting them. Writes
``robustness.md``. The patients are those of the validation section by default.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from monai.transforms import GaussianSharpen, GaussianSmooth
from torch import Tensor

from benchmarks.common import Method, batches, load_network, open_run, provenance, publish
from benchmarks.peers.loading import TITLES, load_peers
from miar_monai.cli.fit_uncertainty import add_noise
from miar_monai.cli.workflow import SlicePairs, load_slice_pairs
from miar_monai.degradation import Degradation
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.evaluation import SuperResolutionEvaluation
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.networks import MIAR, SuperResolutionNetwork
from miar_monai.networks.results import Prediction

RESULT = "robustness.md"
METRICS = ("PSNR", "SSIM", "LPIPS")


def quantize(levels: int, lr: Tensor) -> Tensor:
    """Round intensities to this number of levels in [0, 1]."""
    return (lr * (levels - 1)).round() / (levels - 1)


PERTURBATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "12 bits": partial(quantize, 2**12),
    "10 bits": partial(quantize, 2**10),
    "8 bits": partial(quantize, 2**8),
    "noise 0.003": partial(add_noise, 0.003),
    "noise 0.01": partial(add_noise, 0.01),
}
BLURS = (0.0, 0.5, 0.9, 0.95, 1.05, 1.1)
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "Truth softened": GaussianSmooth(0.6),
    "Truth sharpened": GaussianSharpen(sigma1=0.3, sigma2=0.8, alpha=1.5),
    "Truth sharpened strongly": GaussianSharpen(sigma1=0.3, sigma2=0.8, alpha=3.0),
}


@torch.inference_mode()
def without_tokens(network: MIAR, fidelity: float, lr: Tensor) -> Tensor:
    """Return the SR slices of the network for LR slices (N, 1, h, w) of one tile, with zeros for the token latents."""
    side = network.schedule.latent_side
    latents = lr.new_zeros(len(lr), network.quantizer.latent_channels, side, side)

    def predict(linear: Tensor, condition: Tensor) -> Prediction:
        return Prediction(network.decode(latents, network.features(linear, condition)))

    return network.super_resolve(lr, fidelity=fidelity, predict=predict).image


def with_kernel(kernel: Callable[[Tensor], Tensor], degradation: Degradation, volume: SlicePairs) -> SlicePairs:
    """Apply another reconstruction kernel to a volume, and degrade it again."""
    hr = kernel(volume.hr.squeeze(1)).unsqueeze(1).clamp(min=0)
    return volume._replace(hr=hr, lr=degradation(hr))


def with_blur(inferer: BeamSearchInferer, network: SuperResolutionNetwork, blur: float | str) -> Method:
    """Return an inferer as a method, with a given blur or with ``"auto"``."""
    other = copy(inferer)
    other.blur = blur
    return partial(other, network=network)


@torch.inference_mode()
def measured_section(
    title: str,
    volumes: Sequence[SlicePairs],
    methods: Mapping[str, Method],
    evaluation: SuperResolutionEvaluation,
    batch_size: int,
) -> str:
    """Measure methods on some volumes, and return a section of Markdown.

    Args:
        title: title of the section.
        volumes: the slices.
        methods: methods by name.
        evaluation: collects the rows; existing rows are dropped.
        batch_size: number of slices in a batch.
    """
    evaluation.rows.clear()
    for volume in volumes:
        for slices, lr, hr in batches(volume, batch_size, evaluation.device):
            estimates = {name: method(lr).float() for name, method in methods.items()}
            evaluation.add(estimates, hr, volume.subject, slices)
    lines = [line for line in evaluation.table().splitlines() if line.startswith("|")]
    return "\n".join([f"### {title}", "", *lines, ""])


def main(
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "robustness_output",
    contrasts: str | Sequence[str] | None = None,
    peers_dir: str | None = None,
    **settings: Any,
) -> None:
    """Measure MIAR, bicubic interpolation and the regression networks among the peers on perturbed slices.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: folder of ``robustness.md``.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        peers_dir: folder with ``swinir.pt`` and ``rcan.pt``; missing peers are left out.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, checkpoint, num_slices, ...
    """
    settings = {"section": "validation", "metrics": list(METRICS), **settings}
    config, _ = open_run(bundle, dataset_dir, output_dir, contrasts, settings, [RESULT])
    get = config.get_parsed_content
    evaluation, inferer, batch_size = get("evaluation"), get("inferer"), get("sw_batch_size")
    network = load_network(config).to(evaluation.device)
    peers, _ = load_peers(bundle, peers_dir, {peer: TITLES[peer] for peer in ("swinir", "rcan")})
    common: dict[str, Method] = {"bicubic": evaluation.baseline_methods["bicubic"]}
    common |= {name: peer.to(evaluation.device).eval() for name, peer in peers.items()}
    common["MIAR"] = with_blur(inferer, network, "auto")
    volumes, training = load_slice_pairs(config), network.degradation

    def measured(title: str, perturb: Callable[[SlicePairs], SlicePairs], more: Mapping[str, Method]) -> str:
        perturbed = [perturb(volume) for volume in volumes]
        with torch.autocast(evaluation.device.type, torch.bfloat16, enabled=get("amp")):
            return measured_section(title, perturbed, {**common, **more}, evaluation, batch_size)

    bare: dict[str, Method] = {}
    if isinstance(network, MIAR):
        bare["MIAR without tokens"] = partial(without_tokens, network, inferer.fidelity)
    parts = [measured("As in training", lambda volume: volume, bare)]
    parts += [measured(title, partial(with_kernel, kernel, training), bare) for title, kernel in KERNELS.items()]
    for title, change in PERTURBATIONS.items():
        parts.append(measured(title, lambda volume, change=change: volume._replace(lr=change(volume.lr)), {}))
    for sigma in BLURS:
        degradation = replace(training, sigma=sigma)
        more = {"MIAR, given the blur": with_blur(inferer, network, degradation.lr_sigma)}
        title = f"Blur {sigma:g} instead of {training.sigma:g}"
        parts.append(measured(title, lambda volume, new=degradation: volume._replace(lr=new(volume.hr)), more))
    notes = provenance(bundle, config, volumes, batch_size)[:2]
    publish("\n".join(["# Robustness", "", *notes, "", *parts]), Path(output_dir, RESULT), get("overwrite"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # to stderr; warnings on noise are expected
    report_errors_in_one_sentence()
    fire.Fire(main)
