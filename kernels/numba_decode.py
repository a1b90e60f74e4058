"""Decode blocks of the weight to float32: what everything but the lookup kernel is built on.

An entry is read 8, 4 or 1 floats at a time, whichever divides the group; one and two codebooks of groups of 8 have
loops of their own. Decoding 2x8g8 costs about as much as multiplying the weight with 8 to 16 rows of x, so the products
in numba_product decode a block once and use it for all rows of x.
"""

import functools
from array import array
from dataclasses import dataclass

import torch
from numba import njit
from torch import Tensor

from aqlm_tensor.kernels.numba_parallel import (
    ITEMS,
    NEXT_ITEM,
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
    fetch_add,
    float_at,
    lanes_of,
    load,
    load_bfloat16,
    load_bits,
    load_float16,
    multiply,
    splat,
    store,
    zeros,
)

__all__ = [
    "CODEBOOKS",
    "FIRST_FREE",
    "GROUP",
    "LARGE_BOOKS",
    "OUT_GROUP",
    "SIZE",
    "Weight",
    "decode_block",
    "decode_rows",
    "entry_index",
    "load_entry",
    "row_addresses",
]

_FLOAT = 4  # bytes
_ROWS_PER_ITEM = 16

# Fields that describe a weight, after the head that numba_parallel defines; a kernel's own follow from FIRST_FREE on.
_CODES, _ROW_BYTES, _BOOKS, _SCALES = range(3, 7)
CODEBOOKS, SIZE, OUT_GROUP, GROUP, _PART_ROWS = range(7, 12)
FIRST_FREE = 12
_OUT, _GROUPS, _FIRST_ROW, _LAST_ROW = range(FIRST_FREE, FIRST_FREE + 4)


