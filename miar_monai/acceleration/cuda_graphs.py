"""CUDA graphs, which launch the kernels of a function all at once."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

__all__ = ["CUDAGraphed", "tensor_addresses"]


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: dict[str, Tensor]
    sources: tuple[tuple[Tensor, int], ...] = ()
    """The tensors last copied to ``inputs``, and their versions."""

    def set_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        """Copy the inputs that have changed since the last replay, which operators usually have not."""
        versions = tuple((x, -1 if x.is_inference() else x._version) for x in inputs)  # inference tensors have none
        last = self.sources or ((None, 0),) * len(inputs)
        changed = [i for i, (x, n) in enumerate(versions) if n < 0 or x is not last[i][0] or n != last[i][1]]
        if changed:
            torch._foreach_copy_([self.inputs[i] for i in changed], [inputs[i] for i in changed], non_blocking=True)
        self.sources = versions


class CUDAGraphed:
    """Record a function of tensors as a CUDA graph, once per set of shapes, and replay the graph in later calls.

    Quantization and decoding launch many small kernels at each of ten scales, and a training step launches thousands:
    launching them one by one takes longer than running them. On a CPU the function itself is called.

    In-place changes of tensors are part of a replay; other side effects in Python happen only during recording. Weights
    may change in place, but not be replaced. Random numbers differ between replays.

    Args:
        function: maps tensors to named tensors. It must not read the values of tensors on the host. The state of
            autocast at the time of recording is part of the graph.

    Example:
        >>> double = CUDAGraphed(lambda x: {"y": 2 * x})
        >>> double(torch.ones(2))
        {'y': tensor([2., 2.])}
    """

    warm_up_calls = 3  # the first calls select algorithms, allocate memory and compile

    def __init__(self, function: Callable[..., dict[str, Tensor]]) -> None:
        self.function = function
        self._stream: torch.cuda.Stream | None = None
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Call the function; the results are copies, which later calls do not change."""
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        if self._stream is None:
            self._stream = torch.cuda.Stream(inputs[0].device)  # possibly not the current device
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._recordings:
            self._calls[key] += 1
            if self._calls[key] <= self.warm_up_calls:
                return self._warm_up(inputs, self._stream)
            self._recordings[key] = self._record(inputs, self._stream)
        recording = self._recordings[key]
        recording.set_inputs(inputs)
        recording.graph.replay()
        return {name: output.clone() for name, output in recording.outputs.items()}

    def clear(self) -> None:
        """Delete all recordings and free their memory."""
        self._recordings.clear()
        self._calls.clear()

    def _call_uncached(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Call the function with an empty autocast cache, and empty it afterwards.

        Cached casts of weights must not be shared between a recording and other calls.
        """
        torch.clear_autocast_cache()
        outputs = self.function(*inputs)
        torch.clear_autocast_cache()
        return outputs

    def _warm_up(self, inputs: tuple[Tensor, ...], stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Call the function on a side stream, as PyTorch requires before a recording."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # for the recording
            outputs = self._call_uncached(inputs)
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...], stream: torch.cuda.Stream) -> _Recording:
        with torch.inference_mode(False):  # later calls may be in inference mode or not
            static_inputs = tuple(x.detach().clone() for x in inputs)
        gc.collect()  # destroying another graph during the recording would abort it
        graph = torch.cuda.CUDAGraph()
        # thread_local: a data loader may pin memory in another thread
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = self._call_uncached(static_inputs)
        return _Recording(graph, static_inputs, outputs)


def tensor_addresses(module: nn.Module) -> tuple[int, ...]:
    """Return the addresses of the weights and buffers of a module, on which a recording depends.

    Four times as fast as `nn.Module.parameters`, which matters because every call needs them.
    """
    modules, addresses = [module], []
    for part in modules:  # the list grows
        tensors = chain(part._parameters.values(), part._buffers.values())
        addresses += [x.data_ptr() for x in tensors if x is not None]
        modules += [child for child in part._modules.values() if child is not None]
    return tuple(addresses)
