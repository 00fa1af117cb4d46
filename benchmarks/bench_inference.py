"""How long inference takes, what memory it needs, and whether faster arithmetic gives the same images.

    python -m benchmarks.bench_inference [--bundle bundles/miar_brats] [--device cuda:0] [--batch_sizes 1,4] \
        [--lookaheads 0,1,3] [--num_slices 1,8,64] [--sides 64,128,256] [--peers True] [--output_dir bench_output]

The slices are those of the demo's brain (nilearn's ICBM152 template), a quarter of their resolution. It writes
``inference.csv`` and ``inference.md`` with three tables, all through the bundle's inferer: slices of one tile, for each
precision, batch size and lookahead; the peers beside them, if asked for; and whole volumes, for each number of slices
and in-plane size. Medians after a warm-up, on a GPU by events. The peak of memory is that of the GPU, on Linux of the
whole process, libraries included.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from monai.transforms import ResizeWithPadOrCrop
from monai.utils import convert_to_tensor, ensure_tuple
from torch import Tensor

from benchmarks.bench_training import WARM_UP, median_ms
from benchmarks.table import PEERS, commit, machine, peer_network, publish, result_files
from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.cli.demo import template
from miar_monai.data.atomic_write import atomic_file
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.inference.resolver import SuperResolver, choose_device
from miar_monai.networks import MIAR
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.results import Estimate
from miar_monai.transforms import CentralSlices, LoadVolume, ScaleIntensityRobust

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


class Peak:
    """The peak of memory while a block runs, in MiB, in ``mib``: of the GPU, or on Linux of the whole process.

    Args:
        device: whose memory; NaN where nobody counts it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib = float("nan")

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        elif Path("/proc/self/clear_refs").exists():
            lines = Path("/proc/self/status").read_text().splitlines()
            self.mib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10


