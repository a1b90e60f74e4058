"""Inner loops of the layer solver on a GPU: the code search over a block of groups.

The others are in `triton_nearest` and `triton_sums`.

One program carries a few rows through all groups of a block, so that a block is one launch; the tables of pair costs,
which all rows share, stay in the second-level cache. Pair costs are 32-bit integers, as on the CPU: Hopper adds and
compares them in one instruction, and equal sums have the same winner, the lowest pair. There are no atomics, so a
device gives the same bits every time.
"""

# Loops of a kernel are Triton's, which a type checker of Python misreads:
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqlm_tensor.kernels.triton_nearest import Nearest
from aqlm_tensor.kernels.triton_sums import CodeSums, on_device, power_of_two

__all__ = ["CodeSums", "Nearest", "supports", "sweep_block"]

_MAX_ENTRY = 64  # elements of an entry; loops over them are unrolled
_MAX_SIZE = 256  # entries of a codebook whose pairs are all tried
_ROWS, _CHUNK = 8, 8  # rows of a program; first entries between two looks at the best pair. Of those tried the fastest
_LARGE = tl.constexpr(2**31 - 1)


@triton.jit
def _residual(
    target: tl.tensor,
    indices: tl.tensor,
    books: tl.tensor,
    inside: tl.tensor,
    h: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    chosen: tl.tensor,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
) -> tl.tensor:
    """Row h of the `target` at [BR] less the entries of the books below `chosen` but for two: [BR, BG]."""
    g = tl.arange(0, BG)[None, :]
    value = tl.load(target[:, None] + g, mask=inside[:, None] & (g < G), other=0.0)
    for k in tl.static_range(K):
        counts = inside & (k != first) & (k != second) & (k < chosen)
        code = tl.load(indices + k, mask=counts, other=0)[:, None]
        value -= tl.load(books + ((k * SIZE + code) * H + h) * G + g, mask=counts[:, None] & (g < G), other=0.0)
    return value


@triton.jit
def _entry_costs(
    linear: tl.tensor,
    transposed: tl.tensor,
    squares: tl.tensor,
    k: tl.tensor,
    inside: tl.tensor,
    SIZE: tl.constexpr,
    E: tl.constexpr,
) -> tl.tensor:
    """q M q - 2 b q of every entry q of codebook k, for linear terms b at `linear` [BR]: [BR, SIZE]."""
    s = tl.arange(0, SIZE)[None, :]
    total = tl.load(squares + k * SIZE + s)
    for e in tl.static_range(E):
        slope = -2.0 * tl.load(linear + e, mask=inside, other=0.0)
        total += slope[:, None] * tl.load(transposed + (k * E + e) * SIZE + s)
    return total


@triton.jit
def _fixed_point(costs: tl.tensor, factor: tl.tensor, limit: tl.tensor) -> tl.tensor:
    return tl.minimum((costs - tl.min(costs, axis=1)[:, None]) * factor, limit).to(tl.int32)


