"""How far results hold when slices are not what the networks were trained for, and what the tokens add to them.

    python -m benchmarks.robustness --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        --output_dir robustness_output [--contrasts t1,t2] [--peers_dir runs/peers] [--num_slices 8] ...

The LR slices of a bundle's ``evaluate.json`` are rounded, made noisy or blurred otherwise; MIAR measures their blur, as
it does for users, and is given the truth where the blur is another one than the training's. The HR slices are softened
and sharpened too, as another reconstruction kernel of a CT scanner would. With these and with the slices as they should
be, MIAR is measured without its tokens too, whose latents are then zero: the difference is what predicting them is
worth. It writes ``robustness.md``. The patients are those of the validation section unless ``section`` says otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from monai.transforms import GaussianSharpen, GaussianSmooth
from torch import Tensor

from benchmarks.table import Method, Volume, batches, load_peers, load_volumes, open_run, provenance, publish
from miar_monai.degradation import Degradation, with_blurs
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.evaluation import SuperResolutionEvaluation
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.networks import MIAR
from miar_monai.networks.results import Prediction
from miar_monai.networks.weights import load_weights

RESULT = "robustness.md"
METRICS = ("PSNR", "SSIM", "LPIPS")


def rounded(levels: int, lr: Tensor) -> Tensor:
    """Round intensities to so many steps in [0, 1]."""
    return (lr * (levels - 1)).round() / (levels - 1)


def noisy(level: float, lr: Tensor) -> Tensor:
    """Add white Gaussian noise of this standard deviation, the same in each run."""
    return lr + level * torch.randn(lr.shape, generator=torch.Generator().manual_seed(0))


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "12 bits": partial(rounded, 2**12),
    "10 bits": partial(rounded, 2**10),
    "8 bits": partial(rounded, 2**8),
    "noise 0.003": partial(noisy, 0.003),
    "noise 0.01": partial(noisy, 0.01),
}
BLURS = (0.0, 0.5, 0.9, 0.95, 1.05, 1.1)
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "Truth softened": GaussianSmooth(0.6),
    "Truth sharpened": GaussianSharpen(sigma1=0.3, sigma2=0.8, alpha=1.5),
    "Truth sharpened strongly": GaussianSharpen(sigma1=0.3, sigma2=0.8, alpha=3.0),
}


@torch.inference_mode()
def without_tokens(network: MIAR, fidelity: float, lr: Tensor) -> Tensor:
    """Return what the network makes of LR slices (N, 1, h, w), one tile each, if the latents of its tokens are zero."""
    side = network.schedule.latent_side
    latents = lr.new_zeros(len(lr), network.quantizer.latent_channels, side, side)

    def predict(linear: Tensor, condition: Tensor) -> Prediction:
        return Prediction(network.decode(latents, network.features(linear, condition)))

    return network.super_resolve(lr, fidelity=fidelity, predict=predict).image


def with_kernel(kernel: Callable[[Tensor], Tensor], degradation: Degradation, volume: Volume) -> Volume:
    """Return a volume as another reconstruction kernel would have made it, and its LR slices."""
    hr = kernel(volume.hr.squeeze(1)).unsqueeze(1).clamp(min=0)
    return volume._replace(hr=hr, lr=degradation(hr))


def with_blur(inferer: BeamSearchInferer, network: MIAR, blur: float | str) -> Method:
    """Return the method of an inferer that is given the blur of its input, or measures it."""
    other = copy(inferer)
    other.blur = blur
    return partial(other, network=network)


@torch.inference_mode()
def section(
    title: str,
    volumes: Sequence[Volume],
    methods: Mapping[str, Method],
    evaluation: SuperResolutionEvaluation,
    batch_size: int,
) -> str:
    """Return, as Markdown, what methods make of the LR slices of some volumes.

    Args:
        title: of the section.
        volumes: the slices.
        methods: by name.
        evaluation: measures and collects; what it had collected is dropped.
        batch_size: slices that a method takes at once.
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
    """Measure MIAR, the regressors among its peers and bicubic on LR slices that are not as they should be.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: where ``robustness.md`` is written.
        contrasts: of a BraTS folder; the bundle's by default.
        peers_dir: folder with ``swinir.pt`` and ``rcan.pt``; a missing one is left out.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, checkpoint, num_slices, ...
    """
    settings = {"section": "validation", "metrics": list(METRICS), **settings}
    config, _ = open_run(bundle, dataset_dir, output_dir, contrasts, settings, [RESULT])
    get = config.get_parsed_content
    evaluation, inferer, batch_size = get("evaluation"), get("inferer"), get("sw_batch_size")
    hint = "train the bundle (see its docs/README.md), or give --checkpoint."
    network = load_weights(get("network"), get("checkpoint"), hint).to(evaluation.device).eval()
    peers, _ = load_peers(bundle, peers_dir, Path("none"))
    common: dict[str, Method] = {"bicubic": evaluation.baseline_methods["bicubic"]}
    common |= {name: peer.to(evaluation.device).eval() for name, peer in peers.items()}
    common["MIAR"] = with_blur(inferer, network, "auto")
    volumes, own = load_volumes(config), network.degradation

    def measured(title: str, fault: Callable[[Volume], Volume], more: Mapping[str, Method]) -> str:
        faulty = [fault(volume) for volume in volumes]
        with torch.autocast(evaluation.device.type, torch.bfloat16, enabled=get("amp")):
            return section(title, faulty, {**common, **more}, evaluation, batch_size)

    bare = {"MIAR without tokens": partial(without_tokens, network, inferer.fidelity)}
    parts = [measured("As in training", lambda volume: volume, bare)]
    parts += [measured(title, partial(with_kernel, kernel, own), bare) for title, kernel in KERNELS.items()]
    for title, fault in FAULTS.items():
        parts.append(measured(title, lambda volume, fault=fault: volume._replace(lr=fault(volume.lr)), {}))
    for blur in with_blurs(own, BLURS)[1:]:
        more = {"MIAR, given the blur": with_blur(inferer, network, blur.lr_sigma)}
        title = f"Blur {blur.sigma:g} instead of {own.sigma:g}"
        parts.append(measured(title, lambda volume, blur=blur: volume._replace(lr=blur(volume.hr)), more))
    notes = provenance(bundle, config, volumes, batch_size)[:2]
    publish("\n".join(["# Robustness", "", *notes, "", *parts]), Path(output_dir, RESULT), get("overwrite"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # to stderr; the network's doubts are expected
    report_errors_in_one_sentence()
    fire.Fire(main)
