from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.bundle_runs import EACH_NETWORK, TOKENS
from helpers.tiny import started
from helpers.tiny_bundle import write_bundle_with_data, write_paper_runs

from benchmarks import ablations, robustness
from miar_monai.cli.workflow import read_config
from miar_monai.errors import ConfigurationError, OutputError
from miar_monai.networks.weights import save_weights


@pytest.mark.parametrize("name", EACH_NETWORK)
def test_robustness_measures_each_perturbation_and_the_benefit_of_tokens(name: str, tmp_path: Path) -> None:
    root, bundle = tmp_path, str(write_bundle_with_data(tmp_path, name))
    files = {"dataset_dir": str(root / "data"), "split_file": str(root / "split.json"), "bundle": bundle}
    robustness.main(output_dir=str(root / "out"), metrics=["PSNR"], num_slices=2, **files)
    text = (root / "out" / "robustness.md").read_text(encoding="utf-8")
    patient = "BraTS_00001" if name == "miar_brats" else "case1"
    assert f"Section validation of the split by split.json: {patient}." in text
    sections = dict(part.split("\n", 1) for part in text.split("### ")[1:])
    rows = {
        title: dict(line.split(" | ")[:2] for line in part.splitlines() if "\u00b1" in line)
        for title, part in sections.items()
    }
    blurs = [f"Blur {blur} instead of 1" for blur in ("0", "0.5", "0.9", "0.95", "1.05", "1.1")]
    assert list(rows) == ["As in training", *robustness.KERNELS, *robustness.PERTURBATIONS, *blurs]
    for title in ("As in training", *robustness.KERNELS):
        bare = ["| MIAR without tokens"] if name == TOKENS else []  # the other network has none
        assert list(rows[title]) == ["| bicubic", "| MIAR", *bare]
    assert rows["As in training"]["| MIAR"] != rows["As in training"].get("| MIAR without tokens")
    assert list(rows["Blur 0 instead of 1"]) == ["| bicubic", "| MIAR", "| MIAR, given the blur"]
    for harder_first in (("noise 0.01", "As in training", blurs[0]), [*reversed(robustness.KERNELS)]):
        psnr = [float(rows[title]["| bicubic"].split()[0]) for title in harder_first]
        assert psnr == sorted(psnr)
    with pytest.raises(OutputError, match=r"robustness\.md exists already"):
        robustness.main(output_dir=str(root / "out"), **files)


def test_perturbations_have_their_nominal_size() -> None:
    lr = torch.rand(2, 1, 64, 64)
    assert len(robustness.PERTURBATIONS["8 bits"](lr).unique()) == 256
    assert (robustness.PERTURBATIONS["noise 0.01"](lr) - lr).std() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(robustness.PERTURBATIONS["noise 0.01"](lr), robustness.PERTURBATIONS["noise 0.01"](lr))


@pytest.mark.parametrize("name", EACH_NETWORK)
def test_ablations_measure_the_networks_of_the_training(name: str, tmp_path: Path) -> None:
    bundle = str(write_bundle_with_data(tmp_path, name))
    files = {"dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json"), "bundle": bundle}
    options = {"runs_dir": str(tmp_path / "runs"), "output_dir": str(tmp_path / "out"), "metrics": ["PSNR"], **files}
    with pytest.raises(ConfigurationError, match=r"holds no <name>/model\.pt: train the ablations"):
        ablations.main(**options)
    for run in ("full", "no-dropout"):
        network = read_config(bundle, {}, workflow="train").get_parsed_content("network_def")
        save_weights(started(network), tmp_path / "runs" / run / "model.pt")
    ablations.main(**options, num_slices=1)
    text = (tmp_path / "out" / "ablations.md").read_text(encoding="utf-8")
    rows = dict(line.split(" | ")[:2] for line in text.splitlines() if line.startswith(("| full", "| no-dropout")))
    assert list(rows) == [
        f"| {run}{how}" for run in ("full", "no-dropout") for how in ("", ", greedy", ", without tokens")
    ]
    assert rows["| full"] != rows["| full, without tokens"]