@triton.jit
def _best_pair(
    first_costs: tl.tensor, second: tl.tensor, table: tl.tensor, SIZE: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """Argmin i * SIZE + l of first[i] + second[l] + table[i, l], the lowest of equals: [BR].

    Costs of first entries are read from `first_costs` [BR], those of second ones are given, [BR, SIZE].
    """
    s = tl.arange(0, SIZE)[None, :]
    best = tl.full(second.shape, _LARGE, tl.int32)
    chunk = tl.zeros(second.shape, tl.int32)
    for start in range(0, SIZE, CHUNK):
        low = tl.full(second.shape, _LARGE, tl.int32)
        for step in tl.static_range(CHUNK):
            pair = tl.load(table + (start + step) * SIZE + s)
            low = tl.minimum(low, pair + tl.load(first_costs + start + step)[:, None])
        chunk = tl.where(low < best, start, chunk)
        best = tl.minimum(low, best)
    best += second
    lowest = tl.min(best, axis=1)[:, None]
    begin = tl.min(tl.where(best == lowest, chunk, SIZE - CHUNK), axis=1)
    found = tl.full(second.shape, SIZE * SIZE - 1, tl.int32)
    for step in range(CHUNK):
        i = begin + step
        value = tl.load(table + i[:, None] * SIZE + s) + tl.load(first_costs + i)[:, None] + second
        found = tl.minimum(found, tl.where(value == lowest, i[:, None] * SIZE + s, SIZE * SIZE - 1))
    return tl.min(found, axis=1)


@triton.jit
def _sweep_block(
    target: tl.tensor,
    pending: tl.tensor,
    error: tl.tensor,
    indices: tl.tensor,
    metric: tl.tensor,
    feedback: tl.tensor,
    books: tl.tensor,
    transposed: tl.tensor,
    squares: tl.tensor,
    tables: tl.tensor,
    factors: tl.tensor,
    order: tl.tensor,
    linear: tl.tensor,
    changes: tl.tensor,
    costs: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    row_stride: tl.tensor,
    height_stride: tl.tensor,
    index_stride: tl.tensor,
    steps: tl.tensor,
    pairs: tl.tensor,
    limit: tl.tensor,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    KNOWN: tl.constexpr,
    COUPLED: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
    BW: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Visit the groups of a block in order for BR rows.

    `linear` and `changes` [R, H G] and `costs` [R, SIZE] are scratch; only this program touches its rows of them.
    """
    E: tl.constexpr = H * G
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    inside = row < rows
    g = tl.arange(0, BG)[None, :]
    w = tl.arange(0, BW)[None, :]
    in_group = inside[:, None] & (g < G)
    linear += row * E
    changes += row * E
    costs += row * SIZE
    target += row * row_stride
    error += row * row_stride
    pending += row * (H * columns)
    indices += row * index_stride
    for j in range(groups):
        left = j * G
        for step in range(steps):
            first, second = tl.load(order + 2 * step), tl.load(order + 2 * step + 1)
            if K > 2:  # what the other books leave over; first they are chosen in the order of the pairs
                chosen = K if KNOWN else tl.minimum(step, K)
                for h in range(H):
                    place = target + h * height_stride + left
                    value = _residual(place, indices, books, inside, h, first, second, chosen, K, SIZE, H, G, BG)
                    tl.store(changes[:, None] + h * G + g, value, mask=in_group)
                tl.debug_barrier()
            for h in range(H):
                total = tl.load(pending[:, None] + h * columns + left + g, mask=in_group, other=0.0)
                for f in range(G):
                    place = changes + h * G + f if K > 2 else target + h * height_stride + left + f
                    row_metric = tl.load(metric + f * G + g, mask=g < G, other=0.0)
                    total += tl.load(place, mask=inside, other=0.0)[:, None] * row_metric
                tl.store(linear[:, None] + h * G + g, total, mask=in_group)
            tl.debug_barrier()
            one = _entry_costs(linear, transposed, squares, first, inside, SIZE, E)
            if K == 1:
                s = tl.arange(0, SIZE)[None, :]
                nearest = tl.where(one == tl.min(one, axis=1)[:, None], s, SIZE - 1)
                tl.store(indices, tl.min(nearest, axis=1).to(tl.int64), mask=inside)
            else:
                factor = tl.load(factors + step % pairs)
                s = tl.arange(0, SIZE)[None, :]
                one_fixed = _fixed_point(one, factor, limit)
                tl.store(costs[:, None] + s, one_fixed, mask=inside[:, None])
                two = _entry_costs(linear, transposed, squares, second, inside, SIZE, E)
                two_fixed = _fixed_point(two, factor, limit)
                tl.debug_barrier()
                table = tables + (step % pairs) * (SIZE * SIZE)
                best = _best_pair(costs, two_fixed, table, SIZE, CHUNK)
                tl.store(indices + first, (best // SIZE).to(tl.int64), mask=inside)
                tl.store(indices + second, (best % SIZE).to(tl.int64), mask=inside)
            tl.debug_barrier()
        for h in range(H):
            place = h * height_stride + left
            value = _residual(target + place, indices, books, inside, h, -1, -1, K, K, SIZE, H, G, BG)
            value -= tl.load(error[:, None] + place + g, mask=in_group, other=0.0)
            tl.store(changes[:, None] + h * G + g, value, mask=in_group)
        tl.debug_barrier()  # every thread has read the old errors
        for h in range(H):
            place = h * height_stride + left
            value = _residual(target + place, indices, books, inside, h, -1, -1, K, K, SIZE, H, G, BG)
            tl.store(error[:, None] + place + g, value, mask=in_group)
            if COUPLED:
                later = inside[:, None] & (w >= left + G) & (w < columns)
                waiting = tl.load(pending[:, None] + h * columns + w, mask=later, other=0.0)
                for f in range(G):
                    moved = tl.load(changes + h * G + f, mask=inside, other=0.0)
                    coupled = tl.load(feedback + (left + f) * columns + w, mask=w < columns, other=0.0)
                    waiting += moved[:, None] * coupled
                tl.store(pending[:, None] + h * columns + w, waiting, mask=later)
        tl.debug_barrier()
        indices += K
        metric += G * G
        squares += K * SIZE
        tables += pairs * (SIZE * SIZE)
        factors += pairs


def supports(size: int, entry: int) -> bool:
    """Whether `sweep_block` takes codebooks of `size` entries of `entry` elements."""
    return size <= _MAX_SIZE and size == power_of_two(size) and entry <= _MAX_ENTRY


def sweep_block(
    target: Tensor,
    pending: Tensor,
    error: Tensor,
    indices: Tensor,
    known: bool,
    metric: Tensor,
    feedback: Tensor,
    books: Tensor,
    transposed: Tensor,
    squares: Tensor,
    tables: Tensor,
    factors: Tensor,
    limit: float,
    order: Tensor,
) -> None:
    """Visit the groups of one block in order for all rows; see `aqlm_tensor.kernels.numba_search.sweep_block`."""
    rows, height, columns = target.shape
    groups, group = metric.shape[:2]
    count, size, entry = books.shape
    assert pending.is_contiguous()
    assert target.stride() == error.stride()
    assert target.stride(2) == indices.stride(2) == 1
    assert indices.stride(1) == count
    linear, changes = torch.empty(2, rows, entry, device=target.device)
    costs = torch.empty(-(-rows // 64) * 64, size, dtype=torch.int32, device=target.device)
    kernel: Any = _sweep_block
    with on_device(target.device):
        kernel[(-(-rows // _ROWS),)](
            *(target, pending, error, indices, metric, feedback, books, transposed, squares, tables, factors, order),
            *(linear, changes, costs, rows, columns, groups, target.stride(0), target.stride(1), indices.stride(0)),
            *(len(order), max(1, tables.shape[1]), limit),
            K=count,
            SIZE=size,
            H=height,
            G=group,
            KNOWN=known,
            COUPLED=feedback.numel() > 0,
            BR=_ROWS,
            BG=power_of_two(group),
            BW=power_of_two(columns),
            CHUNK=min(_CHUNK, size),
            num_warps=2,
        )
