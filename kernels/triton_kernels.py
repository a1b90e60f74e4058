"""Triton kernels for any scheme: decode a tile of the weight, and multiply it.

Entries are gathered through the L1 cache, whose rate of cache lines is the bound however few tokens there are. (Tables
of products in shared memory, looked up with `tl.gather`, took longer: 578 us against 323 for one token of 4x8g8 at
8192 x 28672 on one H100.)

One program serves rows r of one partition p, and one row h of its out groups (grid axis 2 counts p H + h), so that a
tile of weights is [BO rows, BG groups, BE inputs of a group], BE being in_group_size G rounded up to a power of two;
the weight's row is (p R + r) H + h. Grid axis 1 counts stretches of the in groups; more than one leave partial sums
that `finish` adds in their order. All sums are float32. `aqlm_tensor.kernels.triton_linear` chooses and launches.

Shapes: R out groups per partition, IG in groups, K codebooks of SIZE entries of E = H G elements, M tokens.
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
    BE: tl.constexpr,
) -> tl.tensor:
    """Sums of entries [BO, BG, BE], zero outside; `row` [BO] is int64, `books` points to row h of the partition's."""
    within = in_rows[:, None] & in_groups[None, :]
    e = tl.arange(0, BE)[None, None, :]
    place = codes + row[:, None] * row_stride + groups[None, :] * K
    total = tl.zeros([row.shape[0], groups.shape[0], BE], dtype=tl.float32)
    for k in tl.static_range(K):
        index = tl.load(place + k, mask=within, other=0).to(tl.int32) & (SIZE - 1)
        entry = books + (index[:, :, None] + k * SIZE) * E + e
        total += tl.load(entry, mask=within[:, :, None] & (e < G), other=0.0).to(tl.float32)
    return total


@triton.jit
def _store_sums(
    sums: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    in_rows: tl.tensor,
    h: tl.tensor,
    tokens: tl.tensor,
    out_features: tl.tensor,
    H: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Finish and store sums [BO, BM] as out [M, O], or, of a split sum, store them as they are as out [S, M, O]."""
    token = tl.arange(0, sums.shape[1])[None, :]
    column = row * H + h
    mask = in_rows[:, None] & (token < tokens)
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * tokens * out_features
    else:
        sums *= tl.load(scales + row, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        if HAS_BIAS:
            sums += tl.load(bias + column, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + token.to(tl.int64) * out_features + column[:, None], sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def decode_linear(
    x: tl.tensor,
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
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
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """``x @ W.T`` for up to BM tokens, tile by decoded tile; BM = 1 without tensor cores."""
    partition, h = tl.program_id(2) // H, tl.program_id(2) % H
    r = tl.program_id(0) * BO + tl.arange(0, BO)
    in_rows = r < rows
    row = (partition * rows + r).to(tl.int64)
    books += partition.to(tl.int64) * (K * SIZE * H * G) + h * G
    first = tl.program_id(1) * stretch
    last = tl.minimum(first + stretch, in_groups)
    column = tl.arange(0, BG * BE)
    token = tl.arange(0, BM)[None, :]
    if BM == 1:
        products = tl.zeros([BO, BG * BE], dtype=tl.float32)
    else:
        sums = tl.zeros([BO, BM], dtype=tl.float32)
    for group in range(first, last, BG):
        groups = group + tl.arange(0, BG)
        w = _decoded(codes, books, row, in_rows, groups, groups < last, row_stride, K, SIZE, G, H * G, BE)
        w = tl.reshape(w, [BO, BG * BE])
        place = x + (group + column // BE) * G + column % BE
        in_x = (group + column // BE < last) & (column % BE < G)
        if BM == 1:
            products += w * tl.load(place, mask=in_x, other=0.0).to(tl.float32)[None, :]
        else:
            inputs = tl.load(place[:, None] + token * x_stride, mask=in_x[:, None] & (token < tokens), other=0.0)
            if inputs.dtype == tl.float16:
                # in two bfloat16 pieces each: an unscaled sum of entries may leave float16's range
                high, w_high = inputs.to(tl.bfloat16), w.to(tl.bfloat16)
                low = (inputs.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
                w_low = (w - w_high.to(tl.float32)).to(tl.bfloat16)
                sums = tl.dot(w_high, low, sums)
                sums = tl.dot(w_low, high, sums)
                sums = tl.dot(w_high, high, sums)
            else:
                sums = tl.dot(w.to(inputs.dtype), inputs, sums, input_precision="ieee")
    if BM == 1:
        sums = tl.sum(products, axis=1)[:, None]
    _store_sums(sums, scales, bias, out, row, in_rows, h, tokens, out_features, H, SPLIT, HAS_BIAS)


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
    w = _decoded(codes, books, row, in_rows, groups, groups < in_groups, row_stride, K, SIZE, G, H * G, BE)
    w *= tl.load(scales + row, mask=in_rows, other=0.0).to(tl.float32)[:, None, None]
    e = tl.arange(0, BE)[None, None, :]
    place = out + ((row * H + h) * in_groups)[:, None, None] * G + groups[None, :, None] * G + e
    mask = in_rows[:, None, None] & (groups < in_groups)[None, :, None] & (e < G)
    tl.store(place, w.to(out.dtype.element_ty), mask=mask)
