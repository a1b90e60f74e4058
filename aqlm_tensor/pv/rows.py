"""Rows: which rows of a tensor a rank holds, where FSDP2 has sharded it."""

import math
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

__all__ = ["Rows"]


class Rows:
    """The rows of a tensor that this rank holds: all of them, or its shard.

    Args:
        like: a tensor sharded along its first dimension, whose mesh counts; None for all rows.

    Attributes:
        count: shards that there are.
    """

    def __init__(self, like: DTensor | None = None) -> None:
        self._like = like
        self.count, self._index = 1, 0
        for dimension, placement in enumerate(() if like is None else like.placements):
            if like is not None and isinstance(placement, Shard):
                self.count = like.device_mesh.size(dimension)
                self._index = like.device_mesh.get_local_rank(dimension)

    def of(self, rows: int) -> slice:
        """This rank's of so many rows, divided as `torch.chunk` does."""
        size = -(-rows // self.count)
        return slice(min(rows, self._index * size), min(rows, (self._index + 1) * size))

    @torch.no_grad()
    def whole(self, part: Tensor, rows: int | None = None) -> Tensor:
        """All rows, on every rank; all have to call this.

        Args:
            part: this rank's rows, contiguous.
            rows: how many there are in all; None if each rank has the same number.
        """
        if self._like is None:
            return part
        data = part.detach().reshape(len(part), math.prod(part.shape[1:]))
        data = data if data.is_floating_point() else data.view(torch.uint8)  # neither gloo nor NCCL knows int16
        shape = torch.Size((len(part) * self.count if rows is None else rows, data.shape[1]))
        mesh, placements = self._like.device_mesh, self._like.placements
        stride = (shape[1], 1)
        sharded = DTensor.from_local(data, mesh, placements, run_check=False, shape=shape, stride=stride)
        return cast("Tensor", sharded.full_tensor()).view(part.dtype).view(-1, *part.shape[1:])
