"""Triton kernels for any scheme: decode a tile of the weight, and multiply it with one token.

Entries are gathered through the L1 cache, whose rate of cache lines is the bound. Tried on one H100, 8192 x 28672, and
left out: tables of products in shared memory looked up with `tl.gather` (one token of 4x8g8 took 578 us against 323),
and `tl.dot` on decoded tiles (4 tokens of 2x8g8 took 2.3 ms; decoding the weight for cuBLAS takes 0.6).

One program serves rows r of one partition p, and one row h of its out groups, so that a tile of weights is [BO rows, BG
groups, BE inputs of a group], BE being in_group_size G rounded up to a power of two; the weight's row is (p R + r) H +
h. Tiles are reduced one axis at a time and never reshaped: Triton 3.6.0 adds the wrong lanes of a reshaped tile. (The
smallest case that shows it on an H100: a gathered float16 tile [8, 16, 16] of one codebook, reshaped to [8, 256],
multiplied and summed over its rows, is 95 % off; the same kernel without the reshape is right.)
`aqlm_tensor.kernels.triton_linear` launches.

Shapes: R out groups per partition, K codebooks of SIZE entries of E = H G elements, M tokens.
"""

import triton
import triton.language as tl

__all__ = ["decode", "decode_linear", "finish"]


@triton.jit
def _decoded(
    codes: tl.tensor,
    books: tl.tensor,
    row: tl.tensor,
    in_rows: tl.tensor,
    groups: tl.tensor,
    in_groups: tl.tensor,
    row_stride: tl.tensor,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BO: tl.constexpr,
    BG: tl.constexpr,
    BE: tl.constexpr,
) -> tl.tensor:
    """Sums of entries [BO, BG, BE], zero outside; `row` [BO] is int64, `books` points to row h of the partition's."""
    within = in_rows[:, None] & in_groups[None, :]
    e = tl.arange(0, BE)[None, None, :]
    place = codes + row[:, None] * row_stride + groups[None, :] * K
    total = tl.zeros([BO, BG, BE], dtype=tl.float32)
    for k in tl.static_range(K):
        index = tl.load(place + k, mask=within, other=0).to(tl.int32) & (SIZE - 1)
        entry = books + (index[:, :, None] + k * SIZE) * E + e
        total += tl.load(entry, mask=within[:, :, None] & (e < G), other=0.0).to(tl.float32)
    return total


@triton.jit
def decode_linear(
    x: tl.tensor,
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partitions: tl.tensor,
    rows: tl.tensor,
    in_groups: tl.tensor,
    stretch: tl.tensor,
    x_stride: tl.tensor,
    row_stride: tl.tensor,
    out_features: tl.tensor,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BO: tl.constexpr,
    BG: tl.constexpr,
    BE: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """``x @ W.T`` for one token and a stretch of in groups: out [M, O] or, of a SPLIT sum, float32 [S, M, O].

    The grid is (row tiles, S stretches, M x partitions x H).
    """
    token = (tl.program_id(2) // (partitions * H)).to(tl.int64)
    partition, h = tl.program_id(2) // H % partitions, tl.program_id(2) % H
    r = tl.program_id(0) * BO + tl.arange(0, BO)
    in_rows = r < rows
    row = (partition * rows + r).to(tl.int64)
    books += partition.to(tl.int64) * (K * SIZE * H * G) + h * G
    first = tl.program_id(1) * stretch
    last = tl.minimum(first + stretch, in_groups)
    e = tl.arange(0, BE)[None, :]
    products = tl.zeros([BO, BG, BE], dtype=tl.float32)
    for group in range(first, last, BG):
        groups = group + tl.arange(0, BG)
        w = _decoded(codes, books, row, in_rows, groups, groups < last, row_stride, K, SIZE, G, H * G, BO, BG, BE)
        place = x + token * x_stride + groups[:, None] * G + e
        inputs = tl.load(place, mask=(groups < last)[:, None] & (e < G), other=0.0)
        products += w * inputs.to(tl.float32)[None, :, :]
    sums = tl.sum(tl.sum(products, axis=2), axis=1)
    column = row * H + h
    out += token * out_features
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * (tl.num_programs(2) // (partitions * H)) * out_features
    else:
        sums *= tl.load(scales + row, mask=in_rows, other=0.0).to(tl.float32)
        if HAS_BIAS:
            sums += tl.load(bias + column, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(out + column, sums.to(out.dtype.element_ty), mask=in_rows)


@triton.jit
def finish(
    partial: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_features: tl.tensor,
    splits: tl.tensor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Add partial sums [S, M, O] in their order, scale, add the bias: out [M, O]."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < out_features
    token = tl.program_id(1).to(tl.int64)
    slice_elements = tl.num_programs(1).to(tl.int64) * out_features
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(splits):
        sums += tl.load(partial + split * slice_elements + token * out_features + column, mask=mask, other=0.0)
    sums *= tl.load(scales + column // H, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * out_features + column, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def decode(
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    in_groups: tl.tensor,
    row_stride: tl.tensor,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BO: tl.constexpr,
    BG: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    """Write the weight, contiguous [O, I], each element rounded once."""
    partition, h = tl.program_id(2) // H, tl.program_id(2) % H
    r = tl.program_id(0) * BO + tl.arange(0, BO)
    in_rows = r < rows
    row = (partition * rows + r).to(tl.int64)
    groups = tl.program_id(1) * BG + tl.arange(0, BG)
    books += partition.to(tl.int64) * (K * SIZE * H * G) + h * G
    w = _decoded(codes, books, row, in_rows, groups, groups < in_groups, row_stride, K, SIZE, G, H * G, BO, BG, BE)
    w *= tl.load(scales + row, mask=in_rows, other=0.0).to(tl.float32)[:, None, None]
    e = tl.arange(0, BE)[None, None, :]
    place = out + ((row * H + h) * in_groups)[:, None, None] * G + groups[None, :, None] * G + e
    mask = in_rows[:, None, None] & (groups < in_groups)[None, :, None] & (e < G)
    tl.store(place, w.to(out.dtype.element_ty), mask=mask)
