"""grad @ W for codes of at most 8 bits, without ever forming a weight: the lookup kernel turned around.

In x @ W.T every row of the weight adds an entry of a table; here every row adds its gradient to one of 2^N bins of a
column (an input group and a codebook), the one that its code chooses. The column's bins are then multiplied with the
codebook once: 2^N * G multiplications in place of one for each row and input. Rows of the gradient (tokens) are the
lanes of a vector, so one addition serves them all.

Items of work are blocks of columns that hold whole input groups, so each writes outputs of its own; bins are emptied
into them after so many rows, which bounds the length of a chain of additions. The trade-off is that of the lookup
kernel: it wants weights with many rows, and more tokens than lanes repeat the pass over the codes.
"""

import functools
import math

import torch
from numba import njit
from torch import Tensor

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
from aqlm_tensor.kernels.numba_sums import FLOAT
from aqlm_tensor.kernels.numba_tables import ENTRIES
from aqlm_tensor.kernels.numba_vectors import (
    add,
    address_of,
    eight_of,
    fetch_add,
    float_at,
    fma,
    lanes_of,
    load,
    load_bits,
    load_each,
    prefetch,
    splat,
    splat_each,
    store,
    store_each,
    tile_fma,
    zeros,
)

__all__ = ["LANES", "scatter_input_grad"]

LANES = (1, 4, 8, 16)  # rows of the gradient that one pass over the codes can serve; each is a compiled variant
_CHUNK = 8 * BLOCK_ROWS  # rows after which bins are emptied
_AHEAD = 2 * BLOCK_COLUMNS * BLOCK_ROWS  # bytes from the codes in use to those asked of memory, of the same column

_GRADS, _BOOKS, _CODES, _OUT, _SCRATCH = range(3, 8)
_ROWS, _COLUMNS, _CODEBOOKS, _SIZE, _GROUP, _OUT_GROUP, _PARTITIONS, _BLOCKS, _ITEM_COLUMNS = range(8, 17)


