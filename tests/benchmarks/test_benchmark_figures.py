from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundle_runs import (
    BUNDLES,
    NAMES,
    TOKENIZER,
    TOKENS,
    bundle_folder,
    tiny,
    tiny_checkpoint,
    tiny_tokenizer_file,
    tokenizer,
)
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from helpers.tiny_bundle import write_bundle_with_data, write_paper_runs
from ignite.engine import Engine

from benchmarks import paper_figures
from benchmarks.figures import Figures
from miar_monai.cli.workflow import read_config
from miar_monai.errors import CheckpointError, ConfigurationError, DatasetError, OutputError
from miar_monai.networks.weights import load_weights, save_weights
from miar_monai.training import LossLogger
from miar_monai.visualize import figures

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """Return a dictionary that collects the arguments of each picture."""
    found = {}

    def recorded(module: ModuleType, name: str) -> Callable[..., Path]:
        draw = getattr(module, name)

        def record_and_draw(*args: Any) -> Path:
            found[name] = args
            return draw(*args)

        return record_and_draw

    monkeypatch.setattr(figures, "side_by_side", recorded(figures, "side_by_side"))
    for name in ("layer_wise", "codebook_map", "training_curves"):
        monkeypatch.setattr(paper_figures, name, recorded(paper_figures, name))
    return found


def create(name: str, folder: Path, workflow: str, **options: Any) -> Figures:
    """Return the figures of a bundle with tiny networks and phantoms, for the commands that use one workflow."""
    data = folder / "data"
    if not data.exists() and name == "miar_brats":
        write_brats_folder(data, 4, (40, 36, 6))
    for i in range(4 * (not data.exists())):
        write_nifti_phantom(data / f"case{i}.nii.gz", (40, 36, 6), seed=i, low=-1000, high=400)
    given = {"dataset_dir": str(data), "output_dir": str(folder / "pictures"), **tiny(workflow, name)}
    if workflow == "evaluate":
        given["checkpoint"] = str(tiny_checkpoint(folder, name))
    else:
        given["tokenizers"] = {"tokenizer": str(tiny_tokenizer_file(folder, name))}
    return Figures(str(bundle_folder(name)), **given | options)


def record(folder: Path, losses: list[dict[str, float]]) -> None:
    """Log these losses as those of a trainer, one per iteration."""
    trainer = Engine(lambda engine, loss: [{name: torch.tensor(value) for name, value in loss.items()}])
    LossLogger(1, folder).attach(trainer)
    trainer.run(losses)


def decibels(estimate: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((np.clip(estimate, 0, 1) - np.clip(truth, 0, 1)) ** 2)))


@pytest.mark.parametrize("name", [*NAMES, TOKENS])
def test_a_test_slice_is_shown_by_all_methods_in_its_units(name: str, tmp_path: Path, drawn: dict[str, tuple]) -> None:
    path = create(name, tmp_path, "evaluate", slice=1).side_by_side()
    assert path == tmp_path / "pictures" / f"{name}_side_by_side.png"
    assert path.is_file()
    panels, _, spacing, truth, unit, _ = drawn["side_by_side"]
    titles = [title.split("\n")[0] for title in panels]
    assert titles == ["bicubic", "linear inverse", "MIAR", "MIAR, fidelity 1", "truth"]
    assert spacing == pytest.approx((1, 1))
    hr = panels[truth]
    assert max(hr.shape) <= 40 + 2 * 4 + 1  # the padding to 256 is cut off
    low, high = (0, 1) if name == "miar_brats" else (-1024, 1024)
    assert unit == ("" if name == "miar_brats" else "HU")
    for title, image in panels.items():
        assert image.shape == hr.shape
        assert low <= image.min() < image.max() <= high
        if title.startswith("bicubic"):  # all of its error is where the head is
            outside = 10 * np.log10(256 * 256 / hr.size)
            found = decibels((image - low) / (high - low), (hr - low) / (high - low)) + outside
            assert float(title.split("\n")[1].removesuffix(" dB")) == pytest.approx(found, abs=0.1)
    assert not np.allclose(*(image for title, image in panels.items() if title.startswith("MIAR")))


