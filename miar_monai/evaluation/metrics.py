"""Image quality per slice: PSNR and SSIM, over the whole slice and within the body, and perceptual metrics.

All metrics take slices (N, 1, H, W) in [0, 1], clamped by the caller, and return N values. PSNR and SSIM need only
MONAI. LPIPS is that of its authors (``pip install lpips``), the other perceptual metrics are those of pyiqa (``pip
install miar-monai[metrics]``; its license is non-commercial). They need weight files, which are never downloaded.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics.regression import compute_ssim_and_cs
from scipy import ndimage
from torch import Tensor

from miar_monai.errors import ConfigurationError, MissingWeightsError

__all__ = ["METRICS", "Metric", "Score", "body_mask", "create_metrics", "load_model", "psnr", "ssim"]

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``score(sr, hr, body)``: from slices, true slices and body masks, each (N, 1, H, W), to values, (N,)."""

_SSIM_WINDOW = 11  # Wang et al. 2004: an 11 x 11 Gaussian window of sigma 1.5; MONAI's defaults


@dataclass(frozen=True)
class Metric:
    """A metric of the registry.

    Attributes:
        name: title of its column.
        higher_is_better: direction of improvement.
        decimals: decimals in tables.
        package: ``"lpips"`` or ``"pyiqa"``, or None for PSNR and SSIM.
        weights: required files, relative to the torch hub folder (``$TORCH_HOME/hub``).
        hub_weights: repository and file required in the Hugging Face cache, or None.
    """

    name: str
    higher_is_better: bool
    decimals: int = 4
    package: str | None = None
    weights: tuple[str, ...] = ()
    hub_weights: tuple[str, str] | None = None

    @property
    def needs_weights(self) -> bool:
        """Whether weight files are needed."""
        return bool(self.weights)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("PSNR", True, 2),
        Metric("SSIM", True),
        Metric("PSNR body", True, 2),
        Metric("SSIM body", True),
        # its linear layers are part of the package
        Metric("LPIPS", False, package="lpips", weights=("checkpoints/alexnet-owt-7be5be79.pth",)),
        Metric("ST-LPIPS", False, package="pyiqa", weights=("pyiqa/alex_shift_tolerant.pth",)),
        Metric(
            "DISTS",
            False,
            package="pyiqa",
            weights=("checkpoints/vgg16-397923af.pth", "pyiqa/DISTS_weights-f5e65c96.pth"),
        ),
        Metric("MUSIQ", True, 2, package="pyiqa", weights=("pyiqa/musiq_koniq_ckpt-e95806b9.pth",)),
        Metric(
            "MANIQA",
            True,
            package="pyiqa",
            weights=("pyiqa/ckpt_koniq10k.pt",),
            hub_weights=("timm/vit_base_patch8_224.augreg2_in21k_ft_in1k", "model.safetensors"),
        ),
    )
}
"""The paper's six metrics (Section 4.1), two within the body, and LPIPS that tolerates shifts."""


def psnr(sr: Tensor, hr: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the peak signal-to-noise ratio for a peak of 1, ``-10 log10(mean((sr - hr)^2))``, in dB.

    Args:
        sr: slices, (N, 1, H, W), in [0, 1].
        hr: true slices, (N, 1, H, W), in [0, 1].
        mask: voxels of the mean, bool, (N, 1, H, W); all by default.

    Returns:
        (N,). Infinite where both are equal, NaN where the mask is empty.

    Example:
        >>> psnr(torch.full((1, 1, 8, 8), 0.6), torch.full((1, 1, 8, 8), 0.5))
        tensor([20.0000])
    """
    error = (sr - hr) ** 2
    weight = torch.ones_like(error) if mask is None else mask.to(error)
    return -10 * torch.log10((error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)))


def ssim(sr: Tensor, hr: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the structural similarity: MONAI's SSIM map (data range 1), averaged.

    The map excludes the outer 5 voxels, where the window would cross the border.

    Args:
        sr: slices, (N, 1, H, W), in [0, 1]; H and W at least 11.
        hr: true slices, (N, 1, H, W), in [0, 1].
        mask: centers of the windows of the mean, bool, (N, 1, H, W); all by default.

    Returns:
        (N,). NaN where the mask is empty.

    Example:
        >>> hr = torch.rand(2, 1, 16, 16)
        >>> ssim(hr, hr)
        tensor([1., 1.])
    """
    window, sigma, border = (_SSIM_WINDOW,) * 2, (1.5, 1.5), _SSIM_WINDOW // 2
    with _exact_convolutions(sr.device):
        values, _ = compute_ssim_and_cs(sr, hr, spatial_dims=2, kernel_size=window, kernel_sigma=sigma, data_range=1.0)
    weight = torch.ones_like(values) if mask is None else mask[..., border:-border, border:-border].to(values)
    return (values * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))


@contextlib.contextmanager
def _exact_convolutions(device: torch.device) -> Iterator[None]:
    """Convolve in full float32: variances are differences of squares, and GPUs use 10 bits by default (TF32)."""
    previous = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = previous


