"""The benchmark of acceleration, with a tiny bundle on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.bundle_runs import EACH_NETWORK, TOKENS
from helpers.tiny_bundle import write_tiny_bundle

from benchmarks import bench_acceleration

pytest.importorskip("nilearn", reason="needs the demo's brain")


@pytest.mark.parametrize("name", EACH_NETWORK)
def test_the_table_has_a_row_for_each_value_of_the_switch(name: str, tmp_path: Path) -> None:
    bench_acceleration.main(str(write_tiny_bundle(tmp_path / name, name)), "cpu", 1, 0, 1, str(tmp_path))
    lines = [line for line in (tmp_path / "acceleration.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert ("K" in header) == (name == TOKENS)  # the other network has no tokens
    columns = {title: [row[i] for row in rows] for i, title in enumerate(header)}
    assert columns["MIAR_ACCELERATION"] == ["none", "kernels", "graphs", "all"]
    assert {*columns["PSNR to none (dB)"]} == {"120"}  # on a CPU they are the same: the floor of the error