def scatter_input_grad(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Grad [M, O] times the weight: [M, I] in float32.

    Args:
        grad: at least one row, any float dtype.
        codes: [O/H, I/G, K] int8, not empty.
        codebooks: [P, K, 2^N, H, G], N <= 8, all finite: entries that no code chooses are multiplied by zero.
        scales: [O/H, 1, 1, 1].
    """
    partitions, num_codebooks, size, out_group, group = codebooks.shape
    rows, groups, _ = codes.shape
    columns = groups * num_codebooks
    packed = packed_codes(codes, (size - 1).bit_length(), partitions)
    books = as_float32(codebooks)
    lanes = next((lanes for lanes in LANES if lanes >= grad.shape[0]), LANES[-1])
    passes = -(-grad.shape[0] // lanes)
    grads = _scaled_lanes(grad, scales, out_group, lanes, passes)
    out = torch.zeros(passes, groups * group, lanes)
    item_columns = math.lcm(BLOCK_COLUMNS, num_codebooks)
    blocks = -(-columns // item_columns)
    threads = threads_for(passes * blocks, passes * rows * columns * out_group)
    scratch = torch.empty(threads, 2 * ENTRIES * lanes, dtype=torch.float32)
    frame = make_frame(
        passes * blocks,
        grads.data_ptr(), books.data_ptr(), packed.data_ptr(), out.data_ptr(), scratch.data_ptr(),
        rows, columns, num_codebooks, size, group, out_group, partitions, blocks, item_columns,
    )  # fmt: skip
    run(_kernel(lanes), frame, threads)
    return out.transpose(1, 2).flatten(0, 1)[: grad.shape[0]]


def _scaled_lanes(grad: Tensor, scales: Tensor, out_group: int, lanes: int, passes: int) -> Tensor:
    """Gradients [M, O] times the scales, as [pass, H, O/H, lane] in float32 with zeros in the lanes beyond M."""
    padded = torch.zeros(passes * lanes, scales.shape[0], out_group)
    torch.mul(grad.unflatten(1, (-1, out_group)), scales.view(-1, 1).float(), out=padded[: grad.shape[0]])
    return padded.view(passes, lanes, -1, out_group).permute(0, 3, 2, 1).contiguous()


@functools.cache
def _kernel(lanes: int) -> Kernel:
    """The compiled kernel for so many lanes."""
    digest = source_digest()

    def kernel(f) -> None:  # noqa: ANN001
        _take_items(f, zeros(lanes), digest)

    return compile_kernel(kernel)


# Compiled code. `zero` is the zero vector of the tokens' lanes, and carries their number in its type.


@njit(**OPTIONS)
def _take_items(f, zero, digest) -> None:  # noqa: ANN001, ARG001
    address, entry_bytes = address_of(f), FLOAT * lanes_of(zero)
    bins = f[_SCRATCH] + fetch_add(address + 8 * NEXT_SLOT) * 2 * ENTRIES * entry_bytes
    item = fetch_add(address + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        turn, block = divmod(item, f[_BLOCKS])
        first = block * f[_ITEM_COLUMNS]
        for column in range(first, min(first + f[_ITEM_COLUMNS], f[_COLUMNS])):
            _add_column(f, zero, turn, column, bins)
        item = fetch_add(address + 8 * NEXT_ITEM)


@njit(**OPTIONS)
def _add_column(f, zero, turn, column, bins) -> None:  # noqa: ANN001
    """Add what a column contributes to the outputs of its input group."""
    entry_bytes, book_bytes = FLOAT * lanes_of(zero), FLOAT * f[_OUT_GROUP] * f[_GROUP]
    bins_bytes = ENTRIES * entry_bytes
    index, codebook = divmod(column, f[_CODEBOOKS])
    out = f[_OUT] + (turn * f[_COLUMNS] // f[_CODEBOOKS] + index) * f[_GROUP] * entry_bytes
    part_rows = f[_ROWS] // f[_PARTITIONS]
    for place in range(f[_OUT_GROUP] * f[_PARTITIONS]):
        part, partition = divmod(place, f[_PARTITIONS])
        book = f[_BOOKS] + (partition * f[_CODEBOOKS] + codebook) * f[_SIZE] * book_bytes + part * FLOAT * f[_GROUP]
        grads = f[_GRADS] + ((turn * f[_OUT_GROUP] + part) * f[_ROWS] + partition * part_rows) * entry_bytes
        codes = f[_CODES] + partition * part_rows * f[_COLUMNS]
        _clear(bins, 2 * bins_bytes)
        for start in range(0, part_rows, _CHUNK):
            for row in range(start, min(start + _CHUNK, part_rows), BLOCK_ROWS):
                rows = min(BLOCK_ROWS, part_rows - row)
                place_of_codes = _packed_place(f, column, row, rows, part_rows)
                _fill_bins(bins, codes + place_of_codes, grads + row * entry_bytes, rows, zero)
            _move_bins(bins, bins + bins_bytes, bins_bytes)
        _empty_bins(bins + bins_bytes, book, book_bytes, f[_SIZE], f[_GROUP], out, zero)


@njit(**OPTIONS)
def _clear(address, count) -> None:  # noqa: ANN001
    for i in range(0, count, 64):
        store(address + i, zeros(16))


@njit(**OPTIONS)
def _move_bins(bins, totals, count) -> None:  # noqa: ANN001
    """Add what bins hold to totals, and empty them."""
    for i in range(0, count, 64):
        store(totals + i, add(load(totals + i, zeros(16)), load(bins + i, zeros(16))))
    _clear(bins, count)


@njit(**OPTIONS)
def _packed_place(f, column, row, rows, part_rows):  # noqa: ANN001, ANN202
    """Where, in a partition's packed codes, those of a column begin for a block of rows."""
    first = column // BLOCK_COLUMNS * BLOCK_COLUMNS
    width = min(BLOCK_COLUMNS, f[_COLUMNS] - first)
    return first * part_rows + row * width + (column - first) * rows


@njit(**OPTIONS)
def _fill_bins(bins, codes, grads, rows, zero) -> None:  # noqa: ANN001
    """Add each row's gradients to the bin that its code chooses."""
    entry_bytes = FLOAT * lanes_of(zero)
    for _ in range(rows // 4):
        prefetch(codes + _AHEAD)
        word = load_bits(codes, 32)
        _fill_bin(bins + entry_bytes * (word & 255), grads, zero)
        _fill_bin(bins + entry_bytes * (word >> 8 & 255), grads + entry_bytes, zero)
        _fill_bin(bins + entry_bytes * (word >> 16 & 255), grads + 2 * entry_bytes, zero)
        _fill_bin(bins + entry_bytes * (word >> 24), grads + 3 * entry_bytes, zero)
        codes, grads = codes + 4, grads + 4 * entry_bytes
    for _ in range(rows % 4):
        _fill_bin(bins + entry_bytes * load_bits(codes, 8), grads, zero)
        codes, grads = codes + 1, grads + entry_bytes


@njit(**OPTIONS)
def _fill_bin(place, grads, zero) -> None:  # noqa: ANN001
    store(place, add(load(place, zero), load(grads, zero)))


@njit(**OPTIONS)
def _empty_bins(bins, book, book_bytes, size, group, out, zero) -> None:  # noqa: ANN001
    """Add bins [entry][lane], times the book's entries [G], to the outputs [G][lane]."""
    entry_bytes, whole = FLOAT * lanes_of(zero), group // 8 * 8
    for first in range(0, whole, 8):
        place = out + first * entry_bytes
        if lanes_of(zero) == 1:  # the lanes are those of the group
            _multiply_bins(bins, book + FLOAT * first, book_bytes, size, place)
            continue
        totals = load_each(place, entry_bytes, eight_of(zero))
        for entry in range(size):
            weights = splat_each(book + entry * book_bytes + FLOAT * first, FLOAT, totals)
            totals = tile_fma(totals, weights, (load(bins + entry * entry_bytes, zero),))
        store_each(place, entry_bytes, totals)
    for i in range(whole, group):
        total = load(out + i * entry_bytes, zero)
        for entry in range(size):
            weight = splat(float_at(book + entry * book_bytes + FLOAT * i), zero)
            total = fma(weight, load(bins + entry * entry_bytes, zero), total)
        store(out + i * entry_bytes, total)


@njit(**OPTIONS)
def _multiply_bins(bins, book, book_bytes, size, out) -> None:  # noqa: ANN001
    """Add bins [entry], times a book's entries of 8, to 8 outputs; four chains of additions hide their latency."""
    sums = (load(out, zeros(8)), zeros(8)), (zeros(8), zeros(8))
    whole = size // 4 * 4
    for entry in range(0, whole, 4):
        place, weights = bins + FLOAT * entry, book + entry * book_bytes
        sums = (
            (_fma_at(place, weights, sums[0][0]), _fma_at(place + FLOAT, weights + book_bytes, sums[0][1])),
            (
                _fma_at(place + 2 * FLOAT, weights + 2 * book_bytes, sums[1][0]),
                _fma_at(place + 3 * FLOAT, weights + 3 * book_bytes, sums[1][1]),
            ),
        )
    total = add(add(sums[0][0], sums[0][1]), add(sums[1][0], sums[1][1]))
    for entry in range(whole, size):
        total = _fma_at(bins + FLOAT * entry, book + entry * book_bytes, total)
    store(out, total)


@njit(**OPTIONS)
def _fma_at(value, weights, total):  # noqa: ANN001, ANN202
    """total + the float at `value` times the vector at `weights`."""
    return fma(splat(float_at(value), total), load(weights, total), total)
