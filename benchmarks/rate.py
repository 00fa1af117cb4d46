"""Image codecs at the bit rate of a tokenizer, as a reference for its reconstructions.

    python -m benchmarks.rate --bundle bundles/miar_brats --dataset_dir <data> --split_file <json> [--section test]

A token of a codebook with V codes costs log2 V bits. A codec spends almost no bits on an empty background, a token map
as many as on the body. So there are two budgets: all tokens, and those whose cell of the grid touches the body. JPEG
2000 and AVIF, by Pillow, each at the best quality within the budget; PSNR as in the table, mean over the slices.
"""

from __future__ import annotations

import io
import math

import fire
import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from PIL import Image

from miar_monai.errors import report_errors_in_one_sentence
from miar_monai.evaluation.metrics import body_mask, psnr
from miar_monai.evaluation.tables import markdown_table
from miar_monai.networks import MSVQVAE


def codec_psnr(truth: np.ndarray, budget: float, codec: str) -> float:
    """Return the PSNR of a slice (H, W) in [0, 1], coded in at most ``budget`` bytes, or NaN."""
    image, best = Image.fromarray(np.rint(255 * truth).astype(np.uint8)), math.nan
    low, high = 0, 100
    while low <= high:  # the quality is an integer, and better qualities take more bytes
        quality, file = (low + high) // 2, io.BytesIO()
        if codec == "AVIF":
            image.save(file, format=codec, quality=quality)
        else:
            image.save(file, format=codec, quality_mode="dB", quality_layers=[20 + 0.4 * quality])
        if file.tell() <= budget:
            decoded = np.asarray(Image.open(file).convert("L"), np.float64) / 255
            best, low = float(psnr(*(torch.from_numpy(x)[None, None] for x in (decoded, truth)))), quality + 1
        else:
            high = quality - 1
    return best


def tokens_at_body(tokenizer: MSVQVAE, body: torch.Tensor) -> float:
    """Return the number of tokens whose cell touches the body (1, 1, H, W), over all scales and codebooks."""
    cells = [F.adaptive_max_pool2d(body.float(), side).sum() for side in tokenizer.schedule.sides]
    return float(sum(cells)) * tokenizer.quantizer.num_codebooks


def main(bundle: str, dataset_dir: str, split_file: str, section: str = "validation", num_slices: int = 40) -> None:
    """Print the table."""
    parser = ConfigParser()
    parser.read_config(f"{bundle}/configs/train_stage1.json")
    parser.update({"bundle_root": bundle, "dataset_dir": dataset_dir, "split_file": split_file, "device": "cpu"})
    parser["val_num_slices"] = num_slices
    parser["validate"]["dataset"]["data"] = parser["validate"]["dataset"]["data"].replace("validation", section)
    tokenizer, dataset = (parser.get_parsed_content(name) for name in ("tokenizer_def", "validate#dataset"))
    bits = math.log2(tokenizer.quantizer.num_codes)
    total = tokenizer.schedule.num_tokens * tokenizer.quantizer.num_codebooks * bits / 8
    rows: dict[str, list[tuple[float, float, float]]] = {"all tokens": [], "tokens at the body": []}
    for item in dataset:
        slice_ = item["image"].clamp(0, 1)
        truth = slice_[0].double().numpy()
        body = body_mask(slice_[None], 0.05)
        for name, budget in (("all tokens", total), ("tokens at the body", tokens_at_body(tokenizer, body) * bits / 8)):
            rows[name].append((budget, codec_psnr(truth, budget, "JPEG2000"), codec_psnr(truth, budget, "AVIF")))
    books, codes = tokenizer.quantizer.num_codebooks, tokenizer.quantizer.num_codes
    print(f"{len(dataset)} slices of the section {section}; codebooks: {books}, of {codes} codes\n")
    means = {name: np.nanmean(values, axis=0) for name, values in rows.items()}
    cells = [(name, f"{budget:.0f}", f"{jpeg:.2f}", f"{avif:.2f}") for name, (budget, jpeg, avif) in means.items()]
    print(markdown_table(("budget", "bytes per slice", "JPEG 2000, dB", "AVIF, dB"), cells))


if __name__ == "__main__":
    report_errors_in_one_sentence()
    fire.Fire(main)
