"""x @ W.T for very few rows of x: entries are multiplied as they are gathered, and no part of the weight is stored.

This is for codes of more than 8 bits, whose tables of partial dot products (numba_lookup) would be larger than the
weight, and for weights with too few rows to repay a table. Four rows of the weight go side by side so that a piece of x
is loaded once for all four; sums are lane-wise in registers for a chunk of inputs, then added up in order.

What bounds it: one gather per code. A codebook of 65536 entries of 8 is 1 MB in half precision, which is read as it is,
and 2 MB in float32: it lives in the second or third level of the cache.
"""

import functools

import numpy as np
import torch
from numba import njit
from torch import Tensor

from aqlm_tensor.kernels.numba_decode import (
    CODEBOOKS,
    FIRST_FREE,
    GROUP,
    OUT_GROUP,
    SIZE,
    Weight,
    entry_index,
    load_entry,
    row_addresses,
)
from aqlm_tensor.kernels.numba_parallel import (
    ITEMS,
    NEXT_ITEM,
    NEXT_SLOT,
    OPTIONS,
    Kernel,
    compile_kernel,
    padded_float32,
    run,
    source_digest,
    threads_for,
)
from aqlm_tensor.kernels.numba_vectors import (
    add,
    address_of,
    fetch_add,
    float_at,
    lanes_of,
    load,
    load_each,
    store_each,
    store_float,
    sum_lanes,
    tile_fma,
    zero_tuple,
)

__all__ = ["TOKENS", "gather_linear"]

TOKENS = (1, 2, 4)  # rows of x that one sweep over the codes can serve; each is a compiled variant
_ROWS = 4  # of the weight, side by side
_ROWS_PER_ITEM = 64
_CHUNK = 1024  # inputs summed lane by lane before lanes are added: bounds the length of a chain of additions
_COMPILED_SCHEMES = ((1, 8), (2, 8))  # (codebooks, group) with loops unrolled; others share a variant
_FLOAT = 4  # bytes

_X, _X_ROW, _Y, _OUT_FEATURES, _TOKENS, _BIAS, _SCRATCH, _GROUPS = range(FIRST_FREE, FIRST_FREE + 8)


