"""Measurements that the benchmarks of speed share: durations, memory, operations, and slices to run on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.transforms import ResizeWithPadOrCrop
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from miar_monai.cli.demo import template
from miar_monai.evaluation.metrics import psnr
from miar_monai.inference.resolver import SuperResolver
from miar_monai.networks import MIAR, SuperResolutionNetwork
from miar_monai.networks.decoding import Decoding
from miar_monai.transforms import CentralSlices, LoadVolume, ScaleIntensityRobust

WARM_UP = 8
TILE = 256
"""Side of the slices of the benchmarks on the HR grid, for networks without tiles; the shipped `MIAR` has this one."""
_FLOPS = {**flop_registry, torch.ops.aten._addmm_activation: flop_registry[torch.ops.aten.addmm]}


class OperationCounter(TorchDispatchMode):
    """Counts operations, their floating-point operations, and the bytes that they read and write.

    Views and allocations are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.flops = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and "empty" not in func.name():
            count = _FLOPS.get(func.overloadpacket)
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.operations += 1
            self.flops += count(*args, **kwargs, out_val=result) if count else 0
            self.bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return result


def median_ms(step: Callable[[], object], device: torch.device, repeats: int, warm_up: int = WARM_UP) -> float:
    """Return the median duration of a step after a warm-up for compilation and recording; on a GPU by CUDA events.

    Args:
        step: the step.
        device: where it runs.
        repeats: number of timed calls.
        warm_up: number of calls before them.
    """
    times = []
    for _ in range(warm_up + repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[warm_up:])


def product_ceiling(device: torch.device, side: int) -> float:
    """Return the floating-point operations per second of a product of square matrices in bfloat16."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * side**3 / median_ms(partial(torch.mm, a, b), device, 10, 3)


def agreement_db(images: Tensor, reference: Tensor) -> float:
    """Return the PSNR of images relative to a reference, over all voxels together, in dB; at most 120."""
    x, y = (part.float().reshape(1, 1, 1, -1) for part in (images, reference))
    return float(psnr(x, y).clamp(max=120))


class PeakMemory:
    """Measures the peak memory of a block in MiB, as ``mib``: of the GPU, or on Linux of the whole process.

    Args:
        device: the device; elsewhere than on a GPU and Linux, ``mib`` is NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib = float("nan")

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        elif Path("/proc/self/clear_refs").exists():
            self.mib = peak_bytes() / 2**20


def peak_bytes(pid: int | str = "self") -> int:
    """Return the peak of the resident memory of a process in bytes, on Linux; 0 of one that has ended."""
    return _status(pid, "VmHWM:")


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes, on Linux."""
    return _status("self", "VmRSS:")


def _status(pid: int | str, name: str) -> int:
    """Return the bytes of a line in the status of a process, 0 without one."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 2**10 for line in lines if line.startswith(name)), 0)


def slice_side(network: SuperResolutionNetwork) -> int:
    """Return the side of one tile of a network on the HR grid, or `TILE` for a network without tiles."""
    return network.side or TILE


def lookahead_cases(
    network: SuperResolutionNetwork, lookaheads: Sequence[int]
) -> list[tuple[dict[str, Any], Decoding]]:
    """Return the decodings to measure, each with its columns in a table: one without columns if there are no tokens.

    Args:
        network: the network.
        lookaheads: the paper's K; 0 is greedy.

    Example:
        >>> from miar_monai.networks import Estimator
        >>> [columns for columns, _ in lookahead_cases(Estimator(channels=[8], blocks=[1]), (0, 3))]
        [{}]
    """
    if not isinstance(network, MIAR):
        return [({}, Decoding())]
    return [({"K": k}, Decoding("beam", k)) for k in lookaheads]


def brain_slices(resolver: SuperResolver, count: int = 40, side: int | None = None) -> Tensor:
    """Return LR slices of the demo's brain, in network intensities.

    Args:
        resolver: the model, whose degradation is used.
        count: number of slices.
        side: LR voxels along both axes; those of one tile (`slice_side`) by default.

    Returns:
        (count, 1, side, side).
    """
    hr_side = slice_side(resolver.network) if side is None else 4 * side
    hr = ScaleIntensityRobust()(CentralSlices(40)(LoadVolume()(str(template())))).as_tensor()
    padded = ResizeWithPadOrCrop((hr_side, hr_side, -1))(hr)
    slices = convert_to_tensor(padded).movedim(-1, 0).contiguous()  # a plain tensor: a MetaTensor is slower
    lr = resolver.network.degradation(slices).to(resolver.device)  # (40, 1, side, side)
    return lr.repeat(-(-count // len(lr)), 1, 1, 1)[:count]
