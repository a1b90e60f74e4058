"""x @ W.T for a few rows of x, without ever forming a weight: tables of partial dot products.

For one input group and one codebook, the dot products of x's group with all 2^N entries are a table of 2^N numbers;
every row of the weight then adds one of them. With 2x8g8 that is two lookups instead of eight multiplications, from a
table that stays in the L1 cache. Several rows of x (tokens) are the lanes of a vector: table [entry][lane], one lookup
serves them all. The idea is that of AQLM (arXiv 2401.06118, section 4.4) and of its Numba kernel; here every item
of work has sums of its own so that nothing races, codes are repacked so that one load brings four of a row's codes, and
a sum stays in a register for 4 (tokens) or 16 (one token) lookups.

The trade-off: tables cost 2^N * G multiplications per column, so this pays for N up to 8 and weights with many rows.
For more tokens than lanes, passes over the codes repeat.

First pass: an item of work is (chunk of columns, slice of the out group, partition, block of rows) and has a buffer of
sums of its own. Second pass, over blocks of rows: the chunks' sums are added in order, scaled, and written to y. A
thread that is alone does both in one call.
"""

import functools

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from aqlm_tensor.kernels.numba_codes import TILE, packed_codes
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
from aqlm_tensor.kernels.numba_vectors import (
    add,
    address_of,
    eight_of,
    fetch_add,
    float_at,
    fma,
    inner_fma,
    lanes_of,
    load,
    load_bits,
    load_each,
    splat,
    splat_each,
    store,
    store_float,
    zeros,
)

__all__ = ["LANES", "lookup_linear"]

LANES = (1, 4, 8, 16)  # tokens that one sweep over the codes can serve; each is a compiled variant
_CHUNKS = 16  # at most; what there is to share among threads, and buffers of sums
_CHUNK_COLUMNS = 64  # at least
_BLOCK_ROWS = 16384  # at most; every block builds its tables again
_FINISH_ROWS = 512
_ENTRIES = 256  # of a table, whatever the number of bits, so that offsets are constants
_FLOAT = 4  # bytes

# The frame: addresses and sizes, after the head that numba_parallel defines.
_X, _BOOKS, _CODES, _SUMS, _SCALES, _BIAS, _Y, _SCRATCH = range(3, 11)
_ROWS, _COLUMNS, _CHUNK, _CODEBOOKS, _SIZE, _GROUP, _OUT_GROUP, _TOKENS, _PARTITIONS, _BLOCKS = range(11, 21)
_LANES, _ALONE = 21, 22