def body_mask(hr: Tensor, threshold: float) -> Tensor:
    """Return the body in each slice: the largest connected component above a threshold, with its holes filled.

    Args:
        hr: true slices, (N, 1, H, W).
        threshold: intensity that the body exceeds and the background does not.

    Returns:
        bool, (N, 1, H, W), on the device of ``hr``; all False if no voxel exceeds the threshold.

    Example:
        >>> ring = torch.ones(1, 1, 3, 3)
        >>> ring[0, 0, 1, 1] = 0
        >>> int(body_mask(ring, 0.5).sum())
        9
    """
    masks = []
    for image in (hr > threshold).cpu().numpy()[:, 0]:
        labels, _ = ndimage.label(image)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        masks.append(ndimage.binary_fill_holes((labels == sizes.argmax()) & image))
    return torch.from_numpy(np.stack(masks))[:, None].to(hr.device)


def create_metrics(names: Sequence[str], device: torch.device | str = "cpu") -> tuple[dict[str, Score], list[str]]:
    """Create metrics of the registry, as far as they are available.

    Args:
        names: keys of `METRICS`.
        device: device of the perceptual metrics.

    Returns:
        The metrics by name, in the order of ``names``, and a sentence for each missing metric.

    Raises:
        ConfigurationError: if a name is unknown.

    Example:
        >>> scores, missing = create_metrics(["PSNR", "SSIM body"])
        >>> list(scores), missing
        (['PSNR', 'SSIM body'], [])
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigurationError(
            f"unknown metrics {unknown}: the known ones are {list(METRICS)}; correct the list of metrics."
        )
    scores, missing = {}, []
    for name in names:
        try:
            scores[name] = _FIDELITY[name] if name in _FIDELITY else _perceptual(METRICS[name], device)
        except MissingWeightsError as error:
            missing.append(str(error))
    return scores, missing


_FIDELITY: dict[str, Score] = {
    "PSNR": lambda sr, hr, body: psnr(sr, hr),
    "SSIM": lambda sr, hr, body: ssim(sr, hr),
    "PSNR body": psnr,
    "SSIM body": ssim,
}


def load_model(metric: Metric, device: torch.device | str = "cpu") -> Any:
    """Load the network of a metric with weights: a module of lpips or pyiqa, in evaluation mode.

    Args:
        metric: a perceptual metric.
        device: its device.

    Raises:
        MissingWeightsError: if the package or a file is missing, or a file is damaged.
    """
    _check_weights(metric)
    try:
        return _lpips(device) if metric.package == "lpips" else _pyiqa(metric.name, device)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise MissingWeightsError(
            f"{metric.name} is left out: its weights in {torch.hub.get_dir()} cannot be loaded ({error}); "
            "get the files again."
        ) from error


def _perceptual(metric: Metric, device: torch.device | str) -> Score:
    """Return a metric of lpips or pyiqa, for images in [0, 1]; no-reference metrics ignore the second image."""
    model = load_model(metric, device)
    if metric.package == "lpips":
        model = partial(model, normalize=True)

    @torch.no_grad()
    def score(sr: Tensor, hr: Tensor, body: Tensor) -> Tensor:
        rgb = (image.expand(-1, 3, -1, -1) for image in (sr, hr))
        return torch.as_tensor(model(*rgb)).reshape(len(sr))

    return score


def _lpips(device: torch.device | str) -> Any:
    """Return LPIPS 0.1 with AlexNet."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it uses a deprecated argument of torchvision
        return lpips.LPIPS(net="alex", verbose=False).to(device).eval()


def _pyiqa(name: str, device: torch.device | str) -> Any:
    """Return a metric of pyiqa."""
    import pyiqa

    with contextlib.redirect_stdout(io.StringIO()):  # pyiqa prints the paths of its weights
        return pyiqa.create_metric(name.lower().replace("-", ""), device=torch.device(device))


_INSTALL = {
    "lpips": "pip install lpips",
    "pyiqa": "pip install miar-monai[metrics] (its license is non-commercial)",
}


def _check_weights(metric: Metric) -> None:
    """Check that the files are present that lpips or pyiqa would otherwise download.

    Raises:
        MissingWeightsError: if the package or a file is missing.
    """
    if metric.package is not None and find_spec(metric.package) is None:
        raise MissingWeightsError(
            f"{metric.name} is left out: {metric.package} is not installed; install it with {_INSTALL[metric.package]}."
        )
    hub = Path(torch.hub.get_dir())
    absent = [str(hub / file) for file in metric.weights if not (hub / file).is_file()]
    if metric.hub_weights is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(*metric.hub_weights), str):
            absent.append(f"{'/'.join(metric.hub_weights)} in the Hugging Face cache")
    if absent:
        raise MissingWeightsError(
            f"{metric.name} is left out: its weights {' and '.join(absent)} are missing; put them there, "
            "or set TORCH_HOME to the folder whose subfolder hub holds them."
        )
