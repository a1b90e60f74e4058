"""What the lookup kernels share: their frame, their items of work, and the second pass that finishes their sums.

First pass: an item of work is (chunk of columns, slice of the out group, partition, block of rows) and has a buffer of
sums of its own, so that nothing races. Second pass, over blocks of rows: the chunks' sums are added in order, scaled,
and written to y. A thread that is alone does both in one call.

Sums lie as [chunk][slice of the out group][pass][row][lane]: tokens are the lanes of a vector (numba_lookup) or served
in one pass after the other (numba_permute).
"""

import functools

import numpy as np
from numba import njit

from aqlm_tensor.kernels.numba_parallel import (
    ITEMS,
    NEXT_ITEM,
    OPTIONS,
    Kernel,
    compile_kernel,
    source_digest,
)
from aqlm_tensor.kernels.numba_vectors import add, address_of, fetch_add, float_at, load, store, store_float, zeros

__all__ = [
    "ALONE",
    "CHUNK",
    "CODEBOOKS",
    "CODES",
    "COLUMNS",
    "FINISH_ROWS",
    "FLOAT",
    "GROUP",
    "PASSES",
    "ROWS",
    "SCRATCH",
    "SIZE",
    "X",
    "finish_kernel",
    "finish_rows",
    "item_place",
]

FLOAT = 4  # bytes
FINISH_ROWS = 512  # of an item of the second pass

# The frame: addresses and sizes, after the head that numba_parallel defines.
X, _BOOKS, CODES, _SUMS, _SCALES, _BIAS, _Y, SCRATCH = range(3, 11)
ROWS, COLUMNS, CHUNK, CODEBOOKS, SIZE, GROUP, _OUT_GROUP, _TOKENS, _PARTITIONS, _BLOCKS = range(11, 21)
_BLOCK_ROWS, _LANES, PASSES, ALONE = range(21, 25)


@functools.cache
def finish_kernel() -> Kernel:
    """The compiled second pass."""
    digest = source_digest()

    def kernel(f) -> None:  # noqa: ANN001
        _finish_items(f, digest)

    return compile_kernel(kernel)


# Compiled code.


@njit(**OPTIONS)
def item_place(f, item):  # noqa: ANN001, ANN201
    """Where an item works: (first column, books, codes of its partition, rows there, first row, rows, sums).

    `first row` counts from the partition's start; `sums` are those of the first pass over tokens.
    """
    part_rows = f[ROWS] // f[_PARTITIONS]
    chunk, place = divmod(item, f[_OUT_GROUP] * f[_PARTITIONS] * f[_BLOCKS])
    part, place = divmod(place, f[_PARTITIONS] * f[_BLOCKS])
    partition, block = divmod(place, f[_BLOCKS])
    start = block * f[_BLOCK_ROWS]
    rows = min(f[_BLOCK_ROWS], part_rows - start)
    books = f[_BOOKS] + (partition * f[_OUT_GROUP] + part) * FLOAT * f[CODEBOOKS] * f[GROUP] * f[SIZE]
    codes = f[CODES] + partition * part_rows * f[COLUMNS]
    sums = f[_SUMS] + _sums_offset(f, chunk, part, 0, partition * part_rows + start)
    return chunk * f[CHUNK], books, codes, part_rows, start, rows, sums


@njit(**OPTIONS)
def _sums_offset(f, chunk, part, turn, row):  # noqa: ANN001, ANN202
    return (((chunk * f[_OUT_GROUP] + part) * f[PASSES] + turn) * f[ROWS] + row) * f[_LANES] * FLOAT


@njit(**OPTIONS)
def _finish_items(f, digest) -> None:  # noqa: ANN001, ARG001
    address = address_of(f)
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        start = item * FINISH_ROWS
        finish_rows(f, start, min(FINISH_ROWS, f[ROWS] - start))
        item = fetch_add(address + 8 * NEXT_ITEM)


@njit(**OPTIONS)
def finish_rows(f, start, rows) -> None:  # noqa: ANN001
    """Add the chunks' sums of some rows and write their results."""
    lanes, chunks = f[_LANES], (f[COLUMNS] + f[CHUNK] - 1) // f[CHUNK]
    for part in range(f[_OUT_GROUP]):
        for turn in range(f[PASSES]):
            sums = f[_SUMS] + _sums_offset(f, 0, part, turn, start)
            _add_chunks(sums, _sums_offset(f, 1, 0, 0, 0), chunks, rows * lanes)
            for lane in range(min(lanes, f[_TOKENS])):
                _write(f, sums + FLOAT * lane, turn + lane, part, start, rows)


@njit(**OPTIONS)
def _add_chunks(sums, chunk_bytes, chunks, count) -> None:  # noqa: ANN001
    """Add `count` sums of the other chunks to those of the first, in order."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        total = load(sums + i * FLOAT, zeros(16))
        for chunk in range(1, chunks):
            total = add(total, load(sums + chunk * chunk_bytes + i * FLOAT, total))
        store(sums + i * FLOAT, total)
    for i in range(whole, count):
        total = float_at(sums + i * FLOAT)
        for chunk in range(1, chunks):
            total += float_at(sums + chunk * chunk_bytes + i * FLOAT)
        store_float(sums + i * FLOAT, total)


@njit(**OPTIONS)
def _write(f, sums, token, part, start, rows) -> None:  # noqa: ANN001
    """A token's row of y [M, O] = its sums times the rows' scales, plus bias."""
    out_group = f[_OUT_GROUP]
    y = f[_Y] + FLOAT * token * f[ROWS] * out_group
    for row in range(rows):
        output = (start + row) * out_group + part
        value = float_at(sums + FLOAT * row * f[_LANES]) * float_at(f[_SCALES] + FLOAT * (start + row))
        bias = float_at(f[_BIAS] + FLOAT * output) if f[_BIAS] else np.float32(0)
        store_float(y + FLOAT * output, value + bias)
