"""RCAN on thick slices, as a method of `benchmarks.through_plane`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import consistent_title
from benchmarks.peers.loading import THROUGH_PLANE, TITLES, peer_config
from benchmarks.thick_slices import ThickSlices
from benchmarks.through_plane_methods import DAMPING, ThinSlices, VolumeMethod
from miar_monai.degradation import AxisDegradation, Degradation
from miar_monai.errors import ConfigurationError
from miar_monai.networks.weights import load_weights

__all__ = ["rcan_method", "thin_slices"]

_BATCH_SIZE = 16  # slices


@torch.inference_mode()
def thin_slices(network: Callable[[Tensor], Tensor], thick: Tensor, device: torch.device) -> Tensor:
    """Return the mean of sagittal and coronal super-resolution of a volume, as `miar_monai` averages the two planes.

    Args:
        network: maps slices (N, 1, h, w) to (N, 1, h, W).
        thick: volume in RAS orientation, in network intensities, (X, Y, z).
        device: of the network.

    Returns:
        (X, Y, Z).

    Example:
        >>> thin_slices(lambda lr: lr.repeat_interleave(3, -1), torch.rand(4, 5, 2), torch.device("cpu")).shape
        torch.Size([4, 5, 6])
    """

    def plane(slices: Tensor) -> Tensor:
        batches = slices[:, None].split(_BATCH_SIZE)
        return torch.cat([network(batch.to(device)).float().to(slices.device) for batch in batches])[:, 0]

    sagittal, coronal = plane(thick), plane(thick.transpose(0, 1)).transpose(0, 1)
    return (sagittal + coronal) / 2


def rcan_method(bundle: str, weights: str | Path, cases: Sequence[ThickSlices], device: torch.device) -> VolumeMethod:
    """Return RCAN, trained for slices of one thickness and gap, with results without and with data consistency.

    The data consistency is that of the assumed degradation. Other slices are left out.

    Args:
        bundle: folder of the bundle with whose data it was trained.
        weights: weights of the peer ``rcan_through_plane``.
        cases: the volumes.
        device: where it runs.

    Raises:
        CheckpointError: if the weights are missing, damaged, or of another network.
        ConfigurationError: if it was trained for none of the cases.
    """
    config = peer_config(bundle, THROUGH_PLANE)
    network, degradation = (config.get_parsed_content(key) for key in ("network_def", "degradation"))
    scaling = config.get_parsed_content("intensity_transforms")[0].transform
    load_weights(network, weights, "train it first, see benchmarks/peers/README.md.").to(device).eval()
    fits = {case.name: _same_slices(degradation, case.degradation) for case in cases}
    if not any(fits.values()):
        axis, titles = _across(degradation), ", ".join(dict.fromkeys(case.title for case in cases))
        raise ConfigurationError(
            f"{weights} is for slices {axis.factor:g} voxels apart and {axis.factor * axis.thickness:g} voxels thick, "
            f"but there are only slices of {titles} mm; give other --slices."
        )

    def super_resolve(case: ThickSlices) -> dict[str, ThinSlices]:
        if not fits[case.name]:
            return {}
        start = time.perf_counter()
        thick = torch.from_numpy(case.thick.array)
        low, high = scaling.window(thick)
        lr = (thick - low) / (high - low)
        sr, results = thin_slices(network, lr, device), {}
        for title, correct in ((TITLES["rcan"], False), (consistent_title(TITLES["rcan"]), True)):
            thin = _consistent(sr, lr, case.degradation) if correct else sr
            results[title] = ThinSlices((thin * (high - low) + low).numpy(), time.perf_counter() - start)
        return results

    return super_resolve


def _across(degradation: Degradation) -> AxisDegradation:
    """Return the degradation across the slices, without sizes."""
    return degradation.axes((1, 1), (1, 1))[1]


def _same_slices(one: Degradation, other: Degradation) -> bool:
    """Return whether two degradations make the same thick slices, but for rounding."""
    a, b = _across(one), _across(other)
    return a.profile == b.profile and np.allclose((a.factor, a.thickness), (b.factor, b.thickness))


def _consistent(sr: Tensor, lr: Tensor, degradation: Degradation) -> Tensor:
    """Return the volume closest to ``sr``, (X, Y, Z), that degrades to ``lr``, (X, Y, z), line by line."""
    thin, thick = (volume.double().flatten(0, 1)[:, None] for volume in (sr, lr))  # (X · Y, 1, Z or z)
    return degradation.for_lr(thick).prox(thin, thick, DAMPING).reshape(sr.shape).float()
