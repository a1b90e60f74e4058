"""Several processes that quantize one model together, by torch.distributed: they divide batches and layers.

Batch b belongs to rank b modulo their number: that rank keeps its activations and runs its forward and backward passes.
What batches add up to (X^T X, the gradient of a step of fine-tuning) goes to all ranks, and each solves some layers. No
sum depends on how batches were divided, so that any number of ranks of one kind of device gives the bits of one. The
trade-off: a block's largest layer bounds what more ranks can gain while layers are solved (about 4 times for a Llama
block, more for experts), and a step of fine-tuning occupies no more ranks than it has batches.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    def mine(self, batches: int) -> range:
        """Which of so many batches are this rank's."""
        return range(self.rank, batches, self.size)

    def owner(self, batch: int) -> int:
        """The rank of a batch."""
        return batch % self.size

    def owners(self, sizes: Sequence[int]) -> list[int]:
        """A rank for each piece of work, so that the largest share is small; the same on every rank."""
        return self.divided(sizes, self.size)

    @staticmethod
    def divided(sizes: Sequence[int], ranks: int) -> list[int]:
        """`owners` of so many ranks."""
        loads = [0] * ranks
        owners = [0] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            owners[index] = min(range(ranks), key=loads.__getitem__)
            loads[owners[index]] += sizes[index]
        return owners

    def shared(self, value: _T | None, owner: int) -> _T:
        """What the owner passed (anything that can be pickled, tensors on the CPU), on every rank."""
        holder: list[Any] = [value]
        if self._group is not None:
            dist.broadcast_object_list(holder, group=self._group, group_src=owner)
        return holder[0]

    def everyones(self, value: _T) -> list[_T]:
        """What each rank passed (anything that can be pickled), in the order of the ranks."""
        values: list[Any] = [value]
        if self._group is not None:
            values *= self.size
            dist.all_gather_object(values, value, group=self._group)
        return values

    def add_up(self, tensor: Tensor) -> None:
        """Replace the values of a contiguous tensor by their sums over the ranks."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)

    def add_up_together(self, tensors: Sequence[Tensor]) -> None:
        """Replace the values of several tensors on one device and of one dtype by their sums over the ranks."""
        if self._group is not None:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            self.add_up(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def together(self, own: Mapping[int, _T]) -> dict[int, _T]:
        """What all ranks found, by its number."""
        return {number: value for part in self.everyones(dict(own)) for number, value in part.items()}

    def spread(self, tensor: Tensor, owner: int) -> None:
        """Replace the values of a contiguous tensor by the owner's."""
        if self._group is not None:  # as bytes: int16 is not for every backend
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=self._group, group_src=owner)

    @torch.no_grad()
    def like_first(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first rank's values into everyone's tensors."""
        if self._group is not None:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                self.spread(whole, 0)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The block of code runs on the first rank, and once that is through it, on the others.

        Raises:
            RuntimeError: on the others, if it failed on the first.
        """
        if self.rank > 0:
            failure = self.shared(None, 0)
            if failure is not None:
                raise RuntimeError(f"the first process failed: {failure}")
            yield
            return
        try:
            yield
        except Exception as error:
            self.shared(str(error), 0)
            raise
        self.shared(None, 0)
