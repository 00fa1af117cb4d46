from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.bundle_runs import EACH_NETWORK, TOKENS
from helpers.tiny_bundle import write_tiny_bundle
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_floor import main, own_kernels
from benchmarks.measuring import OperationCounter
from miar_monai.acceleration import layers as fused_layers
from miar_monai.errors import OutputError

pytest.importorskip("nilearn", reason="the extra `demo` is not installed")


def test_a_view_is_free_and_a_sum_reads_and_writes() -> None:
    a, b = torch.ones(8, 16), torch.ones(16)
    with OperationCounter() as work:
        a.view(16, 8).transpose(0, 1)
        a + b
    assert work.operations == 1
    assert work.bytes == 4 * (2 * 8 * 16 + 16)


def test_a_broadcast_tensor_is_read_once() -> None:
    a = torch.ones(1, 16).expand(8, -1)
    with OperationCounter() as work:
        a.clone()
    assert work.bytes == 4 * (16 + 8 * 16)


def test_operations_are_counted_as_in_pytorch() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 5))
    with OperationCounter() as work:
        network(torch.rand(7, 2, 6, 6)).sum().backward()
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(7, 2, 6, 6)).sum().backward()
    assert work.flops == counter.get_total_flops() > 0


def test_a_product_with_an_activation_counts_like_one_without() -> None:
    bias, x, weight = torch.rand(5), torch.rand(7, 3), torch.rand(3, 5)
    counts = []
    for product in (torch.addmm, torch._addmm_activation):
        with OperationCounter() as work:
            product(bias, x, weight)
        counts.append((work.flops, work.bytes))
    assert counts[0] == counts[1] == (2 * 7 * 3 * 5, 4 * (5 + 7 * 3 + 3 * 5 + 7 * 5))


@pytest.mark.parametrize("name", EACH_NETWORK)
def test_the_table_is_written_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, out = str(write_tiny_bundle(tmp_path / "tiny", name)), str(tmp_path / "out")
    main(bundle, "cpu", batch_sizes=(1, 2), lookaheads=0, side=64, output_dir=out)
    text = (tmp_path / "out" / "floor.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    header, _, one, two = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:8])
    one, two = (dict(zip(header, map(float, row), strict=True)) for row in (one, two))
    assert two["GFLOP"] == pytest.approx(2 * one["GFLOP"], rel=1e-3)
    assert one["GB moved"] < two["GB moved"] < 2 * one["GB moved"]  # weights are read once
    assert two["operations"] == pytest.approx(one["operations"], rel=0.1)
    assert one["operations"] > (100 if name == TOKENS else 20)
    assert {"K", "scales"} & {*header} == ({"K", "scales"} if name == TOKENS else set())  # of tokens
    assert one["times the floor"] > 0
    with pytest.raises(OutputError, match=r"floor\.md exists already"):
        main(bundle, "cpu", output_dir=out)


def test_triton_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        __all__ = ("double",)

        @staticmethod
        def double(x: Tensor, scale: int) -> Tensor:
            return torch.empty_like(x)  # as a kernel does, which PyTorch does not see

    monkeypatch.setattr(fused_layers, "triton_kernels", Kernels)
    x = torch.ones(3)
    with OperationCounter() as work, own_kernels(work):
        Kernels.double(x, 2)
    Kernels.double(x, 2)
    assert (work.operations, work.bytes) == (1, 2 * 3 * 4)
