"""Triton kernels of the fused layers compared with PyTorch, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from miar_monai.acceleration import layers as fused_layers
from miar_monai.acceleration.layers import AddNorm, LinearGELU, NormalizedRotary, NormSiLU, join, top_two
from miar_monai.networks.attention import rotary_table


class TopTwo(nn.Module):
    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return top_two(logits)


class Join(nn.Module):
    def __init__(self, rows: list[int] | None = None) -> None:
        super().__init__()
        self.register_buffer("rows", None if rows is None else torch.tensor(rows))

    def forward(self, old_key: Tensor, old_value: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return join(old_key, old_value, self.rows, key, value)


def layers() -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Return layers with random weights, and their inputs: odd sizes, single tokens, slices of larger tensors."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    table = rotary_table(5 * torch.rand(9, 2, generator=generator), 16)  # (2, 9, 1, 16)
    rotation = torch.cat([table.expand(-1, -1, 3, -1), 3 * table.expand(-1, -1, 3, -1)], dim=2)[:, 2:7]
    cases: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (NormalizedRotary(), (normal(3, 5, 6, 16), rotation)),
        (NormalizedRotary(), (normal(2, 5, 3, 16), rotation.chunk(2, dim=2)[1])),
        (NormalizedRotary(), (normal(1, 1, 4, 16), table[:, 3:4])),
        (NormalizedRotary(), (normal(2, 5, 9, 16)[:, :, 2:5], table[:, :5])),
        (AddNorm(48), (normal(2, 7, 48), normal(2, 7, 48))),
        (AddNorm(32), (normal(1, 32).expand(3, 1, -1), normal(3, 1, 32))),
        (NormSiLU(24), (1 + normal(2, 24, 17, 13),)),
        (NormSiLU(4), (normal(1, 4, 1, 3),)),
        (NormSiLU(8), (100 + normal(1, 8, 70, 70),)),
        (LinearGELU(16, 24), (normal(2, 5, 16),)),
        (TopTwo(), (8 * normal(2, 5, 24),)),
        (TopTwo(), (30 * normal(3, 1, 64),)),
        (TopTwo(), (normal(1, 9, 2),)),
        (Join(), (*(normal(2, 1, 3, 4) for _ in range(2)), normal(2, 5, 6, 4)[:, :, 3:], normal(2, 5, 3, 4))),
        (Join(), (*(normal(1, 11, 2, 8) for _ in range(2)), *(normal(4, 7, 2, 8) for _ in range(2)))),
        (Join([2, 5]), (*(normal(6, 9, 2, 8) for _ in range(2)), *(normal(6, 2, 2, 8) for _ in range(2)))),
    ]
    for layer, _ in cases:
        for weight in layer.parameters():
            nn.init.normal_(weight, generator=generator)
    return cases


def call(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = layer(*inputs)
    return out if isinstance(out, tuple) else (out,)


def compare_with_kernels() -> None:
    """Compare all layers with their kernels on the CPU; set ``TRITON_INTERPRET=1`` before importing Triton."""
    expected = [call(*case) for case in layers()]
    fused_layers._use_kernels = lambda x: True
    for case, wanted in zip(layers(), expected, strict=True):
        for x, y in zip(call(*case), wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    print(f"{len(expected)} cases agree")


def test_kernels_agree_with_pytorch_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert run.stdout == f"{len(layers())} cases agree\n", run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(layers())))
def test_kernels_agree_with_pytorch_on_a_gpu(case: int, dtype: torch.dtype) -> None:
    layer, inputs = layers()[case]
    layer, inputs = (
        layer.to(dtype).float(),
        tuple(x.to(dtype).float() for x in inputs),
    )  # the same rounded numbers for both
    expected = call(layer, inputs)
    on_gpu = tuple(x.to("cuda", dtype) for x in inputs)
    assert not fused_layers._use_kernels(on_gpu[0])
    with torch.no_grad():
        assert fused_layers._use_kernels(on_gpu[0])
    for result, wanted in zip(call(layer.to("cuda", dtype), on_gpu), expected, strict=True):
        assert result.dtype == (wanted.dtype if isinstance(layer, TopTwo) else dtype)
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(result.cpu().to(wanted.dtype), wanted, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_gpu_of_their_tensors() -> None:
    assert torch.cuda.current_device() == 0
    for layer, inputs in layers():
        first, second = (call(layer.to(device), tuple(x.to(device) for x in inputs)) for device in ("cuda:0", "cuda:1"))
        for x, y in zip(first, second, strict=True):
            assert y.device.index == 1
            assert torch.equal(x.cpu(), y.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float64_is_computed_in_float64_on_a_gpu() -> None:
    for layer, inputs in layers():
        layer, inputs = layer.double(), tuple(x.double() for x in inputs)
        expected = call(layer, inputs)
        for result, wanted in zip(call(layer.cuda(), tuple(x.cuda() for x in inputs)), expected, strict=True):
            if not isinstance(layer, TopTwo):  # its result is float32
                torch.testing.assert_close(result.cpu(), wanted)


def test_a_missing_compiler_causes_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @staticmethod
        def add_norm(*_: object) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify CC")

    monkeypatch.setattr(fused_layers, "triton_kernels", Broken)
    fused_layers._kernels_work.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not fused_layers._kernels_work(torch.device("cpu"))
        assert not fused_layers._kernels_work(torch.device("cpu"))
    assert [record.getMessage() for record in caplog.records] == [
        "Triton is not available, so inference is slower: Failed to find C compiler."
    ]
    fused_layers._kernels_work.cache_clear()


def test_layers_have_gradients() -> None:
    for layer, inputs in layers():
        first = inputs[0].clone().requires_grad_()
        out = layer(first, *inputs[1:])
        (out[isinstance(layer, AddNorm)] if isinstance(out, tuple) else out).square().sum().backward()
        assert first.grad is not None
        assert first.grad.abs().sum() > 0


if __name__ == "__main__":
    compare_with_kernels()