# Codebooks of more floats than this are read in the precision they are in: widening them at every call takes as long as
# a small product, and they are short of room in the cache anyway. Smaller ones are faster to read in float32.
LARGE_BOOKS = 1 << 17
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Weight:
    """The tensors of a weight in the form that the compiled code reads, and their sizes.

    Attributes:
        codes: [O/H, I/G, K] int8 or int16, contiguous but for the stride of its rows.
        books: [K, 2^N, H, G] or [P, K, 2^N, H, G], contiguous, in float32 unless they are large.
        scales: [O/H, 1, 1, 1] float32, contiguous.
    """

    codes: Tensor
    books: Tensor
    scales: Tensor

    @classmethod
    def of(cls, codes: Tensor, codebooks: Tensor, scales: Tensor) -> "Weight":
        """A weight from tensors of any strides and float dtype."""
        groups, num_codebooks = codes.shape[1:]
        if codes.stride()[1:] != (num_codebooks, 1) or codes.stride(0) < groups * num_codebooks:
            codes = codes.contiguous()
        books = codebooks.contiguous() if codebooks.numel() > LARGE_BOOKS else as_float32(codebooks)
        return cls(codes, books, as_float32(scales))

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0] * self.books.shape[-2], self.codes.shape[1] * self.books.shape[-1]

    @property
    def types(self) -> tuple[bool, int]:
        """What compiled code is specialised on: whether codes have 16 bits, and the kind of float of the books."""
        return self.codes.element_size() == 2, _KINDS[self.books.dtype]

    def frame(self, items: int, *fields: int) -> "array[int]":
        """A frame whose head says how many items there are and that holds this weight and a kernel's own fields."""
        partitions, num_codebooks, size, out_group, group = (1, *self.books.shape)[-5:]
        row_bytes = self.codes.stride(0) * self.codes.element_size()
        addresses = (self.codes.data_ptr(), row_bytes, self.books.data_ptr(), self.scales.data_ptr())
        sizes = (num_codebooks, size, out_group, group, self.codes.shape[0] // partitions)
        return make_frame(items, *addresses, *sizes, *fields)


def decode_rows(weight: Weight, start: int, stop: int) -> Tensor:
    """Rows start to stop of the weight: [stop - start, I] float32."""
    out = torch.empty(stop - start, weight.shape[1], dtype=torch.float32)
    items = -(-out.shape[0] // _ROWS_PER_ITEM)
    frame = weight.frame(items, out.data_ptr(), weight.codes.shape[1], start, stop)
    work = out.numel() * weight.books.shape[-4] // 8
    run(_kernel(*weight.types), frame, threads_for(items, work))
    return out


@functools.cache
def _kernel(wide: bool, kind: int) -> Kernel:
    """The compiled decoder for a weight of such types."""
    digest = source_digest()

    def kernel(f) -> None:  # noqa: ANN001
        _take_items(f, wide, kind, digest)

    return compile_kernel(kernel)


@njit(**OPTIONS)
def _take_items(f, wide, kind, digest) -> None:  # noqa: ANN001, ARG001
    width = f[_GROUPS] * f[GROUP]
    item = fetch_add(address_of(f) + 8 * NEXT_ITEM)
    while item < f[ITEMS]:
        start = f[_FIRST_ROW] + item * _ROWS_PER_ITEM
        rows = min(_ROWS_PER_ITEM, f[_LAST_ROW] - start)
        out = f[_OUT] + item * _ROWS_PER_ITEM * width * _FLOAT
        decode_block(f, wide, kind, start, rows, 0, f[_GROUPS], out, width * _FLOAT)
        item = fetch_add(address_of(f) + 8 * NEXT_ITEM)


@njit(**OPTIONS)
def row_addresses(f, kind, row):  # noqa: ANN001, ANN201
    """(codes, codebooks, scale) of a row of the weight that frame f describes: two addresses and a value."""
    out_group, part = divmod(row, f[OUT_GROUP])
    item_bytes = 2 if kind else _FLOAT
    partition = out_group // f[_PART_ROWS]
    entry = partition * f[CODEBOOKS] * f[SIZE] * f[OUT_GROUP] + part
    scale = float_at(f[_SCALES] + _FLOAT * out_group)
    return f[_CODES] + out_group * f[_ROW_BYTES], f[_BOOKS] + entry * f[GROUP] * item_bytes, scale


@njit(**OPTIONS)
def entry_index(codes, wide, codebook, size):  # noqa: ANN001, ANN201
    """The index that the code of a codebook stands for; `codes` is the address of a group's first code."""
    return (load_bits(codes + 2 * codebook, 16) if wide else load_bits(codes + codebook, 8)) & (size - 1)


@njit(**OPTIONS)
def load_entry(address, zero, kind):  # noqa: ANN001, ANN201
    """Values of an entry, as a vector of the type of `zero`."""
    if kind == 0:
        return load(address, zero)
    return load_bfloat16(address, zero) if kind == 1 else load_float16(address, zero)


@njit(**OPTIONS)
def decode_block(f, wide, kind, first_row, rows, first_group, groups, out, out_row_bytes) -> None:  # noqa: ANN001
    """Write rows x groups of the weight that frame f describes, scaled, to `out` (compiled code)."""
    group, num_codebooks, size = f[GROUP], f[CODEBOOKS], f[SIZE]
    entry_bytes = (2 if kind else _FLOAT) * f[OUT_GROUP] * group
    for row in range(first_row, first_row + rows):
        codes, books, scale = row_addresses(f, kind, row)
        codes += first_group * num_codebooks * (2 if wide else 1)
        if group == 8 and num_codebooks == 2:
            _decode_row(codes, wide, kind, books, size, entry_bytes, 2, 8, scale, groups, out, zeros(8))
        elif group == 8 and num_codebooks == 1:
            _decode_row(codes, wide, kind, books, size, entry_bytes, 1, 8, scale, groups, out, zeros(8))
        elif group % 8 == 0:
            _decode_row(codes, wide, kind, books, size, entry_bytes, num_codebooks, group, scale, groups, out, zeros(8))
        elif group % 4 == 0:
            _decode_row(codes, wide, kind, books, size, entry_bytes, num_codebooks, group, scale, groups, out, zeros(4))
        else:
            _decode_row(codes, wide, kind, books, size, entry_bytes, num_codebooks, group, scale, groups, out, zeros(1))
        out += out_row_bytes


@njit(**OPTIONS)
def _decode_row(codes, wide, kind, books, size, entry_bytes, num_codebooks, group, scale, groups, out, zero) -> None:  # noqa: ANN001
    item_bytes = 2 if kind else _FLOAT
    for _ in range(groups):
        for piece in range(0, group, lanes_of(zero)):
            total = zero
            for codebook in range(num_codebooks):
                entry = books + (codebook * size + entry_index(codes, wide, codebook, size)) * entry_bytes
                total = add(total, load_entry(entry + item_bytes * piece, zero, kind))
            store(out, multiply(total, splat(scale, zero)))
            out += _FLOAT * lanes_of(zero)
        codes += 2 * num_codebooks if wide else num_codebooks
