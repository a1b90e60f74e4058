"""The blocks of a model, the order of the layers in a block, and windows of a text."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from aqlm_tensor.tensor import AQLMTensor

__all__ = ["dense_weights", "find_blocks", "in_blocks", "linears_of", "members", "reading_order", "sample_windows"]


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
    """A model's repeated blocks, in order.

    These are the members of the nn.ModuleList, nn.ModuleDict or nn.Sequential with the most linear layers in them,
    where the members are more than linear layers themselves (beside several of them, linear layers are passed over: an
    embedding of images, a head). In a Transformers model of several parts (a vision tower
    and a language model, an encoder and a decoder) only its decoder is looked at.

    Raises:
        ValueError: if there are none.
    """
    most = nn.ModuleList()
    for module in _decoder(model).modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        found = [child for child in module.children() if linears_of([child])]
        blocks = [child for child in found if not isinstance(child, nn.Linear)]
        repeated = len(blocks) > 1 or (blocks and len(blocks) == len(found))
        if repeated and len(linears_of(blocks)) >= len(linears_of(most)):  # of two in each other the inner
            most = module if isinstance(module, nn.ModuleList) and blocks == found else nn.ModuleList(blocks)
    if not linears_of(most):
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList (nor nn.Sequential) of blocks with nn.Linear layers: use "
            "quantize_ with prepare and convert instead, or pass the blocks; layers of other types (GPT-2's Conv1D) "
            "have to become nn.Linear first"
        )
    return most


def _decoder(model: nn.Module) -> nn.Module:
    """What Transformers calls the decoder of a model, if that has blocks; else the model."""
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if callable(getter) else None
    return decoder if isinstance(decoder, nn.Module) and linears_of([decoder]) else model


def in_blocks(model: nn.Module, max_blocks: int | None = None) -> Callable[[nn.Module, str], bool]:
    """A filter_fn that accepts the linear layers of the model's blocks, or of the first `max_blocks`."""
    return members(linears_of(list(find_blocks(model))[:max_blocks]))


def members(modules: Sequence[nn.Module]) -> Callable[[nn.Module, str], bool]:
    """A filter_fn that accepts exactly these modules."""
    chosen = set(map(id, modules))
    return lambda module, _: id(module) in chosen


def linears_of(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """The linear layers in some modules, in order, but for routers of experts and nn.MultiheadAttention's out_proj.

    Routers hold next to nothing, and an error in them does not change an output a little but sends tokens elsewhere.
    MultiheadAttention reads weights without calling layers, so that their inputs cannot be seen.
    """
    parts = [part for module in modules for part in module.modules()]
    left_out = {id(layer) for part in parts if hasattr(part, "experts") for layer in _routers(part)}
    left_out |= {id(part) for part in parts if isinstance(part, nn.modules.linear.NonDynamicallyQuantizableLinear)}
    return [part for part in parts if isinstance(part, nn.Linear) and id(part) not in left_out]


def _routers(mixture: nn.Module) -> list[nn.Module]:
    """What chooses and weighs the experts that a module holds."""
    found = [child for name, child in mixture.named_children() if re.fullmatch(r"gate|router|\w+_gate", name)]
    return [part for child in found for part in child.modules()]


def reading_order(block: nn.Module, layers: Sequence[nn.Linear], run: Callable[[], Any]) -> list[list[nn.Linear]]:
    """Layers of a block in groups that depend on each other in one direction only.

    A group are layers that read the same tensor (q, k and v; gate and up), with their namesakes in other experts; the
    groups stand in the order in which they are first called. Layers that are not called join their namesakes, or come
    last.

    Args:
        block: holds the layers.
        layers: to be grouped.
        run: calls the block once.
    """
    names = {id(module): re.sub(r"\b\d+\b", "*", name) for name, module in block.named_modules()}
    seen: list[Tensor] = []  # kept alive, so that no two inputs have one id
    group_of: dict[str | int, int] = {}  # by name, and by id of the input

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, x = names[id(layer)], args[0] if args else kwargs["input"]
        seen.append(x)
        if name not in group_of:
            group_of[name] = group_of.get(id(x), len(group_of))
        group_of.setdefault(id(x), group_of[name])

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    last = max(group_of.values(), default=0) + 1
    groups: dict[int, list[nn.Linear]] = {}
    for layer in layers:
        groups.setdefault(group_of.get(names[id(layer)], last), []).append(layer)
    return [groups[number] for number in sorted(groups)]


@contextlib.contextmanager
def dense_weights(block: nn.Module) -> Iterator[None]:
    """Inside the block of code, quantized weights are dense: decoded once rather than in each batch's forward."""
    quantized = [
        (module, name, weight)
        for module in block.modules()
        for name, weight in module.named_parameters(recurse=False)
        if isinstance(weight, AQLMTensor)
    ]
    try:
        for module, name, weight in quantized:
            setattr(module, name, nn.Parameter(weight.dequantize(), requires_grad=False))
        yield
    finally:
        for module, name, weight in quantized:
            setattr(module, name, weight)