def lookup_linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, I] times the transposed weight plus bias: [M, O] in float32.

    Args:
        x: at least one row, any float dtype.
        codes: [O/H, I/G, K] int8, not empty.
        codebooks: [P, K, 2^N, H, G], N <= 8.
        scales: [O/H, 1, 1, 1].
        bias: [O] in float32 and contiguous, or None.
    """
    packed = packed_codes(codes, (codebooks.shape[2] - 1).bit_length())
    scales = as_float32(scales)
    y = torch.empty(x.shape[0], codes.shape[0] * codebooks.shape[3], dtype=torch.float32)
    if x.shape[0] <= LANES[-1]:
        _sweep(x, codes, packed, codebooks, scales, bias, y)
        return y
    for some, result in zip(x.split(LANES[-1]), y.split(LANES[-1]), strict=True):
        _sweep(some, codes, packed, codebooks, scales, bias, result)
    return y


def _sweep(
    x: Tensor, codes: Tensor, packed: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Fill y [M, O] for x [M, I] of at most LANES[-1] rows."""
    tokens, in_features = x.shape
    partitions, num_codebooks, _, out_group, group = codebooks.shape
    lanes = next(lanes for lanes in LANES if lanes >= tokens)
    x = as_float32(x) if lanes == 1 else _transposed(x, lanes)
    books = _table_books(codebooks, lanes == 1)
    size = books.numel() // (partitions * num_codebooks * out_group * group)
    rows, columns = codes.shape[0], in_features // group * num_codebooks
    chunk = max(_CHUNK_COLUMNS, -(-columns // _CHUNKS // 16) * 16)
    chunks, blocks = -(-columns // chunk), -(-rows // partitions // _BLOCK_ROWS)
    items = chunks * out_group * partitions * blocks
    threads = threads_for(items, rows * columns * out_group // 4)
    space = torch.empty((chunks * out_group * rows + threads * 16 * _ENTRIES) * lanes, dtype=torch.float32)
    sums = space.data_ptr() + threads * 16 * _ENTRIES * lanes * _FLOAT
    fields = (
        x.data_ptr(), books.data_ptr(), packed.data_ptr(), sums, scales.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), space.data_ptr(),
        rows, columns, chunk, num_codebooks, size, group, out_group, tokens, partitions, blocks, lanes, threads == 1,
    )  # fmt: skip
    run(_sum_kernel(lanes), make_frame(items, *fields), threads)
    if threads > 1:
        items = -(-rows // _FINISH_ROWS)
        run(_finish_kernel(), make_frame(items, *fields), min(threads, items))


def _transposed(x: Tensor, lanes: int) -> Tensor:
    """x [M, I] as [I, lanes] in float32, zeros in the lanes beyond M."""
    padded = torch.zeros(x.shape[1], lanes)
    padded[:, : x.shape[0]] = x.T
    return padded


def _table_books(codebooks: Tensor, single: bool) -> Tensor:
    """Codebooks in float32 as [P, H, K, C, G], or for a single lane as [P, H, K, G, C] with C at least 16."""
    if not single:
        return as_float32(codebooks.permute(0, 3, 1, 2, 4))
    books = codebooks.permute(0, 3, 1, 4, 2)
    missing = 16 - books.shape[-1]  # tables are built 16 entries at a time
    return as_float32(F.pad(books, (0, missing)) if missing > 0 else books)


@functools.cache
def _sum_kernel(lanes: int) -> Kernel:
    """The compiled first pass for so many lanes."""
    digest = source_digest()

    def kernel(f) -> None:  # noqa: ANN001
        _sum_items(f, zeros(lanes), digest)

    return compile_kernel(kernel)


@functools.cache
def _finish_kernel() -> Kernel:
    """The compiled second pass."""
    digest = source_digest()

    def kernel(f) -> None:  # noqa: ANN001
        _finish_items(f, digest)

    return compile_kernel(kernel)


# Compiled code. `zero` is the zero vector of the tokens' lanes, and carries their number in its type.


@njit(**OPTIONS)
def _sum_items(f, zero, digest) -> None:  # noqa: ANN001, ARG001
    address, entry_bytes = address_of(f), _FLOAT * lanes_of(zero)
    tables = f[_SCRATCH] + fetch_add(address + 8 * NEXT_SLOT) * 16 * _ENTRIES * entry_bytes
    out_group, rows_all, blocks = f[_OUT_GROUP], f[_ROWS], f[_BLOCKS]
    places = out_group * f[_PARTITIONS] * blocks
    part_rows = rows_all // f[_PARTITIONS]
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        chunk, place = divmod(item, places)
        part, place = divmod(place, f[_PARTITIONS] * blocks)
        partition, block = divmod(place, blocks)
        start = partition * part_rows + part_rows * block // blocks
        rows = partition * part_rows + part_rows * (block + 1) // blocks - start
        sums = f[_SUMS] + ((chunk * out_group + part) * rows_all + start) * entry_bytes
        books = f[_BOOKS] + (partition * out_group + part) * _FLOAT * f[_CODEBOOKS] * f[_GROUP] * f[_SIZE]
        _sum_chunk(f, zero, books, chunk * f[_CHUNK], start, rows, sums, tables)
        item = fetch_add(address + 8 * NEXT_ITEM)
    if f[_ALONE]:
        _finish_rows(f, 0, f[_ROWS])


@njit(**OPTIONS)
def _sum_chunk(f, zero, books, first, start, rows, sums, tables) -> None:  # noqa: ANN001
    """Sum the lookups of a chunk of columns for the rows from `start` on."""
    entry_bytes, last = _FLOAT * lanes_of(zero), min(first + f[_CHUNK], f[_COLUMNS])
    table_bytes, book_bytes = _ENTRIES * entry_bytes, _FLOAT * f[_GROUP] * f[_SIZE]
    step = 16 if lanes_of(zero) == 1 else TILE  # tables of 16 KB for 1 and 4 lanes: in L1, with room for the sums
    for row in range(rows):
        store(sums + row * entry_bytes, zero)
    for column in range(first, last, step):
        width = min(step, last - column)
        for j in range(width):
            group, codebook = divmod(column + j, f[_CODEBOOKS])
            x = f[_X] + group * f[_GROUP] * entry_bytes
            _build_table(tables + j * table_bytes, books + codebook * book_bytes, x, zero, f[_SIZE], f[_GROUP])
        codes, tile_bytes = f[_CODES] + column * f[_ROWS] + start * TILE, f[_ROWS] * TILE
        if width == 16:
            _add_four_tiles(tables, codes, tile_bytes, sums, rows, zero)
            continue
        whole = width // TILE * TILE
        for j in range(0, whole, TILE):
            _add_tile(tables + j * table_bytes, codes + j * f[_ROWS], sums, rows, zero)
        codes = f[_CODES] + (column + whole) * f[_ROWS] + start * (width - whole)
        for j in range(width - whole):
            _add_column(tables + (whole + j) * table_bytes, codes + j, width - whole, sums, rows, zero)


@njit(**OPTIONS)
def _build_table(table, book, x, zero, size, group) -> None:  # noqa: ANN001
    """Table [entry][lane] of dot products of x [G][lane] with the entries of a book."""
    if lanes_of(zero) == 1:  # book [G][size]; entries are neighbours: 16 at a time
        for entry in range(0, size, 16):
            total = zeros(16)
            for i in range(group):
                value = splat(float_at(x + _FLOAT * i), total)
                total = fma(value, load(book + _FLOAT * (i * size + entry), total), total)
            store(table + _FLOAT * entry, total)
        return
    entry_bytes, whole = _FLOAT * lanes_of(zero), group // 8 * 8  # book [size][G]
    for first in range(0, whole, 8):
        values = load_each(x + first * entry_bytes, entry_bytes, eight_of(zero))
        for entry in range(size):
            total = load(table + entry * entry_bytes, zero) if first else zero
            weights = splat_each(book + _FLOAT * (entry * group + first), _FLOAT, values)
            store(table + entry * entry_bytes, inner_fma(total, weights, values))
    for i in range(whole, group):
        value = load(x + i * entry_bytes, zero)
        for entry in range(size):
            total = load(table + entry * entry_bytes, zero) if i else zero
            weight = splat(float_at(book + _FLOAT * (entry * group + i)), zero)
            store(table + entry * entry_bytes, fma(weight, value, total))


@njit(**OPTIONS)
def _look_up_four(total, tables, codes, zero):  # noqa: ANN001, ANN202
    """Add the entries that the four bytes at `codes` choose from four tables."""
    entry_bytes, word = _FLOAT * lanes_of(zero), load_bits(codes, 32)
    table_bytes = _ENTRIES * entry_bytes
    total = add(total, load(tables + entry_bytes * (word & 255), zero))
    total = add(total, load(tables + table_bytes + entry_bytes * (word >> 8 & 255), zero))
    total = add(total, load(tables + 2 * table_bytes + entry_bytes * (word >> 16 & 255), zero))
    return add(total, load(tables + 3 * table_bytes + entry_bytes * (word >> 24), zero))


@njit(**OPTIONS)
def _add_tile(tables, codes, sums, rows, zero) -> None:  # noqa: ANN001
    """Add one lookup from each of 4 tables to every row's sum."""
    for _ in range(rows):
        store(sums, _look_up_four(load(sums, zero), tables, codes, zero))
        codes += TILE
        sums += _FLOAT * lanes_of(zero)


@njit(**OPTIONS)
def _add_four_tiles(tables, codes, tile_bytes, sums, rows, zero) -> None:  # noqa: ANN001
    """Add one lookup from each of 16 tables to every row's sum."""
    table_bytes = TILE * _ENTRIES * _FLOAT * lanes_of(zero)
    for _ in range(rows):
        first = _look_up_four(load(sums, zero), tables, codes, zero)
        second = _look_up_four(zero, tables + table_bytes, codes + tile_bytes, zero)
        first = _look_up_four(first, tables + 2 * table_bytes, codes + 2 * tile_bytes, zero)
        second = _look_up_four(second, tables + 3 * table_bytes, codes + 3 * tile_bytes, zero)
        store(sums, add(first, second))
        codes += TILE
        sums += _FLOAT * lanes_of(zero)


@njit(**OPTIONS)
def _add_column(table, codes, width, sums, rows, zero) -> None:  # noqa: ANN001
    """Add one lookup to every row's sum; a row's codes are `width` bytes apart."""
    for _ in range(rows):
        entry = table + _FLOAT * lanes_of(zero) * load_bits(codes, 8)
        store(sums, add(load(sums, zero), load(entry, zero)))
        codes += width
        sums += _FLOAT * lanes_of(zero)


@njit(**OPTIONS)
def _finish_items(f, digest) -> None:  # noqa: ANN001, ARG001
    address = address_of(f)
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        start = item * _FINISH_ROWS
        _finish_rows(f, start, min(_FINISH_ROWS, f[_ROWS] - start))
        item = fetch_add(address + 8 * NEXT_ITEM)


@njit(**OPTIONS)
def _finish_rows(f, start, rows) -> None:  # noqa: ANN001
    """Add the chunks' sums of some rows and write their results."""
    lanes, chunks = f[_LANES], (f[_COLUMNS] + f[_CHUNK] - 1) // f[_CHUNK]
    for part in range(f[_OUT_GROUP]):
        sums = f[_SUMS] + (part * f[_ROWS] + start) * lanes * _FLOAT
        _add_chunks(sums, f[_OUT_GROUP] * f[_ROWS] * lanes * _FLOAT, chunks, rows * lanes)
        _write(f, sums, lanes, part, start, rows)


@njit(**OPTIONS)
def _add_chunks(sums, chunk_bytes, chunks, count) -> None:  # noqa: ANN001
    """Add `count` sums of the other chunks to those of the first, in order."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        total = load(sums + i * _FLOAT, zeros(16))
        for chunk in range(1, chunks):
            total = add(total, load(sums + chunk * chunk_bytes + i * _FLOAT, total))
        store(sums + i * _FLOAT, total)
    for i in range(whole, count):
        total = float_at(sums + i * _FLOAT)
        for chunk in range(1, chunks):
            total += float_at(sums + chunk * chunk_bytes + i * _FLOAT)
        store_float(sums + i * _FLOAT, total)


@njit(**OPTIONS)
def _write(f, sums, lanes, part, start, rows) -> None:  # noqa: ANN001
    """y [M, O] = sums [row][lane] times the rows' scales, plus bias."""
    outputs, out_group = f[_ROWS] * f[_OUT_GROUP], f[_OUT_GROUP]
    for token in range(f[_TOKENS]):
        y = f[_Y] + _FLOAT * token * outputs
        for row in range(rows):
            output = (start + row) * out_group + part
            value = float_at(sums + _FLOAT * (row * lanes + token)) * float_at(f[_SCALES] + _FLOAT * (start + row))
            bias = float_at(f[_BIAS] + _FLOAT * output) if f[_BIAS] else np.float32(0)
            store_float(y + _FLOAT * output, value + bias)