def test_swinir_is_shown_if_its_weights_exist(
    tmp_path: Path, drawn: dict[str, tuple], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("spandrel")
    peers = tmp_path / "peers"
    drawing = create("miar_brats", tmp_path, "evaluate", peers_dir=str(peers), overwrite=True)
    drawing.side_by_side()
    assert f"SwinIR is left out: there are no weights at {peers / 'swinir.pt'}" in caplog.text
    overlay = ROOT / "benchmarks" / "peers" / "swinir.json"
    config = read_config(str(BUNDLES / "miar_brats"), {}, overlay, workflow="train")
    save_weights(config.get_parsed_content("network_def"), peers / "swinir.pt")
    drawing.side_by_side()
    assert [title.split("\n")[0] for title in drawn["side_by_side"][0]][2] == "SwinIR"


def test_the_curve_of_a_tokenizer_ends_at_its_reconstructions(tmp_path: Path, drawn: dict[str, tuple]) -> None:
    paths = {name: tiny_tokenizer_file(tmp_path / name) for name in ("with dropout", "without")}
    other = load_weights(tokenizer(), paths["without"], "")
    torch.nn.init.zeros_(other.decoder.conv_out.weight)
    save_weights(other, paths["without"])
    drawing = create("miar_brats", tmp_path, "train_stage1", tokenizers={k: str(path) for k, path in paths.items()})
    path = drawing.prefixes()
    assert path == tmp_path / "pictures" / "miar_brats_prefixes.png"
    rows, truth, psnr, *_ = drawn["layer_wise"]
    assert list(rows) == list(psnr) == list(paths)
    for row in rows.values():
        assert [caption.split(":")[0] for caption in row] == ["1 scale", "3 scales", "4 scales"]
        assert all(image.shape == truth.shape for image in row.values())
    dataset = drawing._config("train_stage1").get_parsed_content("validate#dataset")
    slices = [item["image"] for item in dataset.slices]
    for name, path in paths.items():
        network = load_weights(tokenizer(), path, "")
        with torch.no_grad():
            found = [decibels(network(hr[None]).reconstruction[0].numpy(), hr.numpy()) for hr in slices]
        assert len(psnr[name]) == 4
        assert psnr[name][-1] == pytest.approx(np.mean(found), abs=1e-2)
    assert psnr["with dropout"] != psnr["without"]


def test_the_codebook_counts_every_token_of_the_validation_slices(tmp_path: Path, drawn: dict[str, tuple]) -> None:
    drawing = create("miar_lidc", tmp_path, "train_stage1")
    drawing.codebook()
    points, counts, sides, *_ = drawn["codebook_map"]
    slices = len(drawing._config("train_stage1").get_parsed_content("validate#dataset"))
    books, codes = TOKENIZER["num_codebooks"], TOKENIZER["num_codes"]
    assert points.shape == (books * codes, 2)
    assert list(sides) == TOKENIZER["scales"]
    of_each_book = counts.reshape(len(sides), books, codes).sum(axis=2)
    np.testing.assert_array_equal(of_each_book, [[slices * side**2] * books for side in sides])


@pytest.mark.parametrize("name", [*NAMES])
def test_the_figures_of_the_paper_are_drawn_of_its_system(name: str, tmp_path: Path, drawn: dict[str, tuple]) -> None:
    bundle = write_bundle_with_data(tmp_path, name)
    paper = write_paper_runs(bundle, tmp_path / "paper")
    for run, stage in (("full", 1), ("full", 2), ("no-dropout", 2), ("no-rope", 2)):
        record(paper / run / f"stage{stage}", [{"token_loss": 8.0 - i} for i in range(3)])
    (paper / "no-rope" / "tokenizer.pt").unlink()  # it has that of the full system
    files = {"dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json")}
    Figures(str(bundle), output_dir=str(tmp_path / "pictures"), paper=str(paper), **files).all()
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        f"miar_tiny_paper_{figure}.png" for figure in ("codebook", "curves", "prefixes", "side_by_side")
    ]
    panels = drawn["side_by_side"][0]
    assert [title.split("\n")[0] for title in panels] == [
        "bicubic", "linear inverse", "with RoPE", "without RoPE", "truth",
    ]  # fmt: skip
    with_rope, without = (image for title, image in panels.items() if "RoPE" in title)
    assert not np.allclose(with_rope, without)
    assert list(drawn["layer_wise"][0]) == ["with dropout", "without dropout"]
    assert drawn["codebook_map"][0].shape == (TOKENIZER["num_codes"], 2)  # one codebook
    runs = drawn["training_curves"][0]
    assert {run: list(stages) for run, stages in runs.items()} == {
        "with dropout": ["stage 1", "stage 2"], "without dropout": ["stage 2"], "without RoPE": ["stage 2"],
    }  # fmt: skip


