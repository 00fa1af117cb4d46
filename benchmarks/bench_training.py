"""Duration of a training step at the shipped sizes, share of the quantizer, and throughput of the data loaders.

Model FLOPs are those of forward and backward pass of the networks. The ceiling is the speed of a large matrix product
in bfloat16 (on a CPU too), measured in the same run.

    python -m benchmarks.bench_training [--batch_size 32] [--compile True] [--cuda_graphs False] [--repeats 20] \
        [--workers 4,7]

Medians in milliseconds of forward, backward and optimizer, after a warm-up; on a GPU in bfloat16, timed by events. The
images are random, since the time does not depend on their content. The perceptual loss is left out, so that no weights
are needed. The loaders are those of the configs, with augmentation and simulation of LR slices, on slices of the demo's
brain (extra demo), without training steps in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch import Tensor

from benchmarks.common import machine
from benchmarks.measuring import OperationCounter, median_ms, product_ceiling
from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.cli.demo import template
from miar_monai.evaluation.tables import markdown_table
from miar_monai.training import compile_networks
from miar_monai.training.losses import MIARObjective, ReconstructionLoss

Losses = dict[str, Tensor]
STAGES = {"stage 1": "train_stage1.json", "stage 2": "train.json"}


def loader(bundle: str, config: str, batch_size: int, workers: int, batches: int) -> Iterable[dict[str, Tensor]]:
    """Return the training loader of a bundle's config for the demo's brain."""
    parser = ConfigParser(ConfigParser.load_config_file(Path(bundle, "configs", config)))
    parser.update({
        "bundle_root": bundle, "device": "$torch.device('cpu')", "batch_size": batch_size, "num_workers": workers,
        "epoch_length": batches, "train#dataset#data": [{"image": str(template())}],
    })  # fmt: skip
    return parser.get_parsed_content("train#dataloader")


def batch_ms(batches: Iterable[object], skip: int) -> float:
    """Return the mean time per batch, without the first ones, which are prepared before they are needed."""
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

        with OperationCounter() as counter:
            step(*inputs)
        flops.append(counter.flops)
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
    objective = MIARObjective(network, tokenizer, loss).to(device).train()  # freezes the tokenizer
    rows["stage 2"] = median_ms(trained(stage2, lr, hr, module=network), device, repeats)
    ceiling = product_ceiling(device, side)

    mode = f"{'compiled' if compile else 'not compiled'}, {'CUDA graphs' if graphs else 'no CUDA graphs'}"
    about = f"{machine(device)}, torch {torch.__version__}, batch {batch_size}, {mode}"
    print(f"{about}, ceiling {ceiling / 1e12:.3g} TFLOP/s\n")
    cells = []
    for (name, duration), count in zip(rows.items(), flops, strict=True):
        utilization = 1e5 * count / duration / ceiling
        speed = 1e3 * batch_size / duration
        cells.append((name, f"{duration:.1f}", f"{speed:.0f}", f"{count / 1e12:.2f}", f"{utilization:.1f}"))
    columns = ("step", "ms per step", "slices per second", "TFLOP per step", "share of the ceiling (%)")
    print(markdown_table(columns, cells))
    share = rows["stage 1, quantizer alone"] / rows["stage 1"]
    print(f"\nThe quantizer is {100 * share:.0f} % of stage 1.\n")
    cells = []
    for name, config in STAGES.items():
        for count in ensure_tuple(workers):
            skip = 4 * max(count, 1)  # each has two batches ahead
            duration = batch_ms(loader(bundle, config, batch_size, count, skip + 4 * repeats), skip)
            cells.append((name, str(count), f"{duration:.1f}", f"{1e3 * batch_size / duration:.0f}"))
    print(markdown_table(("loader of", "workers", "ms per batch", "slices per second"), cells))


if __name__ == "__main__":
    fire.Fire(main)
