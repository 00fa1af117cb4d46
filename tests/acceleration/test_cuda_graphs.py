"""Tests of recordings of CUDA graphs; what needs no GPU runs everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from miar_monai.acceleration.cuda_graphs import CUDAGraphed, _Recording
from miar_monai.inference.error_model import ErrorModel
from miar_monai.networks.results import Estimate


def test_only_inputs_that_changed_are_copied() -> None:
    static = (torch.zeros(2), torch.zeros(3))
    recording = _Recording(graph=None, inputs=static, outputs={})  # type: ignore[arg-type]
    first, second = torch.ones(2), torch.ones(3)
    recording.set_inputs((first, second))
    assert [x.tolist() for x in static] == [[1, 1], [1, 1, 1]]
    static[0].zero_()
    recording.set_inputs((first, second))  # nothing has changed
    assert static[0].tolist() == [0, 0]
    second.add_(1)
    recording.set_inputs((first, second))
    assert [x.tolist() for x in static] == [[0, 0], [2, 2, 2]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_error_model_can_be_recorded() -> None:
    model = ErrorModel(offset=0.4, disagreement=0.5, edges=0.4, entropy=0.0, noise=0.6)

    def error(*maps: torch.Tensor) -> dict[str, Any]:
        return {"error": model(Estimate(*maps), None, torch.zeros_like(maps[3]))}

    maps = (*(torch.rand(2, 1, 16, 16, device="cuda") for _ in range(3)), torch.ones(2, 1, 1, 1, device="cuda"))
    graphed, expected = CUDAGraphed(error), error(*maps)["error"]
    for _ in range(CUDAGraphed.warm_up_calls + 2):
        torch.testing.assert_close(graphed(*maps)["error"], expected)
