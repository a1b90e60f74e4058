"""GraphedPasses: forward and backward passes, replayed as a CUDA graph where that can be done.

For `tune_pv`, and for fine-tuning a block.

A pass over a small model starts some ten thousand kernels and waits for Python most of the time: for SmolLM2-135M, 4096
tokens and a teacher of the same size, one H100 was busy for 60 ms of some 330, and a replay takes 65. A graph holds
the memory of its activations for as long as it exists, and can only be made of passes that never wait for the GPU.
Those that do (mixtures of experts that count tokens on the host, say) are run as they are.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

__all__ = ["GraphedPasses", "as_if_captured", "gpu_of"]


def gpu_of(modules: Sequence[nn.Module]) -> torch.device | None:
    """The one GPU that modules lie on; None if they lie elsewhere."""
    devices = {tensor.device for module in modules for tensor in (*module.parameters(), *module.buffers())}
    only = devices.pop() if len(devices) == 1 else torch.device("cpu")
    return only if only.type == "cuda" else None


class GraphedPasses:
    """Passes over batches. The first ones are run as they are, then one is captured and replayed.

    Args:
        compute: a pass over the tensors of a batch, on the GPU: returns a tensor, and may add to others.
        gradients: the tensors to which it adds.
        shapes: of the tensors of batches whose passes are replayed; those of other shapes are run as they are.
        device: the GPU.
        first: how many passes to run as they are.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        gradients: Callable[[], list[Tensor]],
        shapes: Sequence[torch.Size],
        device: torch.device,
        first: int,
    ) -> None:
        self._compute, self._gradients, self._shapes, self._device = compute, gradients, list(shapes), device
        self._first = first
        self._possible = True
        self.restart()

    def restart(self) -> None:
        """Forget what was captured: passes have changed."""
        self._left: float = self._first if self._possible else math.inf
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """What the pass over a batch returns; it has added to the gradients."""
        with torch.cuda.device(self._device):
            fits = [tensor.shape for tensor in batch] == self._shapes
            if fits and self._graph is None and self._left == 0:
                self._capture(batch)
            if not fits or self._graph is None:
                self._left = max(0, self._left - 1)
                return self._compute(*(tensor.to(self._device) for tensor in batch))
            for place, tensor in zip(self._batch, batch, strict=True):
                place.copy_(tensor)
            self._graph.replay()
            return self._result.clone()

    def _capture(self, batch: Sequence[Tensor]) -> None:
        """Capture a pass, if none of its operations waits for the GPU."""
        gradients = self._gradients()
        before = [gradient.clone() for gradient in gradients]
        self._batch = [tensor.to(self._device, copy=True) for tensor in batch]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side), as_if_captured(), _without_waiting():
                self._compute(*self._batch)
        except RuntimeError:
            self._possible, self._left = False, math.inf
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # the activations of passes before would be held beside the graph's own
        if self._possible:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._result = self._compute(*self._batch)
            self._graph = graph
        for gradient, value in zip(gradients, before, strict=True):
            gradient.copy_(value)


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """Inside the block of code, an operation that would wait for the GPU raises RuntimeError instead."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def as_if_captured() -> Iterator[None]:
    """Inside the block of code, whoever asks is told that the stream is being captured.

    Transformers' models look at their position ids on the host, but not while they are captured.
    """
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked
