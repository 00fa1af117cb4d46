"""How long a training step of both stages takes, and what part of stage 1 the quantizer is.

    python benchmarks/bench_training.py [--batch_size 32] [--compile True] [--repeats 20]

Medians in milliseconds, after a warm-up; on a GPU in bfloat16, timed by events. Random images, since the time does not
depend on what they show. The perceptual loss is left out, so that no weights are needed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import fire
import torch

from miar_monai.losses import MIARObjective, ReconstructionLoss
from miar_monai.networks import MIAR, MSVQVAE
from miar_monai.training import compile_networks


def median_ms(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Return the median duration of a step, after three steps of warm-up."""
    times = []
    for i in range(repeats + 3):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            duration = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            step()
            duration = 1e3 * (time.perf_counter() - begin)
        if i >= 3:
            times.append(duration)
    return statistics.median(times)


def main(batch_size: int = 32, compile: bool = False, repeats: int = 20) -> None:
    """Print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    loss = ReconstructionLoss(perceptual=0.0)
    tokenizer = MSVQVAE().to(device).train()
    compile_networks(compile, tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder)
    hr = torch.rand(batch_size, 1, 256, 256, device=device)
    lr = torch.rand(batch_size, 1, 64, 64, device=device)
    latents = torch.randn(batch_size, 32, 32, 32, device=device, requires_grad=True)

    def stage1() -> None:
        with autocast:
            output = tokenizer(hr)
            total = loss(output.reconstruction.float(), hr) + output.quantizer_loss
        total.backward()

    def quantizer() -> None:
        output = tokenizer.quantizer(latents)
        (output.f_hat.mean() + output.loss).backward()

    rows = {"stage 1: forward and backward": median_ms(stage1, device, repeats)}
    rows["stage 1: quantizer alone"] = median_ms(quantizer, device, repeats)
    network = MIAR(lr_encoder="light", context_channels=128).to(device)
    network.load_tokenizer(tokenizer)
    objective = MIARObjective(network, tokenizer, loss, image_samples=batch_size // 2).to(device).train()
    compile_networks(compile, network.lr_encoder, network.transformer, network.decoder)
    for name, with_images in (("tokens", False), ("tokens and images", True)):

        def stage2(with_images: bool = with_images) -> None:
            with autocast:
                parts = objective(lr, hr, with_images)
            parts["loss"].backward()

        rows[f"stage 2: {name}"] = median_ms(stage2, device, repeats)

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{machine}, torch {torch.__version__}, batch {batch_size}, {'compiled' if compile else 'eager'}\n")
    print("| what | ms a step |\n|---|---|")
    for name, duration in rows.items():
        print(f"| {name} | {duration:.1f} |")
    share = rows["stage 1: quantizer alone"] / rows["stage 1: forward and backward"]
    print(f"\nThe quantizer is {100 * share:.0f} % of stage 1.")


if __name__ == "__main__":
    fire.Fire(main)
