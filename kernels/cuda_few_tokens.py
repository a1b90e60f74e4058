"""Two to 64 tokens on NVIDIA GPUs by tables of partial sums, what `cuda_partial_sums` runs for them.

Each block tabulates the products of its inputs with every codebook entry for four tokens at once, 16 bits each, and
looks up 8 bytes per code where other kernels read whole entries; see `cuda/few_tokens.cu`. A second launch adds the
partial sums in fixed order: 16 bytes for each output, four tokens and 64 codes, which is why small weights do not gain.
Two tokens take as long as four; more are taken four by four, by several blocks of one launch as far as those run at
once, two at least, and by several launches beyond.
"""

import functools
import math
import struct

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.reference import partitioned

__all__ = ["LANE_BYTES", "MAX_TOKENS", "SHARED_BYTES", "TILE_TOKENS", "defines", "run"]

MAX_TOKENS = 64
TILE_TOKENS = 4
LANE_BYTES = 16  # codes that a lane loads at once from one row
SHARED_BYTES = (128 << 10) + 16  # tables, scratch
_SOURCE = "few_tokens.cu"
_PARAMS = struct.Struct("4Q2q6i")
_FINISH_PARAMS = struct.Struct("4Q3i4x")
_THREADS, _FINISH_THREADS = 512, 256
_CHUNK_BYTES = 64  # codes of a block from one row
_ROWS_PER_BATCH = 32  # rows that a warp takes at once


def defines(books: int, nbits: int, group: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The compile-time constants of ``cuda/tables.cuh``."""
    return ("NUM_BOOKS", books), ("NBITS", nbits), ("GROUP", group), ("DTYPE_BF16", int(dtype == torch.bfloat16))


@functools.cache
def _kernels(
    books: int, nbits: int, group: int, dtype: torch.dtype, index: int
) -> tuple[cuda_runtime.Kernel, cuda_runtime.Kernel]:
    """The kernel that multiplies and the one that adds."""
    constants = defines(books, nbits, group, dtype)
    return (
        cuda_runtime.load_kernel(_SOURCE, "few_tokens", constants, index, SHARED_BYTES),
        cuda_runtime.load_kernel(_SOURCE, "finish_few_tokens", constants, index),
    )


def run(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write ``x @ W.t() + bias`` into `out`, on the current device.

    Args:
        x: [tokens, in_features], as `cuda_runtime.prepared` returns it, like all operands.
        codes: [out_features, in_features / G, K] int8, rows of whole 16 bytes.
        codebooks: [K, 2^N, 1, G] or [P, K, 2^N, 1, G].
        scales: [out_features, 1, 1, 1].
        bias: [out_features] or None.
        out: [tokens, out_features], contiguous, neither empty nor without inputs.
    """
    if (codes.data_ptr() | codes.stride(0)) % LANE_BYTES:
        codes = codes.clone(memory_format=torch.contiguous_format)
    books = partitioned(codebooks)
    chunks = math.ceil(codes.shape[1] * codes.shape[2] / _CHUNK_BYTES)
    processors, _ = cuda_runtime.device_limits(x.device.index)
    at_once = TILE_TOKENS * max(2, processors // (chunks * books.shape[0]))
    if x.shape[0] <= at_once:
        _run_some(x, codes, books, scales, bias, out, processors)
        return
    for first in range(0, x.shape[0], at_once):
        some = slice(first, first + at_once)
        _run_some(x[some], codes, books, scales, bias, out[some], processors)


def _run_some(
    x: Tensor, codes: Tensor, books: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, processors: int
) -> None:
    """`run` by one launch for all of the tokens, and one that adds."""
    partitions, num_books, size, _, group = books.shape
    tokens, rows, groups = x.shape[0], codes.shape[0] // partitions, codes.shape[1]
    multiply, add = _kernels(num_books, size.bit_length() - 1, group, x.dtype, x.device.index)
    tiles, chunks = math.ceil(tokens / TILE_TOKENS), math.ceil(groups * num_books / _CHUNK_BYTES)
    batches = math.ceil(rows / _ROWS_PER_BATCH)
    ranges = min(batches, max(1, processors // (chunks * partitions * tiles)))
    partial = torch.empty(chunks, tiles, codes.shape[0], TILE_TOKENS, dtype=torch.float32, device=x.device)
    values = (
        x.data_ptr(),
        codes.data_ptr(),
        books.data_ptr(),
        partial.data_ptr(),
        x.stride(0),
        codes.stride(0),
        tokens,
        tiles,
        rows,
        groups,
        *divmod(batches, ranges),
    )
    grid = (chunks, ranges, partitions * tiles)
    multiply.launch(grid, _THREADS, SHARED_BYTES, _PARAMS.pack(*values), overlap=True)
    values = (
        partial.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        tokens,
        codes.shape[0],
        chunks,
    )
    blocks = math.ceil(codes.shape[0] * TILE_TOKENS / _FINISH_THREADS)
    add.launch((blocks, tiles, 1), _FINISH_THREADS, 0, _FINISH_PARAMS.pack(*values), overlap=True)
