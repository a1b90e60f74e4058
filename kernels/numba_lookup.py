"""x @ W.T for a few rows of x, without ever forming a weight: tables of partial dot products.

For one input group and one codebook, the dot products of x's group with all 2^N entries are a table of 2^N numbers;
every row of the weight then adds one of them. With 2x8g8 that is two lookups instead of eight multiplications, from a
table that stays in the L1 cache. Several rows of x (tokens) are the lanes of a vector: table [entry][lane], one lookup
serves them all. The idea is that of AQLM (arXiv 2401.06118, section 4.4) and of its Numba kernel; here every thread
sums into memory of its own so that nothing races, codes are repacked so that a row's eight codes come with one load,
and a sum stays in a register for eight lookups.

The trade-off: tables cost 2^N * G multiplications per column, so this pays for N up to 8 and weights with many rows.
For more tokens than lanes, passes over the codes repeat.

An item of work is (chunk of columns, slice of the out group, partition, block of rows). Its sums go to a buffer of its
own; whoever finishes the last chunk of a block adds the chunks up, always in the same order.
"""

import functools

import numpy as np
import torch
from numba import njit
from numba.core.ccallback import CFunc
from torch import Tensor
from torch.nn import functional as F

from aqlm_tensor.kernels.numba_codes import TILE, packed_codes
from aqlm_tensor.kernels.numba_parallel import (
    ITEMS,
    NEXT_ITEM,
    NEXT_SLOT,
    OPTIONS,
    compile_kernel,
    run,
    source_digest,
    threads_for,
)
from aqlm_tensor.kernels.numba_vectors import (
    add,
    address_of,
    fetch_add,
    float_at,
    fma,
    lanes_of,
    load,
    load_bits,
    splat,
    store,
    store_float,
    zeros,
)

__all__ = ["LANES", "lookup_linear"]

LANES = (1, 4, 8)  # tokens a pass can serve; each is a compiled variant
_CHUNK = 64  # columns summed in one buffer
_BLOCK = 8192  # rows at most per item: 256 KB of sums for 8 lanes
_ENTRIES = 256  # of a table, whatever the number of bits, so that offsets are constants
_FLOAT = 4  # bytes

# The frame: addresses and sizes, after the head that numba_parallel defines.
_X, _BOOKS, _CODES, _SUMS, _SCALES, _BIAS, _Y, _SCRATCH = range(3, 11)
_ROWS, _COLUMNS, _CODEBOOKS, _SIZE, _GROUP, _OUT_GROUP, _TOKENS, _PARTITIONS, _BLOCKS = range(11, 20)
_DONE = 20  # one counter per block of rows and slice of the out group


