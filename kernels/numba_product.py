"""x @ W.T and grad @ W for many rows: blocks of the weight are decoded into cache and multiplied from there.

This takes the place of a BLAS call on a decoded block, for three reasons: a block never leaves the cache of the core
that decoded it, no BLAS promises the same bits for every number of threads, and the products run inside one parallel
region. The price is a register-blocked loop of our own, in 16-lane vectors whatever the machine, so that results do not
depend on its vector width either (the tile of sums held in registers does depend on it).

Items of work are blocks of output rows (forward) or of input columns (gradient); within one, inner sums are split
into chunks of fixed length and added in order.
"""

import functools
import math

import numpy as np
import torch
from llvmlite import binding
from numba import njit
from torch import Tensor

from aqlm_tensor.kernels.numba_decode import FIRST_FREE, GROUP, Weight, decode_block
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
    load,
    load_each,
    splat_each,
    store,
    store_each,
    store_float,
    sum_lanes,
    tile_fma,
    zero_tuple,
    zeros,
)

__all__ = ["product", "product_input_grad"]

_FLOAT = 4  # bytes
_LANES = 16
_FORWARD_ROWS = 32  # rows of W decoded at a time, by _FORWARD_COLUMNS columns: 128 KB, half of most L2 caches
_FORWARD_COLUMNS = 1024
_GRAD_ROWS = 64  # the same for the gradient, where columns are the outputs
_GRAD_COLUMNS = 512

_X, _X_ROW, _Y, _Y_ROW, _TOKENS, _BIAS, _SCRATCH, _ROWS, _GROUPS, _ITEM_GROUPS, _WIDTH = range(
    FIRST_FREE, FIRST_FREE + 11
)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [M, I] times the transposed weight plus bias [O] (float32): [M, O] in float32."""
    out_features, in_features = weight.shape
    tokens = x.shape[0]
    tile_rows, tile_tokens = _tile()
    x = padded_float32(x, tile_tokens, _LANES)
    y = torch.empty(tokens, out_features, dtype=torch.float32)
    group = weight.books.shape[-1]
    chunk = _LANES * max(1, _FORWARD_COLUMNS // (_LANES * group))  # groups; a multiple of the lanes in columns
    width = -(-min(chunk * group, in_features) // _LANES) * _LANES
    items = -(-out_features // _FORWARD_ROWS)
    threads = threads_for(items, tokens * out_features * in_features // 16)
    scratch = torch.zeros(threads, _FORWARD_ROWS * width + tile_rows * tile_tokens * _LANES, dtype=torch.float32)
    fields = (
        x.data_ptr(), x.stride(0), y.data_ptr(), out_features, tokens, 0 if bias is None else bias.data_ptr(),
        scratch.data_ptr(), out_features, in_features // group, chunk, width,
    )  # fmt: skip
    run(_forward_kernel(*weight.types), weight.frame(items, *fields), threads)
    return y


def product_input_grad(grad: Tensor, weight: Weight) -> Tensor:
    """Grad [M, O] times the weight: [M, I] in float32."""
    out_features, in_features = weight.shape
    tokens = grad.shape[0]
    tile_columns, tile_tokens = _tile()
    grad = padded_float32(grad, tile_tokens, 1)
    group = weight.books.shape[-1]
    step = math.lcm(group, 4 * _LANES)  # columns: whole groups and whole tiles of at most 4 vectors
    width = step * max(1, _GRAD_COLUMNS // step)
    items = -(-in_features // width)
    out = torch.zeros(grad.shape[0], items * width, dtype=torch.float32)
    threads = threads_for(items, tokens * out_features * in_features // 16)
    scratch = torch.zeros(threads, _GRAD_ROWS * width + tile_columns * tile_tokens * _LANES, dtype=torch.float32)
    fields = (
        grad.data_ptr(), grad.stride(0), out.data_ptr(), out.stride(0), tokens, 0,
        scratch.data_ptr(), out_features, in_features // group, width // group, width,
    )  # fmt: skip
    run(_grad_kernel(*weight.types), weight.frame(items, *fields), threads)
    return out[:tokens, :in_features]


@functools.cache
def _tile() -> tuple[int, int]:
    """(weight vectors, tokens) per tile of sums: 24 of 32 registers with AVX-512, 12 of 16 with AVX2 and elsewhere."""
    return (4, 6) if binding.get_host_cpu_features().get("avx512f") else (2, 3)


@functools.cache
def _forward_kernel(wide: bool, kind: int) -> Kernel:
    """The compiled forward product for a weight of such types."""
    digest = source_digest()
    rows, tokens = _tile()
    sums = rows * tokens

    def kernel(f) -> None:  # noqa: ANN001
        _forward_items(f, wide, kind, zero_tuple(rows, 16), zero_tuple(tokens, 16), zero_tuple(sums, 16), digest)

    return compile_kernel(kernel)


@functools.cache
def _grad_kernel(wide: bool, kind: int) -> Kernel:
    """The compiled gradient product for a weight of such types."""
    digest = source_digest()
    columns, tokens = _tile()
    sums = columns * tokens

    def kernel(f) -> None:  # noqa: ANN001
        _grad_items(f, wide, kind, zero_tuple(columns, 16), zero_tuple(tokens, 16), zero_tuple(sums, 16), digest)

    return compile_kernel(kernel)


# Compiled code. The zero tuples carry the tile's shape in their types: weight vectors, token vectors, their sums.


@njit(**OPTIONS)
def _forward_items(f, wide, kind, zero_weights, zero_tokens, zero_sums, digest) -> None:  # noqa: ANN001, ARG001
    address, width = address_of(f), f[_WIDTH]
    sums_bytes = _FLOAT * _LANES * len(zero_sums)
    slot = fetch_add(address + 8 * NEXT_SLOT)
    scratch = f[_SCRATCH] + slot * (_FLOAT * _FORWARD_ROWS * width + sums_bytes)
    block = scratch + sums_bytes
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        start = item * _FORWARD_ROWS
        rows = min(_FORWARD_ROWS, f[_ROWS] - start)
        for group in range(0, f[_GROUPS], f[_ITEM_GROUPS]):
            groups = min(f[_ITEM_GROUPS], f[_GROUPS] - group)
            columns = groups * f[GROUP]
            padded = (columns + _LANES - 1) // _LANES * _LANES
            for row in range(rows):
                for column in range(columns, padded):
                    store_float(block + _FLOAT * (row * width + column), np.float32(0))
            decode_block(f, wide, kind, start, rows, group, groups, block, _FLOAT * width)
            x = f[_X] + _FLOAT * group * f[GROUP]
            for token in range(0, f[_TOKENS], len(zero_tokens)):
                for row in range(0, rows, len(zero_weights)):
                    sums = _dot_tile(
                        block + _FLOAT * row * width, _FLOAT * width,
                        x + _FLOAT * token * f[_X_ROW], _FLOAT * f[_X_ROW],
                        padded, zero_weights, zero_tokens, zero_sums,
                    )  # fmt: skip
                    store_each(scratch, _FLOAT * _LANES, sums)
                    _add_to_y(f, scratch, start + row, start + rows, token, len(zero_weights), len(zero_tokens), group)
        item = fetch_add(address + 8 * NEXT_ITEM)


@njit(**OPTIONS)
def _dot_tile(weights, weights_row, x, x_row, columns, zero_weights, zero_tokens, sums):  # noqa: ANN001, ANN202
    """Lane-wise sums of products of a few weight rows with a few tokens over some columns (a multiple of 16)."""
    for column in range(0, columns, _LANES):
        step = _FLOAT * column
        sums = tile_fma(
            sums, load_each(weights + step, weights_row, zero_weights), load_each(x + step, x_row, zero_tokens)
        )
    return sums


@njit(**OPTIONS)
def _add_to_y(f, sums, row, last_row, token, tile_rows, tile_tokens, group) -> None:  # noqa: ANN001
    """Add a tile's sums [row][token][16 lanes] to y; the first chunk of columns starts from the bias."""
    for i in range(min(tile_rows, last_row - row)):
        bias = float_at(f[_BIAS] + _FLOAT * (row + i)) if f[_BIAS] else np.float32(0)
        for j in range(min(tile_tokens, f[_TOKENS] - token)):
            y = f[_Y] + _FLOAT * ((token + j) * f[_Y_ROW] + row + i)
            total = sum_lanes(load(sums + _FLOAT * _LANES * (i * tile_tokens + j), zeros(16)))
            store_float(y, total + (bias if group == 0 else float_at(y)))


