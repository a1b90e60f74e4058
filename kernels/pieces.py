"""Products with a weight that is decoded a piece at a time, into one workspace, for cuBLAS to multiply.

Beyond some hundred tokens a product is bound by arithmetic, which cuBLAS does well, and `grad @ W` reads decoded rows
as they are. Each kernel that can decode brings its `decode_into(out, codes, codebooks, scales)`, which writes the
weight of codes [R, I/G, K] with codebooks [P, K, 2^N, H, G] into a contiguous [R H, I].

The workspace is at most 256 MiB, taken from torch's allocator for the time of the call. It is that large because every
piece is a product of its own: with fewer rows cuBLAS's tiles leave more of the GPU idle at the end.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_tensor.kernels.reference import partitioned

__all__ = ["WORKSPACE_BYTES", "dequantize", "linear", "linear_input_grad"]

WORKSPACE_BYTES = 256 << 20
_ROWS_MULTIPLE = 128  # of a piece's rows, for cuBLAS's tiles

DecodeInto = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor, decode_into: DecodeInto) -> Tensor:
    """The weight [O, I] in the codebooks' dtype."""
    out = codebooks.new_empty(codes.shape[0] * codebooks.shape[-2], codes.shape[1] * codebooks.shape[-1])
    if out.numel():
        decode_into(out, codes, partitioned(codebooks), scales)
    return out


def linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, decode_into: DecodeInto
) -> Tensor:
    """``x @ W.t() + bias``: x [M, I] to [M, O]."""
    if codes.shape[0] <= _most_rows(codes, codebooks):
        return F.linear(x, dequantize(codes, codebooks, scales, decode_into), bias)
    out = x.new_empty(x.shape[0], codes.shape[0] * codebooks.shape[-2])
    for rows, weight in _decoded(codes, codebooks, scales, decode_into):
        part = out[:, rows]  # written in place: cuBLAS takes a row stride, a copy would take as long as decoding
        if bias is None:
            torch.mm(x, weight.T, out=part)
        else:
            torch.addmm(bias[rows], x, weight.T, out=part)
    return out


def linear_input_grad(
    grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, decode_into: DecodeInto
) -> Tensor:
    """``grad @ W``, pieces added in float32 in their order: grad [M, O] to [M, I]."""
    if codes.shape[0] <= _most_rows(codes, codebooks):
        return grad @ dequantize(codes, codebooks, scales, decode_into)
    total = grad.new_zeros(grad.shape[0], codes.shape[1] * codebooks.shape[-1], dtype=torch.float32)
    for rows, weight in _decoded(codes, codebooks, scales, decode_into):
        # float32 out of cuBLAS exists on GPUs only; elsewhere the piece is widened
        if grad.dtype == torch.float32 or grad.device.type != "cuda":
            total += grad[:, rows].float() @ weight.float()
        else:
            total += torch.mm(grad[:, rows], weight, out_dtype=torch.float32)
    return total.to(grad.dtype)


def _most_rows(codes: Tensor, codebooks: Tensor) -> int:
    """Rows of codes whose weight fits the workspace; at least one."""
    out_group, in_group = codebooks.shape[-2:]
    return max(1, WORKSPACE_BYTES // max(1, out_group * in_group * codes.shape[1] * codebooks.element_size()))


def _row_pieces(rows: int, partitions: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Partitions and rows of each piece: whole partitions or a stretch of one, no more than `most` rows."""
    size = rows // partitions
    if size <= most:
        step = most // max(1, size)
        for first in range(0, partitions, step):
            last = min(first + step, partitions)
            yield slice(first, last), slice(first * size, last * size)
        return
    step = -(-size // -(-size // most))  # pieces of about the same size
    step = min(most, -(-step // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    for partition in range(partitions):
        end = (partition + 1) * size
        for first in range(partition * size, end, step):
            yield slice(partition, partition + 1), slice(first, min(first + step, end))


def _decoded(
    codes: Tensor, codebooks: Tensor, scales: Tensor, decode_into: DecodeInto
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight and what is decoded of them, one piece after another in the same workspace."""
    books = partitioned(codebooks)
    out_group, in_features = books.shape[-2], codes.shape[1] * books.shape[-1]
    cuts = list(_row_pieces(codes.shape[0], books.shape[0], _most_rows(codes, codebooks)))
    largest = max((rows.stop - rows.start for _, rows in cuts), default=0)
    workspace = books.new_empty(largest * out_group, in_features)
    for partitions, rows in cuts:
        weight = workspace[: (rows.stop - rows.start) * out_group]
        if weight.numel():
            decode_into(weight, codes[rows], books[partitions], scales[rows])
        yield slice(rows.start * out_group, rows.stop * out_group), weight
