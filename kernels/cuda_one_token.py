"""One token on NVIDIA GPUs by tables of partial sums, what `cuda_partial_sums` runs for it.

Each block tabulates the products of its inputs with every codebook entry and looks up a product per code instead of an
entry: 4 bytes for codes of up to 8 bits (`cuda/partial_sums.cu`), 2 bytes for codes of 9 to 12 bits, which have too
many entries (`cuda/wide_sums.cu`). A second launch adds the blocks' partial sums in fixed order.
"""

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_few_tokens, cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import Operands, finish

__all__ = ["WIDE_BITS", "run", "variant_of"]

WIDE_BITS = range(9, 13)
_PARAMS = struct.Struct("4Qq4i")
_THREADS = 512


@dataclass(frozen=True)
class Variant:
    """A kernel, with the constants of its source.

    Attributes:
        name: of the kernel and of its source.
        lane_bytes: of a row's codes that a lane loads at once.
        chunk_bytes: of a row's codes that a block takes.
        batch_rows: rows that a warp takes at once.
        shared_bytes: dynamic shared memory of a block.
    """

    name: str
    lane_bytes: int
    chunk_bytes: int
    batch_rows: int
    shared_bytes: int


def variant_of(nbits: int) -> Variant:
    """The kernel for codes of so many bits, at most 12."""
    if nbits in WIDE_BITS:  # the products of 16 codes, and scratch; 64 rows at once take 58.7 us, 32 55.6 (one H200)
        return Variant("wide_sums", 16, 32, 32, (32 << nbits) + 16)
    return Variant("partial_sums", 4, 128, 8, 128 << 10)


@dataclass(frozen=True)
class _Launch:
    """Everything about the launch for a shape but the addresses, as `Kernel.launch` takes it."""

    kernel: cuda_runtime.Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    lane_bytes: int
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _launch(codes: torch.Size, codebooks: torch.Size, code_bytes: int, dtype: torch.dtype, index: int) -> _Launch:
    """The launch for a weight; looked up at every call, since planning takes longer than small products."""
    partitions, books, size, _, group = (1, *codebooks)[-5:]
    rows, groups, nbits = codes[0] // partitions, codes[1], size.bit_length() - 1
    variant = variant_of(nbits)
    defines = cuda_few_tokens.defines(books, nbits, group, dtype)
    kernel = cuda_runtime.load_kernel(f"{variant.name}.cu", variant.name, defines, index, variant.shared_bytes)
    chunks = math.ceil(groups * books * code_bytes / variant.chunk_bytes)
    batches = math.ceil(rows / variant.batch_rows)
    ranges = min(batches, max(1, cuda_runtime.device_limits(index)[0] // (chunks * partitions)))
    sizes = (rows, groups, *divmod(batches, ranges))
    return _Launch(kernel, (chunks, ranges, partitions), variant.shared_bytes, variant.lane_bytes, sizes)


def run(operands: Operands, out: Tensor) -> None:
    """Write ``x @ W.t() + bias`` into `out`, on the current device.

    Args:
        operands: x [1, in_features], codes [out_features, in_features / G, K] int8 or int16 in rows of whole
            `lane_bytes`, codebooks [K, 2^N, 1, G] or [P, K, 2^N, 1, G], scales [out_features, 1, 1, 1] and bias
            [out_features] or None, as `cuda_runtime.prepared` returns them.
        out: [1, out_features], contiguous, neither empty nor without inputs.
    """
    x, codes, codebooks, scales, bias = operands
    code_bytes = codes.element_size()
    launch = _launch(codes.shape, codebooks.shape, code_bytes, x.dtype, x.device.index)
    if (codes.data_ptr() | code_bytes * codes.stride(0)) % launch.lane_bytes:
        codes = codes.clone(memory_format=torch.contiguous_format)
    partial = x.new_empty(launch.grid[0], *out.shape, dtype=torch.float32)
    addresses = (x.data_ptr(), codes.data_ptr(), codebooks.data_ptr(), partial.data_ptr())
    params = _PARAMS.pack(*addresses, code_bytes * codes.stride(0), *launch.sizes)
    launch.kernel.launch(launch.grid, _THREADS, launch.shared_bytes, params, overlap=True)
    finish(partial, scales, bias, out)