def test_runs_of_the_paper_that_are_missing_are_left_out(tmp_path: Path, drawn: dict[str, tuple]) -> None:
    bundle = write_bundle_with_data(tmp_path)
    paper = write_paper_runs(bundle, tmp_path / "paper")
    for run in ("no-rope", "no-dropout"):
        shutil.rmtree(paper / run)
    files = {"dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json")}
    drawing = Figures(str(bundle), output_dir=str(tmp_path), paper=str(paper), **files)
    drawing.side_by_side()
    assert [title.split("\n")[0] for title in drawn["side_by_side"][0]][2:] == ["paper, K = 1", "truth"]
    drawing.prefixes()
    assert list(drawn["layer_wise"][0]) == ["with dropout"]
    shutil.rmtree(paper / "full")
    with pytest.raises(CheckpointError, match=r"there are no weights at .*full/model\.pt; train the paper's system"):
        Figures(str(bundle), output_dir=str(tmp_path / "other"), paper=str(paper), **files).side_by_side()


def test_curves_of_a_resumed_run_show_the_last_values(tmp_path: Path, drawn: dict[str, tuple]) -> None:
    for values in ([4.0, 3.0, 2.0], [1.5, 1.0]):
        record(tmp_path / "run" / "stage2", [{"token_loss": x, "loss": x, "psnr": 20 + x} for x in values])
    Figures(runs={"run": str(tmp_path / "run")}, output_dir=str(tmp_path)).curves()
    ((run, stages),) = drawn["training_curves"][0].items()
    assert run == "run"
    assert stages == {
        "stage 2": {
            "token loss": ([1, 2, 3], [1.5, 1.0, 2.0]),
            "validation PSNR (dB)": ([1, 2, 3], [21.5, 21.0, 22.0]),
        }
    }


def test_missing_files_are_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    given = {"output_dir": str(tmp_path / "pictures"), "dataset_dir": str(tmp_path / "nowhere")}
    drawing = Figures(tokenizers={"a": str(tmp_path / "a.pt")}, runs={"a": str(tmp_path)}, **given)
    for draw in (drawing.prefixes, drawing.codebook):
        with pytest.raises(CheckpointError, match=r"there are no weights at .*a\.pt; train it .* or give --tokenizers"):
            draw()
    with pytest.raises(DatasetError, match=r"holds no TensorBoard files .* or give --runs"):
        drawing.curves()
    with pytest.raises(CheckpointError, match=r"there are no weights at .*b\.pt; train the bundle first"):
        Figures(**given, checkpoint=str(tmp_path / "b.pt")).side_by_side()
    with pytest.raises(ConfigurationError, match="has no key unknown"):
        Figures(**given, unknown=3).side_by_side()
    with pytest.raises(ConfigurationError, match=r"tokenizers is 'a\.pt', but names and paths are needed"):
        Figures(tokenizers="a.pt")  # type: ignore[arg-type]
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(("option", "there"), [("volume", 1), ("slice", 2)])
def test_an_index_out_of_range_is_reported(option: str, there: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} is 9, but .*{there}, counted from 0"):
        create("miar_lidc", tmp_path, "evaluate", **{option: 9}).side_by_side()


def test_existing_pictures_are_kept_and_the_others_are_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "run" / "stage1", [{"reconstruction_loss": 1.0}] * 2)
    picture = tmp_path / "pictures" / "miar_brats_side_by_side.png"
    picture.parent.mkdir()
    picture.write_bytes(b"mine")
    drawing = create("miar_brats", tmp_path, "train_stage1", runs={"run": str(tmp_path / "run")})
    with pytest.raises(OutputError, match="exists already"):
        drawing.side_by_side()
    with caplog.at_level(logging.WARNING):
        drawing.all()
    assert picture.read_bytes() == b"mine"
    assert [record.getMessage().split(":")[0] for record in caplog.records if "left out" in record.message] == [
        "side_by_side is left out"
    ]
    others = [str(picture.with_name(f"miar_brats_{name}.png")) for name in ("prefixes", "codebook", "curves")]
    assert capsys.readouterr().out.splitlines() == others


def test_the_command_takes_its_options_as_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fire = pytest.importorskip("fire")
    record(tmp_path / "a" / "stage1", [{"reconstruction_loss": 1.0}] * 2)
    fire.Fire(Figures, ["curves", f"--output_dir={tmp_path}", "--runs", f"{{'a run': '{tmp_path}/a'}}"])
    assert capsys.readouterr().out.split() == [f"{tmp_path}/miar_brats_curves.png"]


def test_the_command_reports_an_error_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.figures", "curves", f"--output_dir={tmp_path}", "--runs=runs"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: runs is 'runs', but names and paths are needed")
    assert "Traceback" not in done.stderr
