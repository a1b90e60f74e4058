"""Nearest codebook entries of many vectors on a GPU, for the layer solver: k-means and codebooks beyond 256 entries.

Costs are products of matrices, which tensor cores compute in float16: each float32 number is split into two float16
parts, whose four products lie side by side in the inner dimension. The sum, in float32, is right to about 2^-21 of the
largest term; entries of equal rank that it leaves are compared again in float32. Against float32 products on the other
units that is an order of magnitude faster, and the squares of entries are loaded once for a tile of vectors rather than
once for each of its elements.
"""

# Loops of a kernel are Triton's, which a type checker of Python misreads:
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqlm_tensor.kernels.triton_sums import on_device, power_of_two

__all__ = ["Nearest"]

_POINTS, _ENTRIES, _CHUNK = 128, 32, 4  # of a tile; tiles of entries between two looks at the best one
_PROGRAMS = 256  # fewer would leave multiprocessors idle: the entries are then divided among several
_LARGE = tl.constexpr(2**31 - 1)
_SCALE = tl.constexpr(1024.0)  # keeps the lower parts of small numbers above float16's subnormal ones


@triton.jit
def _nearest(
    linear: tl.tensor,
    column: tl.tensor,
    squares: tl.tensor,
    entries: tl.tensor,
    halves: tl.tensor,
    unit: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    number: tl.tensor,
    size: tl.tensor,
    stretch: tl.tensor,
    E: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Lowest squares[column[n], s] - 2 linear[n] . entry s over a stretch of s, and such an s, for BN points.

    `halves` [at least S, 4 BE] has the parts (high, high, low, low) of entry / unit. Columns are gone through one by
    one: it is fast where few points have different ones.
    """
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    inside = n < number
    k = tl.arange(0, 4 * BE)
    e = k % BE
    points = tl.load(linear + n[:, None] * E + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0)
    exponent = tl.max(tl.abs(points), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
    power = exponent.to(tl.float32, bitcast=True)
    power = tl.where(power > 0, power, 1.0)
    points = points / power[:, None] * _SCALE
    high = points.to(tl.float16)
    low = (points - high.to(tl.float32)).to(tl.float16)
    parts = tl.where(((k // BE) % 2 == 0)[None, :], high, low)
    factor = power * tl.load(unit) * (-2.0 / _SCALE)
    own = tl.load(column + n, mask=inside, other=0)
    first = tl.min(tl.where(inside, own, 1 << 40), axis=0)
    last = tl.max(own, axis=0)
    squares += first * size
    begin = tl.program_id(1) * stretch
    end = tl.minimum(begin + stretch, size)
    lane = tl.arange(0, BS)
    value = tl.full([BN], float("inf"), tl.float32)
    index = tl.zeros([BN], tl.int32)
    for j in range(first, last + 1):
        best = tl.full([BN, BS], float("inf"), tl.float32)
        chunk = tl.zeros([BN, BS], tl.int32)
        for start in range(begin, end, BS * CHUNK):
            lowest = tl.full([BN, BS], float("inf"), tl.float32)
            for i in tl.static_range(CHUNK):
                s = start + i * BS + lane
                tile = tl.load(halves + s[None, :] * (4 * BE) + k[:, None])
                square = tl.load(squares + s, mask=s < end, other=float("inf"))
                lowest = tl.minimum(lowest, tl.dot(parts, tile) * factor[:, None] + square[None, :])
            chunk = tl.where(lowest < best, start, chunk)
            best = tl.minimum(best, lowest)
        least = tl.min(best, axis=1)[:, None]
        picked = tl.min(tl.where(best == least, chunk + lane[None, :], _LARGE), axis=1)
        mine = inside & (own == j)
        for i in range(CHUNK):
            s = picked + i * BS
            valid = mine & (s < end)
            exact = tl.load(squares + s, mask=valid, other=float("inf"))
            for d in tl.static_range(E):
                x = tl.load(linear + n * E + d, mask=valid, other=0.0)
                exact -= 2.0 * x * tl.load(entries + s * E + d, mask=valid, other=0.0)
            index = tl.where(exact < value, s, index)
            value = tl.minimum(exact, value)
        squares += size
    place = tl.program_id(1).to(tl.int64) * number + n
    tl.store(values + place, value, mask=inside)
    tl.store(indices + place, index, mask=inside)


class Nearest:
    """The nearest of some entries to many vectors; see `aqlm_tensor.quantizer.nearest`.

    Args:
        entries: [S, E] float32, E at most 64.
    """

    def __init__(self, entries: Tensor) -> None:
        size, entry = entries.shape
        self.entries = entries.contiguous()
        self.padded = max(8, power_of_two(entry))
        self.tiles = min(_ENTRIES, 1024 // self.padded, max(16, power_of_two(size)))
        self.unit = torch.exp2(entries.abs().amax().clamp(min=2.0**-100).log2().floor() - 10)
        scaled = entries / self.unit
        high = scaled.half()
        low = (scaled - high.float()).half()
        whole = self.tiles * _CHUNK
        self.halves = torch.zeros(-(-size // whole) * whole, 4, self.padded, dtype=torch.float16, device=entries.device)
        self.halves[:size, :2, :entry] = high[:, None]
        self.halves[:size, 2:, :entry] = low[:, None]

    def __call__(self, linear: Tensor, column: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and argmin over s of squares[column[n], s] - 2 linear[n] . entries[s], for each n.

        Args:
            linear: [N, E] float32.
            column: [N] int64; fast where neighbours have the same.
            squares: [J, S] float32.

        Returns:
            Values [N] and indices [N] int64.
        """
        number, entry = linear.shape
        programs = -(-number // _POINTS)
        steps = len(self.halves) // (self.tiles * _CHUNK)  # of all entries
        stretch = -(-steps // max(1, min(steps, _PROGRAMS // programs)))
        splits = -(-steps // stretch)
        values = torch.empty(splits, number, device=linear.device)
        indices = torch.empty(splits, number, dtype=torch.int32, device=linear.device)
        kernel: Any = _nearest
        with on_device(linear.device):
            kernel[programs, splits](
                *(linear.contiguous(), column, squares.contiguous(), self.entries, self.halves, self.unit),
                *(values, indices, number, len(self.entries), stretch * self.tiles * _CHUNK),
                E=entry,
                BE=self.padded,
                BN=_POINTS,
                BS=self.tiles,
                CHUNK=_CHUNK,
                num_warps=4,
                num_stages=2,
            )
        if splits == 1:
            return values[0], indices[0].long()
        lowest, split = values.min(0, keepdim=True)
        return lowest[0], indices.gather(0, split)[0].long()
