"""Inference with and without each acceleration, on slices of the demo's brain.

    python -m benchmarks.bench_acceleration [--device cuda:0] [--batch_sizes 1,64] [--lookaheads 0,1]

writes ``bench_output/acceleration.md``: milliseconds a slice in bfloat16 for each value of ``MIAR_ACCELERATION``, and
the difference of the images from those without acceleration. On a CPU the images are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from unittest.mock import patch

import fire
import torch
from monai.utils import ensure_tuple

from benchmarks.common import Row, commit, machine, publish, result_files, rows_table
from benchmarks.measuring import WARM_UP, agreement_db, brain_slices, lookahead_cases, median_ms
from miar_monai import SuperResolver
from miar_monai.acceleration import CHOICES
from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.inference.devices import choose_device


@torch.inference_mode()
def measure(resolver: SuperResolver, batch_sizes: Sequence[int], lookaheads: Sequence[int], repeats: int) -> list[Row]:
    """Return a row for each K if the network has tokens, batch size and value of ``MIAR_ACCELERATION``."""
    device, lr, rows = resolver.device, brain_slices(resolver, max(batch_sizes)), []
    for case, decoding in lookahead_cases(resolver.network, lookaheads):
        for size in batch_sizes:
            plain = None
            for name in reversed(CHOICES):
                inferer = copy(resolver.inferer)  # without the CUDA graphs of earlier ones
                inferer.decoding, inferer.blur, inferer.sw_batch_size = decoding, None, size
                run = partial(inferer, lr[:size], resolver.network)
                with patch.dict(os.environ, MIAR_ACCELERATION=name), torch.autocast(device.type, torch.bfloat16):
                    ms = median_ms(run, device, repeats, warm_up=WARM_UP if device.type == "cuda" else 1) / size
                    image = run()
                plain = image if plain is None else plain
                rows.append({
                    **case, "batch": size, "MIAR_ACCELERATION": name, "ms per slice": ms,
                    "PSNR to none (dB)": agreement_db(image, plain),
                })  # fmt: skip
    return rows


def main(
    bundle: str = "bundles/miar_brats",
    device: str = "auto",
    batch_sizes: int | Sequence[int] = (1, 64),
    lookaheads: int | Sequence[int] = (0, 1),
    repeats: int = 20,
    output_dir: str = "bench_output",
    overwrite: bool = False,
) -> None:
    """Measure and write the table.

    Args:
        bundle: folder of the bundle, with its weights.
        device: auto, cpu, cuda, cuda:<index> or mps.
        batch_sizes: numbers of slices of one tile in a batch.
        lookaheads: the paper's K; 0 is greedy. Without effect on a network without tokens.
        repeats: repetitions of each measurement.
        output_dir: folder of ``acceleration.md``.
        overwrite: replace an existing file.
    """
    (path,) = result_files(output_dir, ("acceleration.md",), overwrite)
    resolver = SuperResolver(bundle, str(choose_device(device)))
    rows = measure(resolver, ensure_tuple(batch_sizes), ensure_tuple(lookaheads), repeats)
    text = "\n".join([
        "# Acceleration", "",
        f"Bundle {Path(bundle).name}, commit {commit()}, {machine(resolver.device)}, torch {torch.__version__}; "
        "slices of one tile through the inferer, in bfloat16.", "", rows_table(rows), "",
    ])  # fmt: skip
    publish(text, path, overwrite)


if __name__ == "__main__":
    report_errors_in_one_sentence()
    fire.Fire(main)
