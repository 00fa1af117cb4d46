"""How long a training step takes at the shipped sizes, what part of it the quantizer is, and whether loaders keep up.

Model FLOPs: those of forward and backward of the networks, counted once; their share of the ceiling is that of a large
matrix product in bfloat16 (on a CPU too), measured in the same run.

    python -m benchmarks.bench_training [--batch_size 32] [--compile True] [--cuda_graphs False] [--repeats 20] \
        [--workers 4,7]

Medians in milliseconds of forward, backward and optimizer, after a warm-up; on a GPU in bfloat16, timed by events.
Random images, since the time does not depend on what they show. The perceptual loss is left out, so that no weights
are needed. The loaders are those of the configs, augmentation and simulation of LR slices included, with slices of the
demo's brain (the extra demo), and have no step to wait for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.table import machine
from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.cli.demo import template
from miar_monai.training import compile_networks
from miar_monai.training.losses import MIARObjective, ReconstructionLoss

Losses = dict[str, Tensor]
WARM_UP = 8
STAGES = {"stage 1": "train_stage1.json", "stage 2": "train.json"}
FLOPS = {**flop_registry, torch.ops.aten._addmm_activation: flop_registry[torch.ops.aten.addmm]}


class Work(TorchDispatchMode):
    """Counts operations, their floating-point operations, and the bytes that they read and write.

    Views are free, and so is memory that is asked for.
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
            count = FLOPS.get(func.overloadpacket)
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.operations += 1
            self.flops += count(*args, **kwargs, out_val=result) if count else 0
            self.bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return result


def median_ms(step: Callable[[], object], device: torch.device, repeats: int, warm_up: int = WARM_UP) -> float:
    """Return the median duration of a step, after a warm-up that covers compilation and recording; on a GPU by events.

    Args:
        step: what is measured.
        device: where it runs.
        repeats: calls that count.
        warm_up: calls before them that do not.
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
    """Return the floating-point operations per second of a matrix product in bfloat16, of matrices of this side."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * side**3 / median_ms(partial(torch.mm, a, b), device, 10, 3)


def loader(bundle: str, config: str, batch_size: int, workers: int, batches: int) -> Iterable[dict[str, Tensor]]:
    """Return the training loader of a bundle's config, with the demo's brain as its data."""
    parser = ConfigParser(ConfigParser.load_config_file(Path(bundle, "configs", config)))
    parser.update({
        "bundle_root": bundle, "device": "$torch.device('cpu')", "batch_size": batch_size, "num_workers": workers,
        "epoch_length": batches, "train#dataset#data": [{"image": str(template())}],
    })  # fmt: skip
    return parser.get_parsed_content("train#dataloader")


def batch_ms(batches: Iterable[object], skip: int) -> float:
    """Return the time of a batch, in the mean of all but the first ones, which workers have ready when they start."""
    times = [time.perf_counter() for _ in batches]
    return 1e3 * (times[-1] - times[skip - 1]) / (len(times) - skip)


def main(
    bundle: str = "bundles/miar_brats",
    batch_size: int = 32,
    compile: bool = False,
    cuda_graphs: bool = True,
    repeats: int = 20,
    side: int = 8192,
    workers: int | Sequence[int] = (4, 7),
) -> None:
    """Print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    graphs = cuda_graphs and device.type == "cuda"
    parser = ConfigParser(ConfigParser.load_config_file(Path(bundle, "configs", "train.json")))
    tokenizer = parser.get_parsed_content("tokenizer_def").to(device).train()
    network = parser.get_parsed_content("network_def").to(device).train()
    network.load_tokenizer(tokenizer)
    loss = ReconstructionLoss(perceptual=0.0)
    hr, lr = (torch.rand(batch_size, 1, side, side, device=device) for side in (network.side, network.side // 4))
    latents = tokenizer.encoder(hr).detach()

    flops: list[int] = []

    def trained(losses: Callable[..., Tensor], *inputs: Tensor, module: torch.nn.Module) -> Callable[[], object]:
        """Return a training step of a module."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-9, fused=device.type == "cuda", capturable=graphs)

        def step(*inputs: Tensor) -> Losses:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = losses(*inputs)
            value.backward()
            optimizer.step()
            return {"loss": value.detach()}

        with Work() as work:
            step(*inputs)
        flops.append(work.flops)
        for part in (module, tokenizer):
            compile_networks(compile, part)
        recorded = CUDAGraphed(step) if graphs else step
        return lambda: recorded(*inputs)

    def stage1(hr: Tensor) -> Tensor:
        output = tokenizer(hr)
        return loss(output.reconstruction.float(), hr) + output.quantizer_loss

    def quantize(latents: Tensor) -> Tensor:
        output = tokenizer.quantizer(latents)
        return output.f_hat.mean() + output.loss

    def stage2(lr: Tensor, hr: Tensor) -> Tensor:
        return objective(lr, hr)["loss"]

    rows = {"stage 1": median_ms(trained(stage1, hr, module=tokenizer), device, repeats)}
    quantizer = trained(quantize, latents, module=tokenizer.quantizer)
    rows["stage 1, quantizer alone"] = median_ms(quantizer, device, repeats)
    objective = MIARObjective(network, tokenizer, loss).to(device).train()  # which freezes the tokenizer
    rows["stage 2"] = median_ms(trained(stage2, lr, hr, module=network), device, repeats)
    ceiling = product_ceiling(device, side)

    mode = f"{'compiled' if compile else 'not compiled'}, {'CUDA graphs' if graphs else 'no CUDA graphs'}"
    about = f"{machine(device)}, torch {torch.__version__}, batch {batch_size}, {mode}"
    print(f"{about}, ceiling {ceiling / 1e12:.3g} TFLOP/s\n")
    print("| what | ms a step | slices a second | TFLOP a step | share of the ceiling (%) |\n|---|---|---|---|---|")
    for (name, duration), count in zip(rows.items(), flops, strict=True):
        utilization = 1e5 * count / duration / ceiling
        speed = 1e3 * batch_size / duration
        print(f"| {name} | {duration:.1f} | {speed:.0f} | {count / 1e12:.2f} | {utilization:.1f} |")
    share = rows["stage 1, quantizer alone"] / rows["stage 1"]
    print(f"\nThe quantizer is {100 * share:.0f} % of stage 1.\n")
    print("| loader of | workers | ms a batch | slices a second |\n|---|---|---|---|")
    for name, config in STAGES.items():
        for count in ensure_tuple(workers):
            skip = 4 * max(count, 1)  # each has two batches ahead
            duration = batch_ms(loader(bundle, config, batch_size, count, skip + 4 * repeats), skip)
            print(f"| {name} | {count} | {duration:.1f} | {1e3 * batch_size / duration:.0f} |")


if __name__ == "__main__":
    fire.Fire(main)
