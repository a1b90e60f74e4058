"""x @ W.T for very few rows of x on processors with AVX-512 VBMI: 64 lookups at once, in tables held in registers.

Scalar lookups are bound by one load each. Here the table of a column (256 partial dot products, see numba_tables) is
turned into fixed point and cut into four planes of 256 bytes. A plane fills four registers, two byte permutations and
a choice by the code's top bit look up 64 rows' codes in it, and the bytes are added up in 16-bit lanes over a block of
16 columns. Only then are the planes put together and added to the rows' sums in float32.

Fixed point must not cost accuracy, whatever the values. The columns of a block share a step, a power of two such that
the largest entry of their tables takes 32 bits. Rounding to it moves a row's sum over w columns by at most w / 2 steps.
The block is computed so only where that is at most a millionth of the sum over its columns of min_e sum_i |x_i C_e,i|
(e runs over entries, i over inputs): a bound below on what any row's terms add up to in magnitude, which is what
rounding errors of a float32 sum are measured by. Sums in fixed point have no errors of their own. Other blocks, whose
tables are spread over more than ten binary orders, and those with infinities or NaN, go through scalar lookups. The
choice is made for all rows at once and depends on x and the codebooks alone. A codebook with an entry of zeros adds
nothing to the bound; if all codebooks have one, every lookup is scalar.

The trade-off: tables cost twice as much as for scalar lookups, for each token anew, so this pays for few tokens.
"""

import functools
import math

import numpy as np
from numba import njit

from aqlm_tensor.kernels.numba_bytes import (
    VECTOR_BYTES,
    absolute_each,
    add_permuted,
    add_words,
    greater_magnitude,
    greatest_lane,
    least_lane,
    lesser,
    split_bytes,
    zero_words,
)
from aqlm_tensor.kernels.numba_codes import BLOCK_COLUMNS, BLOCK_ROWS
from aqlm_tensor.kernels.numba_parallel import (
    ITEMS,
    NEXT_ITEM,
    NEXT_SLOT,
    OPTIONS,
    Kernel,
    compile_kernel,
    source_digest,
)
from aqlm_tensor.kernels.numba_sums import (
    ALONE,
    CHUNK,
    CODEBOOKS,
    COLUMNS,
    FLOAT,
    GROUP,
    PASSES,
    ROWS,
    SCRATCH,
    SIZE,
    X,
    finish_rows,
    item_place,
)
from aqlm_tensor.kernels.numba_tables import ENTRIES, add_block, add_columns
from aqlm_tensor.kernels.numba_vectors import (
    address_of,
    fetch_add,
    inner_fma,
    load_each,
    prefetch,
    splat,
    splat_each,
    store,
    zero_tuple,
    zeros,
)

__all__ = ["SCRATCH_FLOATS", "permute_kernel"]

SCRATCH_FLOATS = 2 * BLOCK_COLUMNS * ENTRIES  # of a thread: a block's tables in float32 and in planes
_TABLE = ENTRIES * FLOAT  # bytes, in float32 and in planes
_BLOCK_VECTORS = BLOCK_ROWS // VECTOR_BYTES
_AHEAD = BLOCK_COLUMNS * BLOCK_ROWS  # bytes from the codes in use to those asked of memory
_SMALLEST = -90  # binary exponent of a block's largest entry below which a step's reciprocal might overflow
_ALLOWED = 1e-6  # rounding to fixed point against the least sum of magnitudes


@functools.cache
def permute_kernel() -> Kernel:
    """The compiled first pass; needs `numba_bytes.can_permute`."""
    digest = source_digest()

    def kernel(f) -> None:  # noqa: ANN001
        _sum_items(f, digest)

    return compile_kernel(kernel)


# Compiled code.


@njit(**OPTIONS)
def _sum_items(f, digest) -> None:  # noqa: ANN001, ARG001
    address = address_of(f)
    tables = f[SCRATCH] + fetch_add(address + 8 * NEXT_SLOT) * SCRATCH_FLOATS * FLOAT
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        first, books, codes, part_rows, start, rows, sums = item_place(f, item)
        for i in range(f[PASSES]):
            for row in range(rows):
                store(sums + (i * f[ROWS] + row) * FLOAT, zeros(1))
        for column in range(first, min(first + f[CHUNK], f[COLUMNS]), BLOCK_COLUMNS):
            width = min(BLOCK_COLUMNS, f[COLUMNS] - column)
            place = codes + column * part_rows + start * width
            for i in range(f[PASSES]):
                x = f[X] + i * f[COLUMNS] // f[CODEBOOKS] * f[GROUP] * FLOAT
                _add_column_block(f, books, x, column, width, place, sums + i * f[ROWS] * FLOAT, rows, tables)
        item = fetch_add(address + 8 * NEXT_ITEM)
    if f[ALONE]:
        finish_rows(f, 0, f[ROWS])