def test_ablations_of_the_paper_measure_its_decodings_components_and_tokenizers(tmp_path: Path) -> None:
    bundle = write_bundle_with_data(tmp_path)
    runs, out = write_paper_runs(bundle, tmp_path / "runs"), tmp_path / "out"
    (runs / "no-rope" / "tokenizer.pt").unlink()  # it has that of the full system
    options = {
        "bundle": str(bundle), "runs_dir": str(runs), "output_dir": str(out), "paper": True, "num_slices": 1,
        "dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json"), "section": "test",
        "contrasts": "t2", "metrics": ["PSNR", "LPIPS"], "zero_shot": str(runs / "no-dropout" / "model.pt"),
    }  # fmt: skip
    ablations.main(**options)
    text = (out / "ablations.md").read_text(encoding="utf-8")
    table, _, rest = text.partition("## Paired differences")
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in table.splitlines() if line.startswith("| ")}
    full = [name for name in rows if name.startswith("full, ")]
    beams = [f"full, K = {k}" for k in (1, 2, 3)]
    readings = [
        f"{beam}, {how}" for beam in beams for how in ("Eq. 4 literal", "joint score", "Eq. 4 literal, joint score")
    ]
    assert full == ["full, greedy", "full, top-k", "full, top-p", *beams, *readings]
    others = [f"{run}, {how}" for run in ("no-rope", "no-dropout", "zero-shot") for how in ("greedy", "K = 1")]
    assert [*rows][-len(others) :] == others
    assert "data-consistent" not in text
    assert len({rows[name][0] for name in ("full, greedy", "full, top-k", "full, top-p", "no-rope, greedy")}) == 4
    assert rows["zero-shot, K = 1"][0] == rows["no-dropout, K = 1"][0]  # the same weights
    assert all(float(rows[name][-1].strip(" |")) > 0 for name in full)  # milliseconds
    differences, *tokenizers = rest.split("\n## ")
    for reference, methods in {
        "full, greedy": full[1:],
        "full, top-p": ["full, K = 1"],
        "full, K = 1": ["full, K = 2", "full, K = 3", "no-rope, K = 1", "no-dropout, K = 1", "zero-shot, K = 1"],
    }.items():
        section = differences.partition(f"| minus {reference} |")[2].split("\n\n")[0]
        assert [line.split(" | ")[0][2:] for line in section.splitlines() if " | PSNR | " in line] == methods
    assert [section.split("\n")[0] for section in tokenizers] == [
        "Tokenizer, full", "Tokenizer, no-dropout", "Paired differences of the tokenizers",
    ]  # fmt: skip
    assert "| no-dropout | PSNR | +0.00 |" in tokenizers[-1]  # the same weights

    two = {**options, "output_dir": str(tmp_path / "two"), "decodings": ["K = 1", "greedy"], "metrics": ["PSNR"]}
    ablations.main(**two)
    text = (tmp_path / "two" / "ablations.md").read_text(encoding="utf-8")
    lines = text.partition("## Paired differences")[0].splitlines()
    again = {line.split(" | ")[0][2:]: line.split(" | ")[1] for line in lines if line.startswith("| full")}
    assert again == {name: rows[name][0] for name in ("full, K = 1", "full, greedy")}
    assert text.count("| minus full, greedy |") == text.count("| minus full, K = 1 |") == 1
    assert "| minus full, top-k |" not in text
    with pytest.raises(ConfigurationError, match=r"there is no decoding 'K = 4': choose from greedy, top-k, .*K = 3"):
        ablations.main(**{**two, "decodings": ["K = 4"], "overwrite": True})

    (runs / "full" / "model.pt").unlink()
    with pytest.raises(ConfigurationError, match=r"holds no full/model\.pt: train the paper's system"):
        ablations.main(**options)
    with pytest.raises(ConfigurationError, match="paper is 'true'"):
        ablations.main(**{**options, "paper": "true"})
