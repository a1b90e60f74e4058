"""How a model calls its blocks, so that one block at a time can be run on stored inputs, for any kind of batch.

Each batch goes through the model once with blocks that only hand on what they get. That costs nothing but the
embedding, and tells what each block is called with for that batch besides the hidden state: masks, positions, another
modality. Only the hidden state may depend on what the blocks compute; that is checked on the first batch, for which
the blocks run.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from aqlm_tensor.calibration.activations import Activations, Place

__all__ = ["Batch", "BlockCalls", "on_device", "tensors_of"]

Batch = Tensor | Mapping[str, Any]
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):  # noqa: N818 - ends a forward pass, nothing is wrong
    """Raised in the last block; what follows (the output embedding) is costly and not wanted."""


class _Hidden:
    """Stands where the hidden state goes among a block's arguments."""


_HIDDEN = _Hidden()


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors in a batch, in order."""
    values = batch if isinstance(batch, Tensor) else [batch[name] for name in sorted(batch)]
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def on_device(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block of code a module is on a device; afterwards it is where it was."""
    home = next(block.parameters()).device
    try:
        if home != device:
            block.to(device)
        yield
    finally:
        if home != device:
            block.to(home)


class BlockCalls:
    """The inputs of the next block, and what else each block is called with, for every batch.

    Args:
        model: called as model(batch), or model(**batch) for a mapping.
        blocks: in the order in which the model calls them.
        batches: at least one.
        device: where blocks are run.
        place: where inputs are kept.
        folder: where inputs on disk go.

    Attributes:
        inputs: the hidden state that the next block gets, one per batch.

    Raises:
        ValueError: if the model is no plain sequence of these blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Sequence[Batch],
        *,
        device: torch.device,
        place: Place = "device",
        folder: Path | None = None,
    ) -> None:
        self._model, self._blocks = model, blocks
        self._device, self._folder = device, folder
        self._place: Place = place
        self._outputs: list[Any] = []
        self.inputs = self.activations()
        self._arguments: list[list[_Arguments]] = []
        _, expected = self._pass(batches[0], hand_on=False)
        for number, batch in enumerate(batches):
            first, arguments = self._pass(batch, hand_on=True)
            if number == 0:
                _check_independent(expected, arguments)
            self.inputs.append(first)
            self._arguments.append(self._shared(arguments))
        self._outputs.clear()

    def activations(self) -> Activations:
        """An empty place for hidden states, one per batch."""
        return Activations(self._place, self._device, self._folder)

    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Output of a block for the hidden state of a batch, whose float dtype the other arguments take on."""

        def fill(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(hidden.device, hidden.dtype if value.is_floating_point() else None)
            return hidden if value is _HIDDEN else value

        args, kwargs = tree_map_only((Tensor, _Hidden), fill, self._arguments[batch][index])
        return _first(self._blocks[index](*args, **kwargs))

    def alike(self, index: int, one: int, other: int) -> bool:
        """Whether a block is called alike for two batches, but for the hidden state."""
        return _equal(self._arguments[one][index], self._arguments[other][index])

    def _pass(self, batch: Batch, *, hand_on: bool) -> tuple[Tensor, list[_Arguments]]:
        """Input of the first block and the other arguments of each, from one pass through the model."""
        calls: list[_Arguments] = []
        states: list[Tensor] = []  # what the first block got, then what the newest one put out

        def call(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden, arguments = _split(args, kwargs)
            if index != len(calls) or hidden is None or (index > 0 and hidden is not states[-1]):
                raise ValueError(
                    f"block {len(calls)} ({type(self._blocks[index]).__name__}) is not called in order with the output "
                    "of the block before it: use quantize_ with prepare and convert instead"
                )
            calls.append(arguments)
            states.extend([hidden] if index == 0 else [])
            output = self._handed_on(index, hidden) if hand_on else self._computed(index, forward, args, kwargs)
            states.append(_first(output))
            if index + 1 == len(self._blocks):
                raise _Stop
            return output

        with contextlib.suppress(_Stop), _replaced_forwards(self._blocks, call):
            self._call(batch)
            raise ValueError("the model did not call all of its blocks: pass those that it calls, in order, as blocks")
        return states[0], calls

    def _call(self, batch: Batch) -> None:
        device = next(self._model.parameters()).device
        options: dict[str, Any] = {"use_cache": False} if hasattr(self._model, "generation_config") else {}
        if isinstance(batch, Tensor):
            self._model(batch.to(device), **options)
        else:
            self._model(**{**options, **tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(batch))})

    def _computed(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a block really puts out; its form is noted."""
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(self._device), (args, kwargs))
        with on_device(self._blocks[index], self._device):
            output = forward(*args, **kwargs)
        if not isinstance(output, Tensor) and not (isinstance(output, tuple | list) and isinstance(output[0], Tensor)):
            raise ValueError(
                f"block {index} ({type(self._blocks[index]).__name__}) puts out a {type(output).__name__}: its output "
                "must be the hidden state, or a tuple or list that begins with it"
            )
        self._outputs.append(None if isinstance(output, Tensor) else output)
        return output

    def _handed_on(self, index: int, hidden: Tensor) -> Any:
        """The hidden state in the form of the block's output."""
        like = self._outputs[index]
        return hidden if like is None else type(like)([hidden, *like[1:]])

    def _shared(self, arguments: list[_Arguments]) -> list[_Arguments]:
        """The same with each tensor where it is kept, one and the same for blocks and batches where it is equal."""
        earlier = self._arguments[-1] if self._arguments else [None] * len(arguments)
        target = self._device if self._place == "device" else torch.device("cpu")
        kept: dict[int, Tensor] = {}
        shared = []
        for call, before in zip(arguments, earlier, strict=True):
            leaves, form = tree_flatten(call)
            candidates = tree_flatten(before)[0] if before is not None else []
            for position, leaf in enumerate(leaves):
                if not isinstance(leaf, Tensor):
                    continue
                if id(leaf) not in kept:
                    moved = leaf.to(target)
                    candidate = candidates[position] if position < len(candidates) else None
                    if isinstance(candidate, Tensor) and _equal(moved, candidate):
                        moved = candidate
                    kept[id(leaf)] = moved
                leaves[position] = kept[id(leaf)]
            shared.append(tree_unflatten(leaves, form))
        return shared


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, _Arguments]:
    """The hidden state, which is the first argument or the first tensor among the keywords, and the others."""
    if args:
        return (args[0] if isinstance(args[0], Tensor) else None), ((_HIDDEN, *args[1:]), kwargs)
    name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    return (None, (args, kwargs)) if name is None else (kwargs[name], (args, {**kwargs, name: _HIDDEN}))


@contextlib.contextmanager
def _replaced_forwards(blocks: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Inside the block of code, call(index, forward, ...) stands in for each block's forward."""
    own = [vars(block).get("forward") for block in blocks]  # what hooks of other libraries may have put there
    try:
        for index, block in enumerate(blocks):
            block.forward = functools.partial(call, index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is not None:
                block.forward = forward
            else:
                vars(block).pop("forward", None)


def _check_independent(computed: list[_Arguments], handed_on: list[_Arguments]) -> None:
    """Raise if what a block is called with changes with what the blocks before it compute."""
    for index, (one, other) in enumerate(zip(computed, handed_on, strict=True)):
        if not _equal(one, other):
            raise ValueError(
                f"more than the hidden state that enters block {index} depends on what earlier blocks compute: use "
                "quantize_ with prepare and convert instead"
            )


def _equal(one: Any, other: Any) -> bool:
    """Whether nested arguments have equal values; objects that are neither data nor containers count as equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one is other:
            return True
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.to(other.device), other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and (not isinstance(one, int | float | str) or one == other)
