"""One token of schemes with codes of 9 to 12 bits by a table of partial sums, what `cuda_partial_sums` runs for them.

Each block tabulates the products of its inputs with all of up to 4096 entries of one or two codebooks, 16 bits each,
and looks up 2 bytes per code instead of an entry's 16; see `cuda/wide_sums.cu`. More tokens at once would need more
shared memory than there is. A second launch adds the partial sums in fixed order.
"""

import functools
import math
import struct

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import finish
from aqlm_tensor.kernels.reference import partitioned

__all__ = ["BITS", "LANE_BYTES", "MAX_BOOKS", "defines", "run", "shared_bytes"]

BITS = range(9, 13)
MAX_BOOKS = 2
LANE_BYTES = 16  # codes that a lane loads at once from one row
_SOURCE = "wide_sums.cu"
_PARAMS = struct.Struct("4Qq4i")
_THREADS = 512
_CHUNK_BYTES = 32  # codes of a block from one row
_ROWS_PER_BATCH = 32  # rows that a warp takes at once; with 64 2x12g8 takes 58.7 us instead of 55.6 (one H200)


def shared_bytes(nbits: int) -> int:
    """Shared memory of a block: the products of 16 codes, scratch."""
    return (32 << nbits) + 16


def defines(books: int, nbits: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The kernel's compile-time constants."""
    return ("NUM_BOOKS", books), ("NBITS", nbits), ("DTYPE_BF16", int(dtype == torch.bfloat16))


@functools.cache
def _kernel(books: int, nbits: int, dtype: torch.dtype, index: int) -> cuda_runtime.Kernel:
    return cuda_runtime.load_kernel(_SOURCE, "wide_sums", defines(books, nbits, dtype), index, shared_bytes(nbits))


def run(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the product with one row of x into `out`, on the current device.

    Args:
        x: [1, in_features], as `cuda_runtime.prepared` returns it, like all operands.
        codes: [out_features, in_features / 8, K] int16, rows of whole 16 bytes.
        codebooks: [K, 2^N, 1, 8] or [P, K, 2^N, 1, 8].
        scales: [out_features, 1, 1, 1].
        bias: [out_features] or None.
        out: [1, out_features], contiguous, neither empty nor without inputs.
    """
    if (codes.data_ptr() | 2 * codes.stride(0)) % LANE_BYTES:
        codes = codes.clone(memory_format=torch.contiguous_format)
    books = partitioned(codebooks)
    partitions, num_books, size = books.shape[:3]
    rows, groups, index, nbits = codes.shape[0] // partitions, codes.shape[1], x.device.index, size.bit_length() - 1
    processors, _ = cuda_runtime.device_limits(index)
    chunks, batches = math.ceil(2 * groups * num_books / _CHUNK_BYTES), math.ceil(rows / _ROWS_PER_BATCH)
    ranges = min(batches, max(1, processors // (chunks * partitions)))
    partial = torch.empty(chunks, 1, codes.shape[0], dtype=torch.float32, device=x.device)
    values = (
        x.data_ptr(),
        codes.data_ptr(),
        books.data_ptr(),
        partial.data_ptr(),
        2 * codes.stride(0),
        rows,
        groups,
        *divmod(batches, ranges),
    )
    kernel = _kernel(num_books, nbits, x.dtype, index)
    kernel.launch((chunks, ranges, partitions), _THREADS, shared_bytes(nbits), _PARAMS.pack(*values), overlap=True)
    finish(partial, scales, bias, out)
