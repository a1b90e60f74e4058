"""Sums by code on a GPU, for the layer solver.

Sums go over codes sorted once, without atomics, so that a device gives the same bits every time.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CodeSums", "on_device", "power_of_two"]


@triton.jit
def _sum_segments(
    values: tl.tensor,
    weights: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    sums: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    columns: tl.tensor,
    count: tl.tensor,
    WEIGHTED: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    """sums[split, s]: over a stretch of offsets[s] <= i < offsets[s + 1], the sum of values[n], n = order[i] // count.

    With WEIGHTED, of weights[n // columns] * values[n % columns].
    """
    s, split = tl.program_id(0), tl.program_id(2)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    begin, end = tl.load(offsets + s), tl.load(offsets + s + 1)
    stretch = (end - begin + tl.num_programs(2) - 1) // tl.num_programs(2)
    begin += split * stretch
    end = tl.minimum(end, begin + stretch)
    total = tl.zeros([BN, BE], tl.float32)
    for start in range(begin, end, BN):
        i = start + tl.arange(0, BN)
        n = tl.load(order + i, mask=i < end, other=0) // count
        at = n % columns if WEIGHTED else n
        inside = (i < end)[:, None] & (e < width)[None, :]
        value = tl.load(values + at[:, None] * width + e[None, :], mask=inside, other=0.0)
        if WEIGHTED:
            value *= tl.load(weights + n // columns, mask=i < end, other=0.0)[:, None]
        total += value
    place = sums + (split.to(tl.int64) * size + s) * width + e
    tl.store(place, tl.sum(total, axis=0), mask=e < width)


class CodeSums:
    """Sums by code on a GPU; see `aqlm_tensor.quantizer.sums`.

    Args:
        codes: [R, J, K] int64, below `size`.
        size: number of sums of each codebook.
    """

    def __init__(self, codes: Tensor, size: int) -> None:
        self.size, self.columns, self.count = size, codes.shape[1], codes.shape[2]
        book = torch.arange(self.count, dtype=torch.int32, device=codes.device) * size
        ordered, self.order = (codes.to(torch.int32) + book).flatten().sort(stable=True)
        bounds = torch.arange(size * self.count + 1, dtype=torch.int32, device=codes.device)
        self.offsets = torch.searchsorted(ordered, bounds)

    def __call__(self, values: Tensor) -> Tensor:
        """Sums [K, size, E] of `values` [R * J, E] float32."""
        return self._sums(values.contiguous(), None)

    def weighted(self, weights: Tensor, blocks: Tensor) -> Tensor:
        """Sums [K, size, E] of weights[r] * blocks[j]: `weights` [R], `blocks` [J, E] float32."""
        return self._sums(blocks.contiguous(), weights.contiguous())

    def _sums(self, values: Tensor, weights: Tensor | None) -> Tensor:
        width, number = values.shape[1], self.size * self.count
        splits = max(1, min(32, len(self.order) // (number * 1024)))
        block = min(64, power_of_two(width))
        sums = torch.empty(splits, self.count, self.size, width, device=values.device)
        kernel: Any = _sum_segments
        with on_device(values.device):
            kernel[number, -(-width // block), splits](
                *(values, values if weights is None else weights, self.order, self.offsets, sums),
                *(number, width, self.columns, self.count),
                WEIGHTED=weights is not None,
                BN=1024 // block,
                BE=block,
            )
        return sums[0] if splits == 1 else sums.sum(0)


def power_of_two(n: int) -> int:
    """The power of two at or next above n."""
    return 1 << max(0, n - 1).bit_length()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one; elsewhere (Triton's interpreter) do nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
