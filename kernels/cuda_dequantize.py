"""Decode whole weights on NVIDIA GPUs, and multiply many tokens by decoding a piece of the weight at a time.

Decoding is bound by memory: 8192 x 28672 from 2x8g8 takes 200 us on one H100, 2.6 TB/s read and written where a plain
copy moves 3.0. For more than some hundred tokens a product is bound by arithmetic, and
cuBLAS on decoded pieces is hard to beat; the pieces reuse one workspace of at most 128 MiB, so no dense weight is ever
kept. Gradients with respect to the input take the same road at every size: `grad @ W` reads the decoded rows as they
are. For schemes of up to eight codebooks of at most 256 entries over groups of 8 inputs.
"""

import struct
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.kernels.registry import Problem

__all__ = ["WORKSPACE_BYTES", "dequantize", "linear", "linear_input_grad", "supports"]

WORKSPACE_BYTES = 128 << 20
_SOURCE = "dequantize.cu"
_PARAMS = struct.Struct("4Qq2i")
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_WARPS = 8
_GROUPS_PER_TURN = 256
_SHARED_BYTES = 64 << 10  # of books per block: leaves two blocks or more on a multiprocessor of sm_80 and later


def supports(problem: Problem) -> str | None:
    """Why these kernels cannot run a problem, or None if they can."""
    return cuda_runtime.why_not_groups_of_8(problem, range(1, 9), _DTYPES)


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The weight [O, I] that codes [O, I / 8, K] stand for, each element rounded once to the codebooks' dtype.

    Args:
        codes: [O, I / 8, K] int8.
        codebooks: [K, 2^N, 1, 8], or [P, K, 2^N, 1, 8] for P equal row partitions.
        scales: [O, 1, 1, 1].
    """
    out = codebooks.new_empty(codes.shape[0], codes.shape[1] * 8)
    if out.numel():
        _decode_into(out, codes, partitioned(codebooks), scales)
    return out


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias``, a piece of W's rows at a time: x [M, I] to [M, O]."""
    out = x.new_empty(x.shape[0], codes.shape[0])
    for rows, weight in _pieces(codes, codebooks, scales):
        out[:, rows] = F.linear(x, weight, None if bias is None else bias[rows])
    return out


def linear_input_grad(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``grad @ W``, pieces of W's rows added in float32 in their order: grad [M, O] to [M, I]."""
    pieces = list(_row_pieces(codes, codebooks))
    if len(pieces) == 1:
        return grad @ dequantize(codes, codebooks, scales)
    total = grad.new_zeros(grad.shape[0], codes.shape[1] * 8, dtype=torch.float32)
    for rows, weight in _pieces(codes, codebooks, scales):
        part = grad[:, rows]
        total += part @ weight if grad.dtype == torch.float32 else torch.mm(part, weight, out_dtype=torch.float32)
    return total.to(grad.dtype)


def _row_pieces(codes: Tensor, codebooks: Tensor) -> Iterator[tuple[int, slice]]:
    """Partition and rows of each piece; a piece lies within one partition and fits the workspace."""
    partitions = codebooks.shape[0] if codebooks.dim() == 5 else 1
    size = codes.shape[0] // partitions
    bytes_per_row = max(1, codes.shape[1] * 8 * codebooks.element_size())
    step = max(1, WORKSPACE_BYTES // bytes_per_row)
    for partition in range(partitions):
        for first in range(partition * size, (partition + 1) * size, step):
            yield partition, slice(first, min(first + step, (partition + 1) * size))


def _pieces(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their decoded weight, one after another in the same workspace."""
    pieces = list(_row_pieces(codes, codebooks))
    most = max((rows.stop - rows.start for _, rows in pieces), default=0)
    workspace = codebooks.new_empty(most, codes.shape[1] * 8)
    books = partitioned(codebooks)
    for partition, rows in pieces:
        weight = workspace[: rows.stop - rows.start]
        if weight.numel():
            _decode_into(weight, codes[rows], books[partition : partition + 1], scales[rows])
        yield rows, weight


def _decode_into(out: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> None:
    """Write the weight of codes [O, I / 8, K] with codebooks [P, K, 2^N, 1, 8] into the contiguous `out` [O, I]."""
    partitions, books, size = codebooks.shape[:3]
    if codes.stride(2) != 1 or codes.stride(1) != books:
        codes = codes.contiguous()
    if not codebooks.is_contiguous() or codebooks.data_ptr() % 16:
        codebooks = codebooks.clone(memory_format=torch.contiguous_format)
    scales = scales.contiguous()
    rows, groups = codes.shape[0] // partitions, codes.shape[1]
    entry_bytes = 8 * codebooks.element_size()
    copies = next(c for c in (8, 4, 2, 1) if c == 1 or books * size * entry_bytes * c <= _SHARED_BYTES)
    shared_bytes = books * size * entry_bytes * copies
    defines = (
        ("NUM_BOOKS", books),
        ("NBITS", size.bit_length() - 1),
        ("DTYPE", _DTYPES[out.dtype]),
        ("COPIES", copies),
        ("ALIGNED", int((codes.data_ptr() | codes.stride(0)) % books == 0)),
    )
    with cuda_runtime.on_device(out.device):
        kernel = cuda_runtime.load_kernel(_SOURCE, "dequantize", defines, out.device.index, shared_bytes)
        processors, limit = cuda_runtime.device_limits(out.device.index)
        resident = 2 if 2 * (shared_bytes + 1024) <= limit else 1  # more of them write no faster (one H100)
        turns = rows * -(-groups // _GROUPS_PER_TURN)
        grid = (min(-(-turns // _WARPS), max(1, resident * processors // partitions)), partitions, 1)
        values = (
            codes.data_ptr(),
            codebooks.data_ptr(),
            scales.data_ptr(),
            out.data_ptr(),
            codes.stride(0),
            rows,
            groups,
        )
        kernel.launch(grid, _WARPS * 32, shared_bytes, _PARAMS.pack(*values))
