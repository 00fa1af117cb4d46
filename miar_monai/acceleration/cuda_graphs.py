"""CUDA graphs: a function of many small kernels, launched as one."""

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
    copied: tuple[tuple[Tensor, int], ...] = ()
    """The tensors that ``inputs`` are copies of, and their versions."""

    def set_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        """Copy the inputs but for those that have not changed since the last replay, such as operators."""
        versions = tuple((x, -1 if x.is_inference() else x._version) for x in inputs)  # the former have no version
        last = self.copied or ((None, 0),) * len(inputs)
        changed = [i for i, (x, n) in enumerate(versions) if n < 0 or x is not last[i][0] or n != last[i][1]]
        torch._foreach_copy_([self.inputs[i] for i in changed], [inputs[i] for i in changed], non_blocking=True)
        self.copied = versions


class CUDAGraphed:
    """Record a function of tensors once for each set of shapes, and replay the recording from then on.

    Quantization and decoding go through ten scales of small kernels each, and a training step has thousands of them:
    launching them one by one takes longer than running them. On a CPU the function itself is called.

    What the function does to tensors in place, it does in each replay; what it does in Python happens only while it is
    recorded. Weights that change in place take effect, weights that are replaced do not. Random numbers are new each
    time.

    Args:
        function: tensors in, named tensors out. It must not look at the values of tensors on the host. An autocast
            outside of it is recorded as it is at that time.

    Example:
        >>> double = CUDAGraphed(lambda x: {"y": 2 * x})
        >>> double(torch.ones(2))
        {'y': tensor([2., 2.])}
    """

    warm_up_calls = 3  # libraries choose algorithms and allocate, and compilers compile, in the first calls

    def __init__(self, function: Callable[..., dict[str, Tensor]]) -> None:
        self.function = function
        self._stream: torch.cuda.Stream | None = None
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Call the function; the results are copies that later calls leave alone."""
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        if self._stream is None:
            self._stream = torch.cuda.Stream(inputs[0].device)  # which may not be the current device
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._recordings:
            self._calls[key] += 1
            if self._calls[key] <= self.warm_up_calls:
                return self._call_aside(inputs, self._stream)
            self._recordings[key] = self._record(inputs, self._stream)
        recording = self._recordings[key]
        recording.set_inputs(inputs)
        recording.graph.replay()
        return {name: output.clone() for name, output in recording.outputs.items()}

    def clear(self) -> None:
        """Forget all recordings, and give back the memory that they work in."""
        self._recordings.clear()
        self._calls.clear()

    def _call_uncached(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Call the function without casts of weights that an autocast has cached: they must not get into a recording.

        Nor may those of a recording be used outside of it.
        """
        torch.clear_autocast_cache()
        outputs = self.function(*inputs)
        torch.clear_autocast_cache()
        return outputs

    def _call_aside(self, inputs: tuple[Tensor, ...], stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Call the function on a stream of its own, as PyTorch asks of calls before a recording."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # soon it is needed
            outputs = self._call_uncached(inputs)
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...], stream: torch.cuda.Stream) -> _Recording:
        with torch.inference_mode(False):  # later calls may come from within such a mode or not
            static = tuple(x.detach().clone() for x in inputs)
        gc.collect()  # a graph that is done with must not be destroyed during a recording, which that would end
        graph = torch.cuda.CUDAGraph()
        # a thread of the data loader pins memory meanwhile, which only this thread must not do
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = self._call_uncached(static)
        return _Recording(graph, static, outputs)


def tensor_addresses(module: nn.Module) -> tuple[int, ...]:
    """Return the addresses of the weights and buffers of a module, which a recording depends on.

    `nn.Module.parameters` takes four times as long, in each call.
    """
    modules, addresses = [module], []
    for part in modules:  # the list grows
        tensors = chain(part._parameters.values(), part._buffers.values())
        addresses += [x.data_ptr() for x in tensors if x is not None]
        modules += [child for child in part._modules.values() if child is not None]
    return tuple(addresses)
