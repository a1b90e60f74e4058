"""Observers: collect X^T X of each layer's inputs while the user's data runs through the model.

Layers that read the same input (q, k and v; gate and up) share one accumulator, whatever the architecture: they are
found by the input tensor itself, not by name. A layer joins a group when its first input is the tensor that the group
was started with, and leaves it, with exactly what it had seen, the first time its input differs.
"""

import os
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_tensor.quantizer.hessian import HessianAccumulator
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["Observer", "add_up", "detach_observers", "observer_of"]

_ATTRIBUTE = "_aqlm_observer"
_MEMORY_FRACTION = 0.5
_RECENT = 16  # input tensors remembered; layers that share one run right after each other


class _SharedInput:
    """One accumulator and the observers whose layers have read the same inputs so far."""

    def __init__(self, accumulator: HessianAccumulator) -> None:
        self.accumulator = accumulator
        self.batches = 0
        self.members: list[Observer] = []
        # the newest batch, kept apart until every member has read it
        self.pending: HessianAccumulator | None = None
        self.waiting: list[Observer] = []
        self.source: weakref.ref[Tensor] | None = None
        self.version = 0
        _groups.add(self)

    def is_source(self, x: Tensor) -> bool:
        """Whether x is the very tensor, unchanged, of the newest batch."""
        return self.source is not None and self.source() is x and self.version == _version(x)

    def start(self, leader: "Observer", x: Tensor) -> None:
        """Read a new batch through its first member."""
        self.settle()
        self.batches += 1
        self.source, self.version = weakref.ref(x), _version(x)
        self.waiting = [member for member in self.members if member is not leader]
        if not self.waiting:
            self.accumulator.add(x)
            return
        self.pending = HessianAccumulator(x.shape[-1], device=self.accumulator.device)
        self.pending.add(x)

    def arrived(self, member: "Observer") -> None:
        """A waiting member has read the newest batch, too."""
        self.waiting.remove(member)
        if not self.waiting:
            self.settle()

    def settle(self) -> None:
        """Count the newest batch; members that never read it leave with what they had seen before."""
        for member in list(self.waiting):
            member.leave()
        if self.pending is not None:
            self.accumulator.merge(self.pending)
            self.pending = None


_groups: "weakref.WeakSet[_SharedInput]" = weakref.WeakSet()
_recent: deque["weakref.ref[_SharedInput]"] = deque(maxlen=_RECENT)


class Observer:
    """Collects X^T X of one linear layer; attached to the module until `detach`.

    Args:
        module: the layer; must not have an observer yet.
        scheme: what it will be converted to.
    """

    def __init__(self, module: nn.Linear, scheme: AQLMScheme) -> None:
        self.scheme = scheme
        self.in_features = module.in_features
        self._group: _SharedInput | None = None
        self._module = weakref.ref(module)
        self._handle = module.register_forward_pre_hook(self._observe, with_kwargs=True)
        setattr(module, _ATTRIBUTE, self)

    @property
    def tokens(self) -> int:
        """Input vectors seen so far."""
        if self._group is None:
            return 0
        pending = self._group.pending
        seen_pending = pending is not None and self not in self._group.waiting
        return self._group.accumulator.tokens + (pending.tokens if pending is not None and seen_pending else 0)

    def hessian(self) -> Tensor | None:
        """X^T X over all inputs seen, [in_features, in_features] float32, to be left alone; None if there were none."""
        group = self.settled()
        return None if group is None or self.tokens == 0 else group.accumulator.narrowed()

    def settled(self) -> _SharedInput | None:
        """The group, once the newest batch is counted; None before the first."""
        if self._group is not None:
            self._group.settle()
        return self._group

    def move(self, group: _SharedInput) -> None:
        """Go on in another group."""
        if self._group is not None:
            self._group.members.remove(self)
        group.members.append(self)
        self._group = group

    def detach(self) -> None:
        """Remove the observer from its module."""
        self._handle.remove()
        module = self._module()
        if module is not None and getattr(module, _ATTRIBUTE, None) is self:
            delattr(module, _ATTRIBUTE)
        if self._group is not None:
            self._group.settle()
            self._group.members.remove(self)
            self._group = None

    def leave(self) -> None:
        """Go on alone from the batches counted so far, without the pending one."""
        group = self._group
        assert group is not None
        if self in group.waiting:
            group.waiting.remove(self)
        alone = _SharedInput(group.accumulator.clone())
        alone.batches = group.batches - 1
        self.move(alone)

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        x = args[0] if args else kwargs["input"]
        if self._group is None:
            self._join(x)
        elif self in self._group.waiting and self._group.is_source(x):
            self._group.arrived(self)
        else:
            if self in self._group.waiting:
                self.leave()
            self._group.start(self, x)

    def _join(self, x: Tensor) -> None:
        for reference in _recent:
            group = reference()
            if group is not None and group.batches == 1 and group.is_source(x):
                group.members.append(self)
                self._group = group
                return
        _check_memory(self.in_features, x.device)
        self._group = _SharedInput(HessianAccumulator(self.in_features, device=x.device))
        self._group.members.append(self)
        _recent.append(weakref.ref(self._group))
        self._group.start(self, x)


def observer_of(module: nn.Module) -> Observer | None:
    """The observer attached to a module, or None."""
    return getattr(module, _ATTRIBUTE, None)


def detach_observers(modules: Iterable[nn.Module]) -> None:
    """Remove the observers of those modules that have one."""
    for module in modules:
        observer = observer_of(module)
        if observer is not None:
            observer.detach()


def add_up(layers: Sequence[nn.Linear], ranks: Ranks) -> None:
    """Let the observers of some layers know what those of the same layers have seen on all ranks.

    Args:
        layers: with observers; the same ones, in the same order, on every rank.
        ranks: all of which call this.
    """
    if ranks.size == 1:
        return
    observers = [observer for layer in layers if (observer := observer_of(layer)) is not None]
    before = [observer.settled() for observer in observers]
    # layers share a sum that they share on every rank: some of them may have seen nothing on one (experts)
    firsts = [None if group is None else before.index(group) for group in before]
    keys = list(zip(*ranks.everyones(firsts), strict=True))
    for key in dict.fromkeys(keys):
        if any(first is not None for first in key):
            shared = [observer for observer, other in zip(observers, keys, strict=True) if other == key]
            _apart(shared, layers[0].weight.device).accumulator.add_up(ranks)


def _apart(observers: Sequence[Observer], device: torch.device) -> _SharedInput:
    """A group of exactly these observers, all of which are in one group, or in none."""
    group = observers[0].settled()
    if group is None or len(group.members) > len(observers):
        group = _SharedInput(
            HessianAccumulator(observers[0].in_features, device) if group is None else group.accumulator.clone()
        )
        for observer in observers:
            observer.move(group)
    return group


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _check_memory(in_features: int, device: torch.device) -> None:
    """Refuse an accumulator that would bring all of them above half of the device's memory."""
    sizes = [group.accumulator.in_features for group in _groups if group.accumulator.device == device]
    needed = 8 * sum(size * size for size in [*sizes, in_features])
    limit = int(_MEMORY_FRACTION * _total_memory(device))
    if needed > limit:
        raise MemoryError(
            f"the observers' X^T X would take {needed / 1e9:.1f} GB on {device}, more than {_MEMORY_FRACTION:.0%} of "
            "its memory: prepare and convert fewer layers at a time (filter_fn)"
        )


def _total_memory(device: torch.device) -> int:
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.get_device_module(device).mem_get_info(device)[1]
