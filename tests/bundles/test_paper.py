"""The paper's own system: its overlays of both bundles."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bundle_runs import BUNDLES, NAMES, Finished, bundle_folder, config, quick_command, tiny_paper
from helpers.phantoms import write_brats_folder, write_nifti_phantom

from miar_monai.cli.workflow import read_config
from miar_monai.networks import MIAR
from miar_monai.networks.linear import Interpolation, NoConsistency


def paper(name: str, workflow: str, key: str, **settings: Any) -> Any:
    """Return the content of an id in a workflow with the overlay of the paper."""
    overlay = BUNDLES / name / "configs" / f"paper_{workflow}.json"
    return read_config(str(BUNDLES / name), settings, overlay, workflow=workflow).get_parsed_content(key)


@pytest.mark.parametrize("name", NAMES)
def test_the_overlays_are_the_system_of_the_paper(name: str) -> None:
    """Sections 3 and 4.1.2, appendix A."""
    networks = [paper(name, workflow, "network_def", device="cpu") for workflow in ("train", "evaluate")]
    for network in networks:
        assert isinstance(network, MIAR)
        assert network.schedule.num_scales == 10
        assert network.side == 256
        assert tuple(network.quantizer.codebook.shape) == (4096, 32)
        assert network.quantizer.num_codebooks == 1
        assert network.decoder_inputs == ()
        assert len(network.transformer.blocks) == 4
        assert isinstance(network.front_end, Interpolation)
        assert isinstance(network.back_end, NoConsistency)
        assert all(p.requires_grad for p in network.lr_encoder.parameters())
    assert networks[0].state_dict().keys() == networks[1].state_dict().keys()
    tokenizers = [paper(name, workflow, "tokenizer_def", device="cpu") for workflow in ("train_stage1", "train")]
    for tokenizer in tokenizers:
        assert tokenizer.quantizer.dropout == 0.1
        networks[0].load_tokenizer(tokenizer)  # the encoders are of the same kind
    for workflow, batch_size, rates in (("train_stage1", 24, (2e-4, 1e-4)), ("train", 32, (1e-4,))):
        assert paper(name, workflow, "batch_size", device="cuda") == batch_size
        keys = ("lr", "discriminator_lr")[: len(rates)]
        assert tuple(paper(name, workflow, key) for key in keys) == rates
        assert paper(name, workflow, "final_lr") == rates[0]
        optimizer = paper(name, workflow, "optimizer", device="cpu")
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.defaults["weight_decay"] == 0
    augmentation = paper(name, "train", "train#augmentation", device="cpu")
    item = augmentation({"image": torch.rand(1, 272, 272)})
    torch.testing.assert_close(item["image"], networks[0].degradation(item["label"]))  # no other blur, no noise


@pytest.mark.parametrize("name", NAMES)
def test_every_decoding_of_the_paper_is_a_setting_of_the_evaluation(name: str) -> None:
    decoding = paper(name, "evaluate", "inferer").decoding
    assert (decoding.strategy, decoding.num_branching, decoding.selection, decoding.score) == (
        "beam", 1, "uncertain", "lookahead",
    )  # fmt: skip
    assert decoding.lookahead_scales == 0
    other = {"lookahead_tokens": 3, "selection": "literal", "score": "joint"}
    changed = paper(name, "evaluate", "inferer", **other).decoding
    assert {key: getattr(changed, key) for key in other} == other


def run(name: str, workflow: str, folder: Path, *words: str, **settings: Any) -> Finished:
    """Run a tiny workflow with the overlay of the paper."""
    file = folder / f"paper_{workflow}.json"
    file.write_text(json.dumps(tiny_paper(workflow)))
    given = {
        "config_file": [config(name, workflow), config(name, f"paper_{workflow}")], "args_file": file,
        "bundle_root": bundle_folder(name), "dataset_dir": folder / "data", "output_dir": folder / "out", **settings,
    }  # fmt: skip
    return quick_command(
        "run", *words, *(part for key, value in given.items() for part in (f"--{key}", str(value))), folder=folder
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_both_stages_train_and_are_evaluated(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if name == "miar_brats":
        write_brats_folder(tmp_path / "data", 4, (40, 36, 6), contrasts=("t2",))
    else:
        for i in range(4):
            write_nifti_phantom(tmp_path / "data" / f"case{i}.nii.gz", (40, 36, 6), seed=i, low=-1000, high=400)
    first = run(name, "train_stage1", tmp_path, "training", epoch_length=2)
    assert first.returncode == 0, first.stderr
    assert re.search(r"epoch 1/1, iteration 2: .*generator_loss", first.stdout)
    second = run(name, "train", tmp_path, "training", epoch_length=2)
    assert second.returncode == 0, second.stderr
    assert re.search(r"epoch 1/1, iteration 2: token_loss \d+\.\d+, token_accuracy \S+, loss \d", second.stdout)
    assert "faithful_loss" not in second.stdout
    assert "ssim" in second.stdout

    tokenizer, model = (torch.load(out / f"{file}.pt", weights_only=True) for file in ("tokenizer", "model"))
    for part in ("decoder.conv_in.weight", "decoder.middle.0.conv1.weight", "quantizer.codebook"):
        assert torch.equal(model[part], tokenizer[part])  # the decoder of the tokenizer, which gets tokens alone
    assert torch.equal(*model["decoder.conv_out.weight"].unflatten(0, (2, -1)))  # both maps
    encoder = [model["lr_encoder.encoder.conv_in.weight"], tokenizer["encoder.conv_in.weight"]]
    assert not torch.equal(*encoder)
    torch.testing.assert_close(*encoder, atol=1e-2, rtol=0)  # initialized from the tokenizer, and trained

    done = run(name, "evaluate", tmp_path, "evaluating", checkpoint=out / "model.pt")
    assert done.returncode == 0, done.stderr
    with (out / "metrics.csv").open(newline="") as file:
        values = {row["method"]: float(row["PSNR"]) for row in csv.DictReader(file)}
    assert {"bicubic", "MIAR", "MIAR, data-consistent"} <= set(values)
    assert values["MIAR"] != values["MIAR, data-consistent"]

    resumed = run(name, "train", tmp_path, "training", epoch_length=2, max_epochs=2, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"epoch 2/2, iteration 4: token_loss", resumed.stdout)