def brain_slices(resolver: SuperResolver, count: int = 40) -> Tensor:
    """Return LR slices of the demo's brain, one tile each, scaled as its bundle scales MRI: (count, 1, h, w)."""
    side = resolver.network.side
    hr = ScaleIntensityRobust()(CentralSlices(40)(LoadVolume()(str(template())))).as_tensor()
    padded = ResizeWithPadOrCrop((side, side, -1))(hr)
    slices = convert_to_tensor(padded).movedim(-1, 0).contiguous()  # without metadata, which would slow everything
    lr = resolver.network.degradation(slices).to(resolver.device)  # (40, 1, h, w)
    return lr.repeat(-(-count // len(lr)), 1, 1, 1)[:count]


@torch.inference_mode()
def plain_results(network: MIAR, lr: Tensor, decoding: Decoding, fidelity: float, dtype: torch.dtype) -> list[Estimate]:
    """Return what the network itself makes of slices, four at a time, its layers in the precision of the inferer's."""
    layers = network if dtype == torch.float32 else network.cast(dtype)
    return [layers.super_resolve(x, decoding, fidelity) for x in lr.split(4)]


def measure_slices(
    resolver: SuperResolver, batch_sizes: Sequence[int], lookaheads: Sequence[int], repeats: int
) -> list[Row]:
    """Measure slices of one tile through the inferer, and compare its images with the plain path's in float32.

    The blur is given, not measured, as it is for all batches of a volume but the first.
    """
    network, device = resolver.network, resolver.device
    lr, rows = brain_slices(resolver, max(batch_sizes)), []
    greedy: dict[tuple[str, int], float] = {}
    for k in lookaheads:
        for size in batch_sizes:
            decoding, chosen, exact = Decoding("beam", k), lr[:size], None
            for name, dtype in PRECISIONS.items():
                inferer = copy(resolver.inferer)  # without what earlier ones have recorded
                inferer.decoding, inferer.blur, inferer.sw_batch_size = decoding, None, size
                plain = plain_results(network, chosen, decoding, inferer.fidelity, dtype)
                with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    with Peak(device) as peak:
                        sr = inferer(chosen, network)
                    run = partial(inferer, chosen, network)
                    ms = median_ms(run, device, repeats, warm_up=WARM_UP if device.type == "cuda" else 1) / size
                    sr = inferer(chosen, network)  # by now recorded
                exact = exact or plain
                error = (sr.float() - torch.cat([x.image for x in exact])).square().mean().clamp(min=1e-12)
                same = [(x.tokens == y.tokens).float().mean(dim=1) for x, y in zip(plain, exact, strict=True)]
                rows.append({
                    "precision": name, "K": k, "batch": size, "ms per slice": ms,
                    "times the first K's": ms / greedy.setdefault((name, size), ms), "peak MiB": peak.mib,
                    "tokens as in float32 (%)": 100 * float(torch.cat(same).mean()),
                    "PSNR to plain float32 (dB)": float(-10 * error.log10()),
                })  # fmt: skip
    return rows


def measure_peers(bundle: str, resolver: SuperResolver, batch_sizes: Sequence[int], repeats: int) -> list[Row]:
    """Measure the peers on the same slices; how long they take does not depend on what they have learned.

    Networks of one pass are measured as one CUDA graph on a GPU, as MIAR is; the hundred steps of the latent diffusion
    model are those of MONAI's inferer, for the first batch size alone.
    """
    lr, rows = brain_slices(resolver, max(batch_sizes)), []
    cuda = resolver.device.type == "cuda"
    for peer, title in PEERS.items():
        network = peer_network(bundle, peer).to(resolver.device).eval()
        if peer == "ldm":
            network.denoiser.scale_factor.fill_(1)
        for size in batch_sizes[: 1 if peer == "ldm" else None]:
            for name, dtype in PRECISIONS.items():

                def run(x: Tensor, network: Any = network, dtype: torch.dtype = dtype) -> dict[str, Tensor]:
                    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                        return {"sr": network(x)}

                step = CUDAGraphed(run) if cuda and peer != "ldm" else run
                warm_up, count = (WARM_UP, repeats) if cuda and peer != "ldm" else (1, max(repeats // 5, 1))
                with torch.inference_mode():
                    ms = median_ms(partial(step, lr[:size]), resolver.device, count, warm_up) / size
                rows.append({"method": title, "precision": name, "batch": size, "ms per slice": ms})
    return rows


def measure_volumes(resolver: SuperResolver, num_slices: Sequence[int], sides: Sequence[int]) -> list[Row]:
    """Measure volumes through the bundle's inferer, greedily: memory must not grow with the number of slices."""
    inferer, rows = copy(resolver.inferer), []
    inferer.decoding = Decoding("greedy")
    smallest, cuda = resolver.network.side // 4, resolver.device.type == "cuda"
    for count, side in [*((count, smallest) for count in num_slices), *((1, side) for side in sides)]:
        volume = brain_slices(resolver, side, count).cpu().movedim(0, -1)[None, 0].contiguous()

        def run(volume: Tensor = volume) -> object:
            with torch.inference_mode():
                return inferer(volume[None], resolver.network)

        with Peak(resolver.device) as peak:
            seconds = median_ms(run, resolver.device, 1, warm_up=WARM_UP if cuda else int(not rows)) / 1e3
        result = volume.numel() * 16 * 4 / 2**20
        rows.append({
            "slices": count, "LR side": side, "s": seconds, "s per slice": seconds / count, "peak MiB": peak.mib,
            "of which the result, MiB": result,
        })  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as Markdown."""
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def write_csv(rows: Sequence[Row], path: Path, overwrite: bool) -> None:
    """Write rows that need not have the same columns as CSV."""
    with atomic_file(path, overwrite) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def main(
    bundle: str = "bundles/miar_brats",
    device: str = "auto",
    batch_sizes: int | Sequence[int] = (1, 4),
    lookaheads: int | Sequence[int] = (0, 1, 3),
    num_slices: int | Sequence[int] = (1, 8, 64),
    sides: int | Sequence[int] = (64, 128, 256),
    peers: bool = False,
    repeats: int = 5,
    output_dir: str = "bench_output",
    overwrite: bool = False,
) -> None:
    """Measure and write both tables.

    Args:
        bundle: folder of the bundle, with its weights.
        device: auto, cpu, cuda, cuda:<index> or mps.
        batch_sizes: slices of one tile at once.
        lookaheads: the paper's K; 0 is greedy.
        num_slices: of volumes with slices of one tile.
        sides: LR voxels along both axes of volumes with one slice.
        peers: measure SwinIR, RCAN and LDM-SR too; needs the extra bench.
        repeats: of each measurement on slices.
        output_dir: where ``inference.csv`` and ``inference.md`` are written.
        overwrite: replace them.
    """
    csv_file, text_file = result_files(output_dir, ("inference.csv", "inference.md"), overwrite)
    resolver = SuperResolver(bundle, str(choose_device(device)))
    volumes = measure_volumes(resolver, ensure_tuple(num_slices), ensure_tuple(sides))  # first: they need least memory
    slices = measure_slices(resolver, ensure_tuple(batch_sizes), ensure_tuple(lookaheads), repeats)
    beside = measure_peers(bundle, resolver, ensure_tuple(batch_sizes), repeats) if peers else []
    text = "\n".join([
        "# Inference", "",
        f"Bundle {Path(bundle).name}, commit {commit()}, {machine(resolver.device)}, "
        f"torch {torch.__version__}.", "",
        "## Slices of one tile", "", table(slices), "",
        *(["## The peers on the same slices", "", table(beside), ""] if beside else []),
        "## Volumes, greedy, float32", "", table(volumes), "",
    ])  # fmt: skip
    write_csv([*slices, *beside, *volumes], csv_file, overwrite)
    publish(text, text_file, overwrite)


if __name__ == "__main__":
    report_errors_in_one_sentence()
    fire.Fire(main)
