from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from helpers.bundle_runs import EACH_NETWORK, TOKENS
from helpers.tiny_bundle import write_tiny_bundle
from helpers.tiny_peers import shrink_peers

from benchmarks.bench_inference import main
from benchmarks.measuring import PeakMemory
from miar_monai.errors import OutputError

pytest.importorskip("nilearn", reason="the extra `demo` is not installed")


@pytest.mark.parametrize("name", EACH_NETWORK)
def test_the_tables_are_written_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_peers(monkeypatch)
    bundle, out = str(write_tiny_bundle(tmp_path / "tiny", name)), tmp_path / "out"
    options = {"batch_sizes": (1, 2), "lookaheads": 1, "num_slices": (1, 3), "sides": 80, "peers": True, "repeats": 1}
    main(bundle, "cpu", output_dir=str(out), **options)
    text = (out / "inference.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "Bundle tiny, commit" in text
    rows = list(csv.DictReader((out / "inference.csv").read_text().splitlines()))
    slices, peers, volumes = rows[:4], rows[4:-3], rows[-3:]
    assert [row["method"] for row in peers] == ["SwinIR"] * 4 + ["RCAN"] * 4 + ["MHCA"] * 4 + ["LDM-SR"] * 2
    assert all(float(row["ms per slice"]) > 0 for row in peers)
    assert [(row["precision"], row["batch"]) for row in slices] == [
        ("float32", "1"), ("bfloat16", "1"), ("float32", "2"), ("bfloat16", "2")
    ]  # fmt: skip
    of_tokens = {"K", "times the first K's", "tokens as in float32 (%)"}
    assert of_tokens & {*slices[0]} == (of_tokens if name == TOKENS else set())
    for exact, fast in (slices[:2], slices[2:]):
        assert float(exact["ms per slice"]) > 0
        if name == TOKENS:
            assert float(exact["tokens as in float32 (%)"]) == 100
        assert float(exact["PSNR to plain float32 (dB)"]) == pytest.approx(120)
        assert 10 < float(fast["PSNR to plain float32 (dB)"]) < 100
    assert [(row["slices"], row["LR side"]) for row in volumes] == [("1", "64"), ("3", "64"), ("1", "80")]
    for row in volumes:
        assert float(row["s"]) == pytest.approx(float(row["s per slice"]) * int(row["slices"]))
    assert float(volumes[1]["of which the result, MiB"]) == 3 * 256 * 256 * 4 / 2**20
    with pytest.raises(OutputError, match=r"inference\.csv exists already"):
        main(bundle, "cpu", output_dir=str(out), **options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts the peak of a process")
def test_the_peak_is_that_of_the_block() -> None:
    device = torch.device("cpu")
    with PeakMemory(device) as small:
        torch.ones(8).sum()
    with PeakMemory(device) as large:
        torch.ones(64 * 2**18).sum()  # 64 MiB
    with PeakMemory(device) as again:
        torch.ones(8).sum()
    assert 60 < large.mib - small.mib < 90
    assert again.mib < large.mib - 50
