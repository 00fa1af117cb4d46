"""The benchmark of acceleration, with a tiny bundle on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_acceleration

pytest.importorskip("nilearn", reason="needs the demo's brain")


def test_the_table_has_a_row_for_each_value_of_the_switch(bundle: Path, tmp_path: Path) -> None:
    bench_acceleration.main(str(bundle), "cpu", 1, 0, 1, str(tmp_path))
    text = (tmp_path / "acceleration.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| 0 ")]
    assert [row[2].strip() for row in rows] == ["none", "kernels", "graphs", "all"]
    assert {row[4].strip() for row in rows} == {"120"}  # on a CPU they are the same: the floor of the error