def lookup_linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, I] times the transposed weight plus bias: [M, O] in float32; codebooks [P, K, 2^N, H, G], N <= 8."""
    out_group = codebooks.shape[3]
    books = _table_books(codebooks)
    packed = packed_codes(codes, (codebooks.shape[2] - 1).bit_length())
    scales, bias = scales.float().reshape(-1).contiguous(), None if bias is None else bias.float().contiguous()
    y = torch.empty(x.shape[0], codes.shape[0] * out_group, dtype=torch.float32)
    for start in range(0, x.shape[0], LANES[-1]):
        tokens = slice(start, min(start + LANES[-1], x.shape[0]))
        _pass(x[tokens], codes, packed, books, scales, bias, y[tokens])
    return y


def _table_books(codebooks: Tensor) -> Tensor:
    """Codebooks [P, K, C, H, G] as float32 [P, H, K, G, C], C at least 16: what builds a table 16 entries at a time."""
    books = codebooks.float().permute(0, 3, 1, 4, 2)
    missing = 16 - books.shape[-1]
    return F.pad(books, (0, missing)) if missing > 0 else books.contiguous()


def _pass(
    x: Tensor, codes: Tensor, packed: Tensor, books: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Fill y [M, O] for at most LANES[-1] rows of x [M, I]."""
    partitions, out_group, num_codebooks, group, size = books.shape
    lanes = next(lanes for lanes in LANES if lanes >= x.shape[0])
    transposed = torch.zeros(x.shape[1], lanes, dtype=torch.float32)
    transposed[:, : x.shape[0]] = x.T
    rows, columns = codes.shape[0], codes.shape[1] * num_codebooks
    blocks = -(-rows // partitions // _BLOCK)
    chunks = -(-columns // _CHUNK)
    counters = out_group * partitions * blocks
    threads = threads_for(chunks * counters, rows * columns * out_group * lanes // 8)
    sums = torch.empty(chunks * out_group * rows * lanes, dtype=torch.float32)
    scratch = torch.empty(threads * TILE * _ENTRIES * lanes, dtype=torch.float32)
    frame = np.zeros(_DONE + counters, np.int64)
    frame[ITEMS] = chunks * counters
    tensors = (transposed, books, packed, sums, scales, bias, y, scratch)
    frame[_X:_ROWS] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    frame[_ROWS:_DONE] = (
        rows, columns, num_codebooks, size, group, out_group, x.shape[0], partitions, blocks,
    )  # fmt: skip
    run(_kernel(lanes), frame, threads)


@functools.cache
def _kernel(lanes: int) -> CFunc:
    """The compiled kernel for so many lanes."""
    digest = source_digest()

    def kernel(f) -> None:  # noqa: ANN001
        _take_items(f, zeros(lanes), digest)

    return compile_kernel(kernel)


# Compiled code. `zero` is the zero vector of the tokens' lanes, and carries their number in its type.


@njit(**OPTIONS)
def _take_items(f, zero, digest) -> None:  # noqa: ANN001, ARG001
    address, entry_bytes = address_of(f), _FLOAT * lanes_of(zero)
    tables = f[_SCRATCH] + fetch_add(address + 8 * NEXT_SLOT) * TILE * _ENTRIES * entry_bytes
    out_group, rows_all, blocks = f[_OUT_GROUP], f[_ROWS], f[_BLOCKS]
    ends = out_group * f[_PARTITIONS] * blocks
    chunks, part_rows = f[ITEMS] // ends, rows_all // f[_PARTITIONS]
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        chunk, end = divmod(item, ends)
        part, place = divmod(end, f[_PARTITIONS] * blocks)
        partition, block = divmod(place, blocks)
        start = partition * part_rows + part_rows * block // blocks
        rows = partition * part_rows + part_rows * (block + 1) // blocks - start
        sums = f[_SUMS] + ((chunk * out_group + part) * rows_all + start) * entry_bytes
        books = f[_BOOKS] + (partition * out_group + part) * _FLOAT * f[_CODEBOOKS] * f[_GROUP] * f[_SIZE]
        _sum_chunk(f, zero, books, chunk * _CHUNK, start, rows, sums, tables)
        if fetch_add(address + 8 * (_DONE + end)) == chunks - 1:
            _finish(f, zero, chunks, part, start, rows)
        item = fetch_add(address + 8 * NEXT_ITEM)


@njit(**OPTIONS)
def _sum_chunk(f, zero, books, first, start, rows, sums, tables) -> None:  # noqa: ANN001
    """Sum the lookups of a chunk of columns for the rows from `start` on."""
    entry_bytes, columns = _FLOAT * lanes_of(zero), f[_COLUMNS]
    table_bytes, book_bytes = _ENTRIES * entry_bytes, _FLOAT * f[_GROUP] * f[_SIZE]
    for row in range(rows):
        store(sums + row * entry_bytes, zero)
    for tile in range(first, min(first + _CHUNK, columns), TILE):
        width = min(TILE, columns - tile)
        for j in range(width):
            group, codebook = divmod(tile + j, f[_CODEBOOKS])
            x = f[_X] + group * f[_GROUP] * entry_bytes
            _build_table(tables + j * table_bytes, books + codebook * book_bytes, x, zero, f[_SIZE], f[_GROUP])
        codes = f[_CODES] + tile * f[_ROWS] + start * width
        if width == TILE:
            _add_tile(tables, codes, sums, rows, zero)
        else:
            for j in range(width):
                _add_column(tables + j * table_bytes, codes + j, width, sums, rows, zero)


@njit(**OPTIONS)
def _build_table(table, book, x, zero, size, group) -> None:  # noqa: ANN001
    """Table [entry][lane] from a book [G][size] and x [G][lane]."""
    lanes = lanes_of(zero)
    if lanes == 1:  # entries are neighbours: 16 at a time
        for entry in range(0, size, 16):
            total = zeros(16)
            for i in range(group):
                total = fma(
                    splat(float_at(x + _FLOAT * i), total), load(book + _FLOAT * (i * size + entry), total), total
                )
            store(table + _FLOAT * entry, total)
    else:
        for entry in range(size):
            sums = zero
            for i in range(group):
                weight = splat(float_at(book + _FLOAT * (i * size + entry)), zero)
                sums = fma(weight, load(x + _FLOAT * lanes * i, zero), sums)
            store(table + _FLOAT * lanes * entry, sums)


@njit(**OPTIONS)
def _look_up(tables, column, code, zero):  # noqa: ANN001, ANN202
    return load(tables + _FLOAT * lanes_of(zero) * (column * _ENTRIES + (code & 255)), zero)


@njit(**OPTIONS)
def _add_tile(tables, codes, sums, rows, zero) -> None:  # noqa: ANN001
    """Add one lookup from each of 8 tables to every row's sum."""
    for _ in range(rows):
        word = load_bits(codes, 64)
        total = add(load(sums, zero), _look_up(tables, 0, word, zero))
        total = add(total, _look_up(tables, 1, word >> 8, zero))
        total = add(total, _look_up(tables, 2, word >> 16, zero))
        total = add(total, _look_up(tables, 3, word >> 24, zero))
        total = add(total, _look_up(tables, 4, word >> 32, zero))
        total = add(total, _look_up(tables, 5, word >> 40, zero))
        total = add(total, _look_up(tables, 6, word >> 48, zero))
        total = add(total, _look_up(tables, 7, word >> 56, zero))
        store(sums, total)
        codes += TILE
        sums += _FLOAT * lanes_of(zero)


@njit(**OPTIONS)
def _add_column(table, codes, width, sums, rows, zero) -> None:  # noqa: ANN001
    """Add one lookup to every row's sum; a row's codes are `width` bytes apart."""
    for _ in range(rows):
        store(sums, add(load(sums, zero), _look_up(table, 0, load_bits(codes, 8), zero)))
        codes += width
        sums += _FLOAT * lanes_of(zero)


@njit(**OPTIONS)
def _finish(f, zero, chunks, part, start, rows) -> None:  # noqa: ANN001
    """Add the chunks' sums of some rows in order, scale, add the bias, write y [M, O]."""
    entry_bytes, outputs = _FLOAT * lanes_of(zero), f[_ROWS] * f[_OUT_GROUP]
    for row in range(start, start + rows):
        sums = f[_SUMS] + (part * f[_ROWS] + row) * entry_bytes
        total = zero
        for chunk in range(chunks):
            total = add(total, load(sums + chunk * outputs * entry_bytes, zero))
        store(sums, total)
        output = row * f[_OUT_GROUP] + part
        bias = float_at(f[_BIAS] + _FLOAT * output) if f[_BIAS] else np.float32(0)
        for token in range(f[_TOKENS]):
            value = float_at(sums + _FLOAT * token) * float_at(f[_SCALES] + _FLOAT * row) + bias
            store_float(f[_Y] + _FLOAT * (token * outputs + output), value)
