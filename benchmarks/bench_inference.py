"""Duration and memory of inference, and agreement of faster arithmetic with float32.

    python -m benchmarks.bench_inference [--bundle bundles/miar_brats] [--device cuda:0] [--batch_sizes 1,4] \
        [--lookaheads 0,1,3] [--num_slices 1,8,64] [--sides 64,128,256] [--peers True] [--output_dir bench_output]

The slices are those of the demo's brain (nilearn's ICBM152 template) at a quarter of its resolution. Writes
``inference.csv`` and ``inference.md`` with three tables, all with the bundle's inferer: slices of one tile (64 x 64 for
a network without tiles), for each precision, batch size and, if the network has tokens, lookahead; optionally the peers
on the same slices; and whole volumes, for each number of slices and in-plane size. Medians after a warm-up, on a GPU by
events. Peak memory is that of the GPU, or on Linux of the whole process with its libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from monai.utils import ensure_tuple
from torch import Tensor

from benchmarks.common import Row, commit, machine, publish, result_files, rows_table, write_csv
from benchmarks.measuring import (
    WARM_UP,
    PeakMemory,
    agreement_db,
    brain_slices,
    lookahead_cases,
    median_ms,
    slice_side,
)
from benchmarks.peers.loading import TITLES, peer_network
from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.inference.devices import choose_device
from miar_monai.inference.resolver import SuperResolver
from miar_monai.networks import MIAR, SuperResolutionNetwork
from miar_monai.networks.decoding import Decoding

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.inference_mode()
def plain_results(
    network: SuperResolutionNetwork, lr: Tensor, decoding: Decoding, fidelity: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return images and tokens, if any, of the network without the inferer, four slices at a time, in its precision."""
    layers = network if dtype == torch.float32 else network.cast(dtype)
    images, tokens = [], []
    for x in lr.split(4):
        observed = layers.observe(x)
        prediction = layers.predict(observed.images, layers.condition(observed), decoding)
        images.append(layers.finish(prediction, observed, fidelity).image)
        tokens.append(prediction.tokens)
    return torch.cat(images), torch.cat(tokens) if isinstance(network, MIAR) else None


def measure_slices(
    resolver: SuperResolver, batch_sizes: Sequence[int], lookaheads: Sequence[int], repeats: int
) -> list[Row]:
    """Measure slices of one tile with the inferer, and compare its images with those of the network in float32.

    The blur is not measured, as in all batches of a volume but the first, and intensities have no limits, since the
    network alone has none.
    """
    network, device = resolver.network, resolver.device
    lr, rows = brain_slices(resolver, max(batch_sizes)), list[Row]()
    greedy: dict[tuple[str, int], float] = {}
    for case, decoding in lookahead_cases(network, lookaheads):
        for size in batch_sizes:
            chosen, exact = lr[:size], None
            for name, dtype in PRECISIONS.items():
                inferer = copy(resolver.inferer)  # without the CUDA graphs of earlier ones
                inferer.decoding, inferer.blur, inferer.sw_batch_size = decoding, None, size
                inferer.intensity_range = None
                plain = plain_results(network, chosen, decoding, inferer.fidelity, dtype)
                with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    with PeakMemory(device) as peak:
                        sr = inferer(chosen, network)
                    run = partial(inferer, chosen, network)
                    ms = median_ms(run, device, repeats, warm_up=WARM_UP if device.type == "cuda" else 1) / size
                    sr = inferer(chosen, network)  # replays the recorded graph
                exact = exact or plain
                row = {"precision": name, **case, "batch": size, "ms per slice": ms}
                if case:
                    row["times the first K's"] = ms / greedy.setdefault((name, size), ms)
                row["peak MiB"] = peak.mib
                if plain[1] is not None:
                    row["tokens as in float32 (%)"] = 100 * float((plain[1] == exact[1]).float().mean())
                row["PSNR to plain float32 (dB)"] = agreement_db(sr, exact[0])
                rows.append(row)
    return rows


def measure_peers(bundle: str, resolver: SuperResolver, batch_sizes: Sequence[int], repeats: int) -> list[Row]:
    """Measure the peers on the same slices, with random weights.

    On a GPU, networks with one pass are measured as one CUDA graph, like MIAR. The latent diffusion model takes the
    hundred steps of MONAI's inferer, with the first batch size only.
    """
    lr, rows = brain_slices(resolver, max(batch_sizes)), []
    cuda = resolver.device.type == "cuda"
    for peer, title in TITLES.items():
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
    """Measure volumes with the bundle's inferer and, if the network has tokens, greedy decoding."""
    inferer, rows = copy(resolver.inferer), []
    inferer.decoding = Decoding("greedy")
    smallest, cuda = slice_side(resolver.network) // 4, resolver.device.type == "cuda"
    for count, side in [*((count, smallest) for count in num_slices), *((1, side) for side in sides)]:
        volume = brain_slices(resolver, count, side).cpu().movedim(0, -1)[None, 0].contiguous()

        def run(volume: Tensor = volume) -> object:
            with torch.inference_mode():
                return inferer(volume[None], resolver.network)

        with PeakMemory(resolver.device) as peak:
            seconds = median_ms(run, resolver.device, 1, warm_up=WARM_UP if cuda else int(not rows)) / 1e3
        result = volume.numel() * 16 * 4 / 2**20
        rows.append({
            "slices": count, "LR side": side, "s": seconds, "s per slice": seconds / count, "peak MiB": peak.mib,
            "of which the result, MiB": result,
        })  # fmt: skip
    return rows


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
    """Measure and write the tables.

    Args:
        bundle: folder of the bundle, with its weights.
        device: auto, cpu, cuda, cuda:<index> or mps.
        batch_sizes: numbers of slices of one tile in a batch.
        lookaheads: the paper's K; 0 is greedy. Without effect on a network without tokens.
        num_slices: numbers of slices of volumes with slices of one tile.
        sides: numbers of LR voxels along both axes of volumes with one slice.
        peers: measure SwinIR, RCAN, MHCA and LDM-SR too; needs the extra bench.
        repeats: repetitions of each measurement on slices.
        output_dir: folder of ``inference.csv`` and ``inference.md``.
        overwrite: replace existing files.
    """
    csv_file, text_file = result_files(output_dir, ("inference.csv", "inference.md"), overwrite)
    resolver = SuperResolver(bundle, str(choose_device(device)))
    volumes = measure_volumes(
        resolver, ensure_tuple(num_slices), ensure_tuple(sides)
    )  # first, since they need least memory
    slices = measure_slices(resolver, ensure_tuple(batch_sizes), ensure_tuple(lookaheads), repeats)
    peer_rows = measure_peers(bundle, resolver, ensure_tuple(batch_sizes), repeats) if peers else []
    text = "\n".join([
        "# Inference", "",
        f"Bundle {Path(bundle).name}, commit {commit()}, {machine(resolver.device)}, "
        f"torch {torch.__version__}.", "",
        "## Slices of one tile", "", rows_table(slices), "",
        *(["## The peers on the same slices", "", rows_table(peer_rows), ""] if peer_rows else []),
        f"## Volumes, {'greedy, ' * isinstance(resolver.network, MIAR)}float32", "", rows_table(volumes), "",
    ])  # fmt: skip
    write_csv([*slices, *peer_rows, *volumes], csv_file, overwrite)
    publish(text, text_file, overwrite)


if __name__ == "__main__":
    report_errors_in_one_sentence()
    fire.Fire(main)
