"""Inference and the limits of the hardware: operations and bytes, measured ceilings, and time by kind of kernel.

    python -m benchmarks.bench_floor [--bundle bundles/miar_brats] [--device cuda:0] [--batch_sizes 1,64] \
        [--lookaheads 0,3] [--lookahead_scales 0,8] [--output_dir bench_output]

Writes ``floor.md``. For each batch size and, if the network has tokens, lookahead and number of scales with lookahead
(0: all), in bfloat16:
floating-point operations, bytes that PyTorch operations read and write (each on its own; fused operations move less),
number of operations, the time of both at the ceilings of the machine, and the measured time, on a GPU as one CUDA
graph; then the time by kind of kernel. The ceilings are those of a large matrix product and of a large copy, measured
in the same run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fire
import torch
from monai.utils import ensure_tuple
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.common import Row, commit, machine, publish, result_files, rows_table
from benchmarks.measuring import WARM_UP, OperationCounter, brain_slices, median_ms, product_ceiling
from miar_monai.acceleration import layers as fused_layers
from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.inference.devices import choose_device
from miar_monai.inference.resolver import SuperResolver
from miar_monai.networks import MIAR
from miar_monai.networks.decoding import Decoding

KINDS = {
    "attention": ("fmha", "flash", "attention", "softmax"),
    "convolutions": ("conv", "implicit", "xmma_fprop", "fprop", "dgrad", "winograd", "im2col"),
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "splitk"),
    "normalization": ("norm", "rowwisemoments", "welford"),
    "copies, casts and gathers": ("copy", "cat", "index", "gather", "memcpy", "memset", "scatter"),
    "reductions": ("reduce", "argmax", "topk", "sort"),
    "elementwise": ("elementwise", "vectorized", "upsample", "shuffle"),
}
"""Kinds of kernels by parts of their names; the first match counts."""


def copy_ceiling(device: torch.device, side: int) -> float:
    """Return the bytes per second, read and written, of a copy of ``side²`` float32 numbers."""
    source, target = (torch.empty(side, side, device=device) for _ in range(2))
    return 2e3 * source.nbytes / median_ms(partial(target.copy_, source), device, 10, 3)


@contextmanager
def own_kernels(counter: OperationCounter) -> Iterator[None]:
    """Also count the reads and writes of the Triton kernels, which PyTorch does not see."""

    def counting(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            result = kernel(*args)
            counter.operations += 1
            counter.bytes += sum(x.nbytes for x in tree_leaves((args, result)) if isinstance(x, Tensor))
            return result

        return counted

    with ExitStack() as stack:
        kernels = fused_layers.triton_kernels
        for name in kernels.__all__ if kernels else ():
            stack.enter_context(patch.object(kernels, name, counting(getattr(kernels, name))))
        yield


def measure(
    resolver: SuperResolver, batch_sizes: Sequence[int], decodings: Sequence[Decoding], side: int
) -> tuple[list[Row], list[Row], tuple[float, float]]:
    """Return the rows of both tables, and the ceilings of operations and of bytes."""
    device, network = resolver.device, resolver.network
    limits = product_ceiling(device, side), copy_ceiling(device, side)
    layers = network.cast(torch.bfloat16)
    rows, kinds = [], []
    has_tokens = isinstance(network, MIAR)
    for decoding in decodings if has_tokens else (Decoding(),):
        settings = {"K": decoding.lookahead_tokens, "scales": decoding.lookahead_scales} if has_tokens else {}
        for size in batch_sizes:
            case: Row = {**settings, "batch": size}
            observed = network.observe(brain_slices(resolver, size))

            def predict(images: Tensor, condition: Tensor, decoding: Decoding = decoding) -> dict[str, Tensor]:
                return {"maps": layers.predict(images, condition, decoding).maps}

            inputs = (observed.images, network.condition(observed).expand(size, -1, -1, -1))
            # inference mode would hide operations from the counter
            with torch.no_grad(), OperationCounter() as work, own_kernels(work):
                predict(*inputs)
            with torch.inference_mode():
                cuda = device.type == "cuda"
                run = partial(CUDAGraphed(predict), *inputs)
                ms = median_ms(run, device, 20 if cuda else 1, WARM_UP if cuda else 1)
                kinds.append({**case, **profile(run, device)})
            arithmetic, memory = 1e3 * work.flops / limits[0], 1e3 * work.bytes / limits[1]
            rows.append({
                **case, "GFLOP": work.flops / 1e9, "GB moved": work.bytes / 1e9,
                "operations": work.operations, "ms of arithmetic": arithmetic, "ms of memory": memory,
                "ms": ms, "times the floor": ms / max(arithmetic, memory),
            })  # fmt: skip
    return rows, kinds, limits


def profile(run: Any, device: torch.device) -> Row:
    """Return the milliseconds of each kind of kernel in one call, and the number of kernels; empty on a CPU."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    count = 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
            times[kind] += event.time_range.elapsed_us() / 1e3
            count += 1
    return {"kernels": count, **{kind: times[kind] for kind in (*KINDS, "other")}}


def main(
    bundle: str = "bundles/miar_brats",
    device: str = "auto",
    batch_sizes: int | Sequence[int] = (1, 64),
    lookaheads: int | Sequence[int] = (0, 3),
    lookahead_scales: int | Sequence[int] = (0, 8),
    side: int = 8192,
    output_dir: str = "bench_output",
    overwrite: bool = False,
) -> None:
    """Count, measure and write.

    Args:
        bundle: folder of the bundle, with its weights.
        device: auto, cpu, cuda, cuda:<index> or mps.
        batch_sizes: numbers of slices of one tile in a batch.
        lookaheads: the paper's K; 0 is greedy. Without effect on a network without tokens.
        lookahead_scales: numbers of scales with lookahead, 0 for all. Likewise.
        side: of the matrices whose product gives the ceiling.
        output_dir: folder of ``floor.md``.
        overwrite: replace an existing file.
    """
    (path,) = result_files(output_dir, ["floor.md"], overwrite)
    resolver = SuperResolver(bundle, str(choose_device(device)))
    decodings = [
        Decoding("beam", k, lookahead_scales=scales)
        for k in ensure_tuple(lookaheads)
        for scales in (ensure_tuple(lookahead_scales) if k else (0,))
    ]
    rows, kinds, limits = measure(resolver, ensure_tuple(batch_sizes), decodings, side)
    text = [
        "# The floor of inference", "",
        f"Bundle {Path(bundle).name}, commit {commit()}, {machine(resolver.device)}, torch {torch.__version__}, "
        f"bfloat16. Ceilings, measured in this run: {limits[0] / 1e12:.3g} TFLOP/s (matrix product of side {side}), "
        f"{limits[1] / 1e9:.0f} GB/s (copy).",
        "", rows_table(rows), "",
    ]  # fmt: skip
    if resolver.device.type == "cuda":
        text += ["Milliseconds by kind of kernel:", "", rows_table(kinds), ""]
    publish("\n".join(text), path, overwrite)


if __name__ == "__main__":
    report_errors_in_one_sentence()
    fire.Fire(main)