@njit(**OPTIONS)
def _add_column_block(f, books, x, column, width, codes, sums, rows, tables) -> None:  # noqa: ANN001
    """Add a token's lookups in a block of columns to the sums of an item's rows."""
    largest, magnitude = _build_tables(f, books, x, column, width, tables)
    if largest == 0:
        return
    exponent = math.frexp(largest)[1] if largest < np.inf else 0  # largest is below 2^exponent, or NaN
    step = math.ldexp(1.0, exponent - 31)
    if not (largest < np.inf and exponent > _SMALLEST and width * step / 2 <= _ALLOWED * magnitude):
        add_columns(tables, codes, width, 0, width, sums, rows, zeros(1))
        return
    planes = tables + width * _TABLE
    for j in range(width):
        for entry in range(0, f[SIZE], VECTOR_BYTES):
            table = j * _TABLE + entry
            split_bytes(tables + j * _TABLE + FLOAT * entry, np.float32(1 / step), planes + table)
    for start in range(0, rows, BLOCK_ROWS):
        height = min(BLOCK_ROWS, rows - start)
        place, total = codes + start * width, sums + FLOAT * start
        if height == BLOCK_ROWS:
            _add_rows(planes, place, height, width, step, total, zero_words(_BLOCK_VECTORS))
            continue
        whole = height // VECTOR_BYTES * VECTOR_BYTES
        for row in range(0, whole, VECTOR_BYTES):
            _add_rows(planes, place + row, height, width, step, total + FLOAT * row, zero_words(1))
        add_block(tables, place + whole, height, width, total + FLOAT * whole, height - whole, zeros(1))


@njit(**OPTIONS)
def _add_rows(planes, codes, pitch, width, step, sums, zero) -> None:  # noqa: ANN001
    """Add lookups in a block of columns to the sums of as many rows as `zero` is for; codes are `pitch` bytes apart."""
    for pair in range(2):
        words, table, place = zero, planes + 2 * pair * ENTRIES, codes
        for _ in range(width):
            prefetch(place + _AHEAD + pair * BLOCK_ROWS // 2)
            prefetch(place + _AHEAD + pair * BLOCK_ROWS // 2 + 64)
            words = add_permuted(words, place, table)
            table, place = table + _TABLE, place + pitch
        add_words(sums, words, 128 * pair * width, np.float32(step * 65536**pair))


@njit(**OPTIONS)
def _build_tables(f, books, x, column, width, tables):  # noqa: ANN001, ANN202
    """Write the tables of a block of columns; (largest |entry|, or NaN; sum over columns of least sums of |terms|)."""
    size, group = f[SIZE], f[GROUP]
    largest, magnitude = zeros(16), np.float32(0)
    for j in range(width):
        index, codebook = divmod(column + j, f[CODEBOOKS])
        book, inputs = books + codebook * FLOAT * group * size, x + index * group * FLOAT
        least, table = splat(np.float32(np.inf), largest), tables + j * _TABLE
        if group == 8:
            values = splat_each(inputs, FLOAT, zero_tuple(8, 16))
            for entry in range(0, size, 16):
                weights = load_each(book + FLOAT * entry, FLOAT * size, values)
                total = inner_fma(zeros(16), values, weights)
                terms = inner_fma(zeros(16), absolute_each(values), absolute_each(weights))
                store(table + FLOAT * entry, total)
                largest, least = greater_magnitude(largest, total), lesser(terms, least)
        else:
            for entry in range(0, size, 16):
                total, terms = _entries(book + FLOAT * entry, inputs, size, group)
                store(table + FLOAT * entry, total)
                largest, least = greater_magnitude(largest, total), lesser(terms, least)
        magnitude += least_lane(least)
    return greatest_lane(largest), magnitude


@njit(**OPTIONS)
def _entries(book, inputs, size, group):  # noqa: ANN001, ANN202
    """Dot products of inputs [G] with 16 entries of a book [G][size], and their sums of |terms|."""
    total, terms, whole = zeros(16), zeros(16), group // 8 * 8
    for first in range(0, whole, 8):
        values = splat_each(inputs + FLOAT * first, FLOAT, zero_tuple(8, 16))
        weights = load_each(book + FLOAT * first * size, FLOAT * size, values)
        total = inner_fma(total, values, weights)
        terms = inner_fma(terms, absolute_each(values), absolute_each(weights))
    for i in range(whole, group):
        values = splat_each(inputs + FLOAT * i, FLOAT, zero_tuple(1, 16))
        weights = load_each(book + FLOAT * i * size, FLOAT, values)
        total = inner_fma(total, values, weights)
        terms = inner_fma(terms, absolute_each(values), absolute_each(weights))
    return total, terms
