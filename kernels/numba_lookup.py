"""x @ W.T for a few rows of x, without ever forming a weight: tables of partial dot products.

For one input group and one codebook, the dot products of x's group with all 2^N entries are a table of 2^N numbers;
every row of the weight then adds one of them. With 2x8g8 that is two lookups instead of eight multiplications, from a
table that stays in the L1 cache. Several rows of x (tokens) are the lanes of a vector: table [entry][lane], one lookup
serves them all. The idea is that of AQLM (arXiv 2401.06118, section 4.4) and of its Numba kernel; here every item
of work has sums of its own so that nothing races, codes are repacked so that one load brings four rows' codes, and
a sum stays in a register for 4 (tokens) or 16 (one token) lookups. Very few tokens are left to numba_permute where the
processor can do that.

The trade-off: tables cost 2^N * G multiplications per column, so this pays for N up to 8 and weights with many rows.
For more tokens than lanes, passes over the codes repeat.
"""

import functools
from typing import NamedTuple

import torch
from numba import njit
from torch import Tensor

from aqlm_tensor.kernels.numba_bytes import can_permute
from aqlm_tensor.kernels.numba_codes import BLOCK_COLUMNS, BLOCK_ROWS, packed_codes
from aqlm_tensor.kernels.numba_parallel import (
    ITEMS,
    NEXT_ITEM,
    NEXT_SLOT,
    OPTIONS,
    Kernel,
    as_float32,
    compile_kernel,
    make_frame,
    run,
    source_digest,
    threads_for,
)
from aqlm_tensor.kernels.numba_permute import SCRATCH_FLOATS, permute_kernel
from aqlm_tensor.kernels.numba_sums import (
    ALONE,
    CHUNK,
    CODEBOOKS,
    COLUMNS,
    FINISH_ROWS,
    FLOAT,
    GROUP,
    ROWS,
    SCRATCH,
    SIZE,
    X,
    finish_kernel,
    finish_rows,
    item_place,
)
from aqlm_tensor.kernels.numba_tables import ENTRIES, add_columns, build_table
from aqlm_tensor.kernels.numba_vectors import address_of, fetch_add, lanes_of, store, zeros

__all__ = ["LANES", "PERMUTE_TOKENS", "lookup_linear"]

LANES = (1, 4, 8, 16)  # tokens that one sweep over the codes can serve; each is a compiled variant
PERMUTE_TOKENS = 3  # at most, in passes of one token each
_CHUNKS = 16  # at most; what there is to share among threads, and buffers of sums
_CHUNK_COLUMNS = 64  # at least
_ITEM_ROWS = 16384  # at most; every item builds its tables again
_LEAST_ENTRIES = 16  # of a table for one lane: they are built so many at a time
_TILE = 4  # columns per step for several tokens: tables of 16 KB for 4 lanes, in L1 with room for the sums


def lookup_linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    *,
    permute: bool | None = None,
) -> Tensor:
    """x [M, I] times the transposed weight plus bias: [M, O] in float32.

    Args:
        x: at least one row, any float dtype.
        codes: [O/H, I/G, K] int8, not empty.
        codebooks: [P, K, 2^N, H, G], N <= 8.
        scales: [O/H, 1, 1, 1].
        bias: [O] in float32 and contiguous, or None.
        permute: whether to look up by byte permutations, which not every processor can; None: where it pays.
    """
    packed = packed_codes(codes, (codebooks.shape[2] - 1).bit_length(), codebooks.shape[0])
    scales = as_float32(scales)
    y = torch.empty(x.shape[0], codes.shape[0] * codebooks.shape[3], dtype=torch.float32)
    if x.shape[0] <= LANES[-1]:  # no slices: they take as long as the codes of a small layer
        _sweep(x, codes, packed, codebooks, scales, bias, y, permute)
        return y
    for start in range(0, x.shape[0], LANES[-1]):
        stop = start + LANES[-1]
        _sweep(x[start:stop], codes, packed, codebooks, scales, bias, y[start:stop], permute)
    return y