@njit(**OPTIONS)
def _grad_items(f, wide, kind, zero_weights, zero_tokens, zero_sums, digest) -> None:  # noqa: ANN001, ARG001
    address, width = address_of(f), f[_WIDTH]
    vector_bytes, vectors = _FLOAT * _LANES, len(zero_weights)
    sums_bytes = vector_bytes * len(zero_sums)
    slot = fetch_add(address + 8 * NEXT_SLOT)
    scratch = f[_SCRATCH] + slot * (_FLOAT * _GRAD_ROWS * width + sums_bytes)
    block = scratch + sums_bytes
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        group = item * f[_ITEM_GROUPS]
        groups = min(f[_ITEM_GROUPS], f[_GROUPS] - group)
        for start in range(0, f[_ROWS], _GRAD_ROWS):
            rows = min(_GRAD_ROWS, f[_ROWS] - start)
            decode_block(f, wide, kind, start, rows, group, groups, block, _FLOAT * width)
            for token in range(0, f[_TOKENS], len(zero_tokens)):
                grad = f[_X] + _FLOAT * (token * f[_X_ROW] + start)
                out = f[_Y] + _FLOAT * (token * f[_Y_ROW] + item * width)
                for column in range(0, groups * f[GROUP], _LANES * vectors):
                    sums = zero_sums
                    for row in range(rows):
                        weights = load_each(block + _FLOAT * (row * width + column), vector_bytes, zero_weights)
                        tokens = splat_each(grad + _FLOAT * row, _FLOAT * f[_X_ROW], zero_tokens)
                        sums = tile_fma(sums, tokens, weights)
                    store_each(scratch, vector_bytes, sums)
                    for j in range(len(zero_sums)):
                        place = out + _FLOAT * (j // vectors * f[_Y_ROW] + column) + j % vectors * vector_bytes
                        store(place, add(load(place, zeros(16)), load(scratch + j * vector_bytes, zeros(16))))
        item = fetch_add(address + 8 * NEXT_ITEM)