def gather_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [M, I] times the transposed weight plus bias [O] (float32): [M, O] in float32."""
    out_features, in_features = weight.shape
    tokens, group = x.shape[0], weight.books.shape[-1]
    y = torch.empty(tokens, out_features, dtype=torch.float32)
    lanes = 8 if group % 8 == 0 else 4 if group % 4 == 0 else 1
    width = next((width for width in TOKENS if width >= tokens), TOKENS[-1])
    x = padded_float32(x, width, 1)
    items = -(-out_features // _ROWS_PER_ITEM)
    threads = threads_for(items, tokens * weight.codes.numel())
    scratch = torch.empty(threads, _ROWS * width * (lanes + 1), dtype=torch.float32)
    fields = (
        x.data_ptr(), x.stride(0), y.data_ptr(), out_features, tokens, 0 if bias is None else bias.data_ptr(),
        scratch.data_ptr(), in_features // group,
    )  # fmt: skip
    scheme = (weight.books.shape[-4], group)
    kernel = _kernel(*weight.types, *(scheme if scheme in _COMPILED_SCHEMES else (0, 0)), lanes, width)
    run(kernel, weight.frame(items, *fields), threads)
    return y


@functools.cache
def _kernel(wide: bool, kind: int, num_codebooks: int, group: int, lanes: int, tokens: int) -> Kernel:
    """The compiled product for a weight of such types and (0: any) scheme, in vectors of so many lanes."""
    digest = source_digest()
    sums = _ROWS * tokens

    def kernel(f) -> None:  # noqa: ANN001
        scheme = (wide, kind, num_codebooks or f[CODEBOOKS], group or f[GROUP])
        _take_items(f, scheme, zero_tuple(tokens, lanes), zero_tuple(sums, lanes), digest)

    return compile_kernel(kernel)


# Compiled code. `scheme` is (wide, kind, num_codebooks, group), constants where compiled for one scheme. The zero
# tuples carry the tile's shape in their types: vectors of x, and their sums with four rows.


@njit(**OPTIONS)
def _take_items(f, scheme, zero_x, zero_sums, digest) -> None:  # noqa: ANN001, ARG001
    address, sum_bytes = address_of(f), _FLOAT * lanes_of(zero_sums[0])
    scratch = f[_SCRATCH] + fetch_add(address + 8 * NEXT_SLOT) * len(zero_sums) * (sum_bytes + _FLOAT)
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        last = min((item + 1) * _ROWS_PER_ITEM, f[_OUT_FEATURES])
        for row in range(item * _ROWS_PER_ITEM, last, _ROWS):
            for token in range(0, f[_TOKENS], len(zero_x)):
                _multiply_rows(f, scheme, row, last, token, scratch, zero_x, zero_sums)
        item = fetch_add(address + 8 * NEXT_ITEM)


@njit(**OPTIONS)
def _multiply_rows(f, scheme, row, last, token, scratch, zero_x, zero_sums) -> None:  # noqa: ANN001
    """y for four rows of the weight (the last one repeated beyond the end) and a few tokens."""
    tokens, chunk = min(len(zero_x), f[_TOKENS] - token), max(1, _CHUNK // scheme[3])
    totals = scratch + _FLOAT * lanes_of(zero_sums[0]) * len(zero_sums)
    for i in range(len(zero_sums)):
        store_float(totals + _FLOAT * i, np.float32(0))
    for first in range(0, f[_GROUPS], chunk):
        groups = min(chunk, f[_GROUPS] - first)
        sums = _multiply_chunk(f, scheme, row, last, token, first, groups, zero_x, zero_sums)
        store_each(scratch, _FLOAT * lanes_of(zero_sums[0]), sums)
        for i in range(len(zero_sums)):
            part = sum_lanes(load(scratch + _FLOAT * lanes_of(zero_sums[0]) * i, zero_sums[0]))
            store_float(totals + _FLOAT * i, float_at(totals + _FLOAT * i) + part)
    for i in range(min(_ROWS, last - row)):
        bias = float_at(f[_BIAS] + _FLOAT * (row + i)) if f[_BIAS] else np.float32(0)
        _, _, scale = row_addresses(f, scheme[1], row + i)
        for j in range(tokens):
            total = float_at(totals + _FLOAT * (i * len(zero_x) + j))
            store_float(f[_Y] + _FLOAT * ((token + j) * f[_OUT_FEATURES] + row + i), total * scale + bias)


@njit(**OPTIONS)
def _multiply_chunk(f, scheme, row, last, token, first, groups, zero_x, sums):  # noqa: ANN001, ANN202
    """Lane-wise sums of products of four rows with a few tokens over a chunk of groups."""
    wide, kind, num_codebooks, group = scheme
    codes_a, books_a, _ = row_addresses(f, kind, row)
    codes_b, books_b, _ = row_addresses(f, kind, min(row + 1, last - 1))
    codes_c, books_c, _ = row_addresses(f, kind, min(row + 2, last - 1))
    codes_d, books_d, _ = row_addresses(f, kind, min(row + 3, last - 1))
    step, x_row, zero = num_codebooks * (2 if wide else 1), _FLOAT * f[_X_ROW], zero_x[0]
    x = f[_X] + token * x_row + _FLOAT * first * group
    place = first * step
    for _ in range(groups):
        for piece in range(0, group, lanes_of(zero)):
            weights = (
                _entries(f, scheme, codes_a + place, books_a, piece, zero),
                _entries(f, scheme, codes_b + place, books_b, piece, zero),
                _entries(f, scheme, codes_c + place, books_c, piece, zero),
                _entries(f, scheme, codes_d + place, books_d, piece, zero),
            )
            sums = tile_fma(sums, weights, load_each(x, x_row, zero_x))
            x += _FLOAT * lanes_of(zero)
        place += step
    return sums


@njit(**OPTIONS)
def _entries(f, scheme, codes, books, piece, zero):  # noqa: ANN001, ANN202
    """A piece of a group of the weight, without its scale: the sum of the entries that its codes choose."""
    wide, kind, num_codebooks, group = scheme
    item_bytes, size = 2 if kind else _FLOAT, f[SIZE]
    entry_bytes = item_bytes * f[OUT_GROUP] * group
    total = load_entry(books + entry_index(codes, wide, 0, size) * entry_bytes + item_bytes * piece, zero, kind)
    for codebook in range(1, num_codebooks):
        entry = books + (codebook * size + entry_index(codes, wide, codebook, size)) * entry_bytes
        total = add(total, load_entry(entry + item_bytes * piece, zero, kind))
    return total
