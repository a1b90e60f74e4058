"""The blocks of a decoder, and how a model calls them, so that one block at a time can be run on stored inputs.

This needs a model that is a plain sequence of blocks, in which only the hidden state depends on the text.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from aqlm_tensor.tensor import AQLMTensor

__all__ = ["BlockCalls", "dense_weights", "find_blocks", "in_blocks", "linears_of", "members", "sample_windows"]


def sample_windows(tokens: Tensor, nsamples: int, seqlen: int) -> list[Tensor]:
    """Up to `nsamples` windows [1, seqlen] that do not overlap, spread evenly over tokens [n].

    Raises:
        ValueError: if there is not one full window, or a number is below 1.
    """
    if nsamples < 1 or seqlen < 1:
        raise ValueError(f"nsamples and seqlen must be at least 1, got {nsamples} and {seqlen}")
    available = len(tokens) // seqlen
    if available == 0:
        raise ValueError(f"the calibration text has {len(tokens)} tokens, fewer than one window of {seqlen}")
    count = min(nsamples, available)
    starts = [seqlen * (index * available // count) for index in range(count)]
    return [tokens[None, start : start + seqlen] for start in starts]


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """A model's decoder blocks: the nn.ModuleList with the most linear layers in it.

    Raises:
        ValueError: if no nn.ModuleList holds a linear layer.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    most = max(lists, key=lambda blocks: len(linears_of(blocks)), default=nn.ModuleList())
    if not linears_of(most):
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers: use quantize_ with prepare and "
            "convert instead"
        )
    return most


def in_blocks(model: nn.Module, max_blocks: int | None = None) -> Callable[[nn.Module, str], bool]:
    """A filter_fn that accepts the linear layers of the model's blocks, or of the first `max_blocks`."""
    return members(linears_of(list(find_blocks(model))[:max_blocks]))


class _Stop(Exception):  # noqa: N818 - ends a forward pass, nothing is wrong
    """Raised in a hook once all that is wanted from a pass is known; the output embedding is costly."""


class BlockCalls:
    """How a model calls each block: the hidden states of every batch, and the other arguments, which all batches share.

    Attributes:
        hidden: the input [B, seqlen, width] of the next block, one per batch.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
        self._blocks = blocks
        self._device = next(model.parameters()).device
        options = {"use_cache": False} if hasattr(model, "generation_config") else {}
        self._call = lambda batch: model(batch.to(self._device), **options)
        self.others = self._whole_pass(batches[0])
        self.hidden = [self._first_input(batch) for batch in batches]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Output of a block for a hidden state, whose float dtype the other arguments take on."""
        cast = functools.partial(_cast, dtype=hidden.dtype)
        args, kwargs = tree_map_only(Tensor, cast, self.others[index])
        output = self._blocks[index](hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def _whole_pass(self, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments but the hidden state of each block, from a pass that also checks that one feeds the next."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        previous: list[Any] = []

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            expected = len(calls) < len(self._blocks) and block is self._blocks[len(calls)]
            if not (expected and args and (not previous or args[0] is previous[0])):
                raise ValueError(
                    f"block {len(calls)} ({type(block).__name__}) is not called in order with the output of the block "
                    "before it: use quantize_ with prepare and convert instead"
                )
            calls.append((args[1:], kwargs))

        def after(_block: nn.Module, _args: Any, output: Any) -> None:
            previous[:] = [output if isinstance(output, Tensor) else output[0]]
            if len(calls) == len(self._blocks):
                raise _Stop

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in self._blocks]
        handles += [block.register_forward_hook(after) for block in self._blocks]
        with contextlib.suppress(_Stop):
            try:
                self._call(batch)
            finally:
                for handle in handles:
                    handle.remove()
        return calls

    def _first_input(self, batch: Tensor) -> Tensor:
        """Input of the first block; the rest of the pass is not run."""
        seen: list[Tensor] = []

        def stop(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _equal((args[1:], kwargs), self.others[0]):
                raise ValueError(
                    "more than the hidden state that enters the first block depends on the text: use quantize_ with "
                    "prepare and convert instead"
                )
            seen.append(args[0])
            raise _Stop

        handle = self._blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._call(batch)
        except _Stop:
            return seen[0]
        finally:
            handle.remove()
        raise AssertionError("the first block ran in the pass before")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _equal(one: Any, other: Any) -> bool:
    """Whether nested arguments have equal values; objects that are neither data nor containers count as equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and (not isinstance(one, int | float | str) or one == other)


def members(modules: Sequence[nn.Module]) -> Callable[[nn.Module, str], bool]:
    """A filter_fn that accepts exactly these modules."""
    chosen = set(map(id, modules))
    return lambda module, _: id(module) in chosen


def linears_of(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """The linear layers in some modules, in order."""
    return [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


@contextlib.contextmanager
def dense_weights(block: nn.Module) -> Iterator[None]:
    """Inside the block of code, quantized weights are dense: decoded once rather than in each batch's forward."""
    linears = [part for part in block.modules() if isinstance(part, nn.Linear)]
    quantized = [(part, part.weight) for part in linears if isinstance(part.weight, AQLMTensor)]
    try:
        for part, weight in quantized:
            part.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        yield
    finally:
        for part, weight in quantized:
            part.weight = weight
