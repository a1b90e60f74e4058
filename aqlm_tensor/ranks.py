"""Several processes that quantize one model together, by torch.distributed: each solves some layers, all get them.

Every rank runs the forward passes, on the same batches, so a run of several ranks gives the bits of a run of one. The
trade-off: passes and fine-tuning are not divided, which is the smaller part of the time; and a block's largest layer
bounds what more ranks can gain (about 4 times for a Llama block, more for experts).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]

_T = TypeVar("_T")


class Ranks:
    """The ranks of a process group, or this process alone.

    Args:
        group: None for this process alone.

    Attributes:
        rank: of this process in the group.
        size: processes in the group.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def owners(self, sizes: Sequence[int]) -> list[int]:
        """A rank for each piece of work, so that the largest share is small; the same on every rank."""
        loads = [0] * self.size
        owners = [0] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            owners[index] = min(range(self.size), key=loads.__getitem__)
            loads[owners[index]] += sizes[index]
        return owners

    def shared(self, value: _T | None, owner: int) -> _T:
        """What the owner passed (anything that can be pickled, tensors on the CPU), on every rank."""
        holder: list[Any] = [value]
        if self._group is not None:
            dist.broadcast_object_list(holder, group=self._group, group_src=owner)
        return holder[0]

    @torch.no_grad()
    def like_first(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first rank's values into everyone's tensors."""
        if self._group is not None:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, group=self._group, group_src=0)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The block of code runs on the first rank, and once that is through it, on the others."""
        if self._group is not None and self.rank > 0:
            dist.barrier(self._group)
        yield
        if self._group is not None and self.rank == 0:
            dist.barrier(self._group)
