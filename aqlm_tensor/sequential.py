"""Quantize a decoder block by block, each block calibrated on what the quantized blocks before it put out.

`quantize_` with "prepare" and "convert" sees the inputs of the dense model. Here a block sees the inputs it will have
in the quantized model, as in GPTQ and AQLM, so that errors are not multiplied from block to block; and only one block's
X^T X is in memory. It costs a second forward pass of each block, and it needs a model that is a plain sequence of
blocks, in which only the hidden state depends on the text. Nothing is fine-tuned.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aqlm_tensor.api import QuantizationReport, quantize_
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.handler import LayerReport
from aqlm_tensor.quantizer.observers import detach_observers
from aqlm_tensor.targets import find_targets
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["Progress", "find_blocks", "in_blocks", "quantize_sequentially", "sample_windows"]

Phase = Literal["calibrate", "quantize", "propagate"]


@dataclass(frozen=True)
class Progress:
    """Where `quantize_sequentially` is.

    Attributes:
        phase: "calibrate" (collecting X^T X), "quantize", or "propagate" (computing the next block's input).
        block: index of the block.
        blocks: blocks in all.
        done: layers quantized so far.
        layers: layers to quantize in all.
        layer: report of the layer that was just quantized, if one was.
    """

    phase: Phase
    block: int
    blocks: int
    done: int
    layers: int
    layer: LayerReport | None = None


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
    most = max(lists, key=lambda blocks: len(_linears(blocks)), default=nn.ModuleList())
    if not _linears(most):
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers: use quantize_ with prepare and "
            "convert instead"
        )
    return most


def in_blocks(model: nn.Module, max_blocks: int | None = None) -> Callable[[nn.Module, str], bool]:
    """A filter_fn that accepts the linear layers of the model's blocks, or of the first `max_blocks`."""
    return _members(_linears(list(find_blocks(model))[:max_blocks]))


@torch.no_grad()
def quantize_sequentially(
    model: nn.Module,
    config: AQLMWeightConfig,
    batches: Sequence[Tensor],
    *,
    max_blocks: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    after_block: Callable[[int], None] | None = None,
) -> QuantizationReport:
    """Quantize the linear layers of a model's blocks in place, in order, on the inputs they will really have.

    An exception leaves every layer either dense or quantized.

    Args:
        model: a decoder; called as model(batch).
        config: what to do with each layer; its `step` is ignored.
        batches: token ids, all of one shape [B, seqlen], without padding.
        max_blocks: quantize only the first so many blocks.
        on_progress: called at each change of phase and after each layer.
        after_block: called with the number of blocks quantized so far, when the model may be run (to evaluate it, say).

    Returns:
        The layers that were quantized and those left dense (the others outside of the blocks are not listed).

    Raises:
        ValueError: as `quantize_`, before any change; for batches of different shapes; and for a model that is not a
            plain sequence of blocks.
    """
    if not batches or len({batch.shape for batch in batches}) != 1:
        raise ValueError(f"batches must be token ids of one shape, got {sorted({tuple(b.shape) for b in batches})}")
    blocks = list(find_blocks(model))[:max_blocks]
    config = replace(config, step="prepare")
    targets, skipped = find_targets(model, config, _members(_linears(blocks)))
    chosen = {id(target.module) for target in targets}
    training = model.training
    model.eval()
    try:
        run = _Run(model, config, _BlockCalls(model, blocks, batches), len(blocks), len(targets), on_progress)
        for index, block in enumerate(blocks):
            run.quantize(index, block, [part for part in _linears([block]) if id(part) in chosen])
            if after_block is not None:
                after_block(index + 1)
    finally:
        model.train(training)
    return QuantizationReport(tuple(run.reports), (), skipped)


class _Stop(Exception):  # noqa: N818 - ends a forward pass, nothing is wrong
    """Raised in a hook once all that is wanted from a pass is known; the output embedding is costly."""


class _BlockCalls:
    """How a model calls each block: the hidden states of every batch, and the other arguments, which all batches share.

    Attributes:
        hidden: the input [B, seqlen, width] of the next block, one per batch.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], batches: Sequence[Tensor]) -> None:
        self._blocks = blocks
        self._device = next(model.parameters()).device
        options = {"use_cache": False} if hasattr(model, "generation_config") else {}
        self._call = lambda batch: model(batch.to(self._device), **options)
        self.others = self._whole_pass(batches[0])
        self.hidden = [self._first_input(batch) for batch in batches]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Output of a block for a hidden state."""
        args, kwargs = self.others[index]
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


def _equal(one: Any, other: Any) -> bool:
    """Whether nested arguments have equal values; objects that are neither data nor containers count as equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and (not isinstance(one, int | float | str) or one == other)


@dataclass
class _Run:
    """One call of `quantize_sequentially`, block by block."""

    model: nn.Module
    config: AQLMWeightConfig
    calls: _BlockCalls
    blocks: int
    layers: int
    on_progress: Callable[[Progress], None] | None
    reports: list[LayerReport] = field(default_factory=list)

    def quantize(self, index: int, block: nn.Module, linears: list[nn.Module]) -> None:
        """Calibrate and quantize the layers of a block, and compute what the next block gets."""
        try:
            if linears:
                quantize_(self.model, replace(self.config, step="prepare"), _members(linears))
                self._pass("calibrate", index)
                self._tell("quantize", index)
                done = functools.partial(self._layer_done, index)
                quantize_(self.model, replace(self.config, step="convert"), _members(linears), on_layer=done)
        finally:
            detach_observers(block.modules())
        if index + 1 < self.blocks:
            with _dense_weights(block):
                self.calls.hidden = self._pass("propagate", index)

    def _pass(self, phase: Phase, index: int) -> list[Tensor]:
        self._tell(phase, index)
        return [self.calls.run(index, hidden) for hidden in self.calls.hidden]

    def _layer_done(self, index: int, report: LayerReport) -> None:
        self.reports.append(report)
        self._tell("quantize", index, report)

    def _tell(self, phase: Phase, index: int, layer: LayerReport | None = None) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(phase, index, self.blocks, len(self.reports), self.layers, layer))


def _members(modules: Sequence[nn.Module]) -> Callable[[nn.Module, str], bool]:
    """A filter_fn that accepts exactly these modules."""
    chosen = set(map(id, modules))
    return lambda module, _: id(module) in chosen


def _linears(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


@contextlib.contextmanager
def _dense_weights(block: nn.Module) -> Iterator[None]:
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