def _sweep(
    x: Tensor,
    codes: Tensor,
    packed: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    permute: bool | None,
) -> None:
    """Fill y [M, O] for x [M, I] of at most LANES[-1] rows."""
    plan = _plan(x.shape[0], codes.shape, codebooks.shape, permute, torch.get_num_threads())
    x = as_float32(x) if plan.lanes == 1 else _transposed(x, plan.lanes)
    books = _table_books(codebooks, plan.lanes == 1)
    space = torch.empty(plan.floats, dtype=torch.float32)
    addresses = (
        x.data_ptr(), books.data_ptr(), packed.data_ptr(), space.data_ptr() + plan.scratch * FLOAT, scales.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), space.data_ptr(),
    )  # fmt: skip
    run(plan.kernel, make_frame(plan.items, *addresses, *plan.sizes), plan.threads)
    if plan.threads > 1:
        items = -(-codes.shape[0] // FINISH_ROWS)
        run(finish_kernel(), make_frame(items, *addresses, *plan.sizes), min(plan.threads, items))


class _Plan(NamedTuple):
    """What a sweep does, apart from addresses."""

    kernel: Kernel
    lanes: int
    items: int
    threads: int
    scratch: int  # floats for the threads' tables
    floats: int  # in all, with the sums
    sizes: tuple[int, ...]  # what stands in the frame after the addresses


@functools.lru_cache(maxsize=1024)
def _plan(
    tokens: int, codes: tuple[int, ...], codebooks: tuple[int, ...], permute: bool | None, available: int
) -> _Plan:
    """The plan for so many rows of x, codes and codebooks of such shapes, and so many threads at most."""
    partitions, num_codebooks, size, out_group, group = codebooks
    if permute is None:
        permute = can_permute() and tokens <= PERMUTE_TOKENS
    lanes = 1 if permute else next(lanes for lanes in LANES if lanes >= tokens)
    passes = tokens if permute else 1
    if lanes == 1:
        size = max(size, _LEAST_ENTRIES)
    rows, columns = codes[0], codes[1] * num_codebooks
    chunk = max(_CHUNK_COLUMNS, -(-columns // _CHUNKS // BLOCK_COLUMNS) * BLOCK_COLUMNS)
    chunks, blocks = -(-columns // chunk), -(-rows // partitions // _ITEM_ROWS)
    item_rows = -(-rows // partitions // blocks // BLOCK_ROWS) * BLOCK_ROWS
    items = chunks * out_group * partitions * blocks
    threads = threads_for(items, rows * columns * out_group // 4, available)
    scratch = threads * (SCRATCH_FLOATS if permute else BLOCK_COLUMNS * ENTRIES * lanes)
    sizes = (
        rows, columns, chunk, num_codebooks, size, group, out_group, tokens, partitions, blocks, item_rows,
        lanes, passes, threads == 1,
    )  # fmt: skip
    kernel = permute_kernel() if permute else _sum_kernel(lanes)
    return _Plan(kernel, lanes, items, threads, scratch, scratch + chunks * out_group * rows * passes * lanes, sizes)


def _transposed(x: Tensor, lanes: int) -> Tensor:
    """x [M, I] as [I, lanes] in float32, zeros in the lanes beyond M."""
    padded = torch.zeros(x.shape[1], lanes)
    padded[:, : x.shape[0]] = x.T
    return padded


def _table_books(codebooks: Tensor, single: bool) -> Tensor:
    """Codebooks in float32 as [P, H, K, C, G], or for a single lane as [P, H, K, G, C] with C filled up to 16."""
    if not single:
        return as_float32(codebooks.permute(0, 3, 1, 2, 4))
    books = codebooks.permute(0, 3, 1, 4, 2)
    if books.shape[-1] < _LEAST_ENTRIES:
        books = books.repeat(1, 1, 1, 1, _LEAST_ENTRIES // books.shape[-1])
    return as_float32(books)


@functools.cache
def _sum_kernel(lanes: int) -> Kernel:
    """The compiled first pass for so many lanes."""
    digest = source_digest()

    def kernel(f) -> None:  # noqa: ANN001
        _sum_items(f, zeros(lanes), digest)

    return compile_kernel(kernel)


# Compiled code. `zero` is the zero vector of the tokens' lanes, and carries their number in its type.


@njit(**OPTIONS)
def _sum_items(f, zero, digest) -> None:  # noqa: ANN001, ARG001
    address, entry_bytes = address_of(f), FLOAT * lanes_of(zero)
    tables = f[SCRATCH] + fetch_add(address + 8 * NEXT_SLOT) * BLOCK_COLUMNS * ENTRIES * entry_bytes
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        first, books, codes, part_rows, start, rows, sums = item_place(f, item)
        for row in range(rows):
            store(sums + row * entry_bytes, zero)
        for column in range(first, min(first + f[CHUNK], f[COLUMNS]), BLOCK_COLUMNS):
            width = min(BLOCK_COLUMNS, f[COLUMNS] - column)
            _add_column_block(
                f, zero, books, column, width, codes + column * part_rows + start * width, sums, rows, tables
            )
        item = fetch_add(address + 8 * NEXT_ITEM)
    if f[ALONE]:
        finish_rows(f, 0, f[ROWS])


@njit(**OPTIONS)
def _add_column_block(f, zero, books, column, width, codes, sums, rows, tables) -> None:  # noqa: ANN001
    """Add the lookups in a block of columns to the sums of an item's rows."""
    entry_bytes = FLOAT * lanes_of(zero)
    step = BLOCK_COLUMNS if lanes_of(zero) == 1 else _TILE
    for first in range(0, width, step):
        count = min(step, width - first)
        for j in range(count):
            index, codebook = divmod(column + first + j, f[CODEBOOKS])
            book, x = books + codebook * FLOAT * f[GROUP] * f[SIZE], f[X] + index * f[GROUP] * entry_bytes
            build_table(tables + j * ENTRIES * entry_bytes, book, x, zero, f[SIZE], f[GROUP])
        add_columns(tables, codes, width, first, count, sums, rows, zero)
