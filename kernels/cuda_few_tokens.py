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
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import Operands

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


def run(operands: Operands, out: Tensor) -> None:
    """Write ``x @ W.t() + bias`` into `out`, on the current device.

    Args:
        operands: x [tokens, in_features], codes [out_features, in_features / G, K] int8 in rows of whole 16 bytes,
            codebooks [K, 2^N, 1, G] or [P, K, 2^N, 1, G], scales [out_features, 1, 1, 1] and bias [out_features] or
            None, as `cuda_runtime.prepared` returns them.
        out: [tokens, out_features], contiguous, neither empty nor without inputs.
    """
    x, codes, codebooks, scales, bias = operands
    if (codes.data_ptr() | codes.stride(0)) % LANE_BYTES:
        codes = codes.clone(memory_format=torch.contiguous_format)
    partitions = codebooks.shape[0] if codebooks.dim() == 5 else 1
    chunks = math.ceil(codes.shape[1] * codes.shape[2] / _CHUNK_BYTES)
    processors, _ = cuda_runtime.device_limits(x.device.index)
    at_once = TILE_TOKENS * max(2, processors // (chunks * partitions))
    if x.shape[0] <= at_once:
        _run_some((x, codes, codebooks, scales, bias), out)
        return
    for first in range(0, x.shape[0], at_once):
        some = slice(first, first + at_once)
        _run_some((x[some], codes, codebooks, scales, bias), out[some])


@dataclass(frozen=True)
class _Launch:
    """Everything about the launches for a shape but the addresses and strides.

    Attributes:
        multiply: the kernel that multiplies.
        grid: its blocks.
        sizes: its parameters after the addresses and strides.
        partial: shape of the partial sums.
        add: the kernel that adds them.
        add_grid: its blocks.
        add_sizes: its parameters after the addresses.
    """

    multiply: cuda_runtime.Kernel
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    partial: tuple[int, ...]
    add: cuda_runtime.Kernel
    add_grid: tuple[int, int, int]
    add_sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _launch(tokens: int, codes: torch.Size, codebooks: torch.Size, dtype: torch.dtype, index: int) -> _Launch:
    """The launches for x of so many rows; looked up at every call, since planning takes longer than small products."""
    partitions, books, size, _, group = (1, *codebooks)[-5:]
    out_features, groups = codes[0], codes[1]
    constants = defines(books, size.bit_length() - 1, group, dtype)
    rows = out_features // partitions
    tiles, chunks = math.ceil(tokens / TILE_TOKENS), math.ceil(groups * books / _CHUNK_BYTES)
    batches = math.ceil(rows / _ROWS_PER_BATCH)
    ranges = min(batches, max(1, cuda_runtime.device_limits(index)[0] // (chunks * partitions * tiles)))
    return _Launch(
        cuda_runtime.load_kernel(_SOURCE, "few_tokens", constants, index, SHARED_BYTES),
        (chunks, ranges, partitions * tiles),
        (tokens, tiles, rows, groups, *divmod(batches, ranges)),
        (chunks, tiles, out_features, TILE_TOKENS),
        cuda_runtime.load_kernel(_SOURCE, "finish_few_tokens", constants, index),
        (math.ceil(out_features * TILE_TOKENS / _FINISH_THREADS), tiles, 1),
        (tokens, out_features, chunks),
    )


def _run_some(operands: Operands, out: Tensor) -> None:
    """`run` by one launch for all of the tokens, and one that adds."""
    x, codes, codebooks, scales, bias = operands
    launch = _launch(x.shape[0], codes.shape, codebooks.shape, x.dtype, x.device.index)
    partial = x.new_empty(launch.partial, dtype=torch.float32)
    addresses = (x.data_ptr(), codes.data_ptr(), codebooks.data_ptr(), partial.data_ptr())
    params = _PARAMS.pack(*addresses, x.stride(0), codes.stride(0), *launch.sizes)
    launch.multiply.launch(launch.grid, _THREADS, SHARED_BYTES, params, overlap=True)
    addresses = (partial.data_ptr(), scales.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
    params = _FINISH_PARAMS.pack(*addresses, *launch.add_sizes)
    launch.add.launch(launch.add_grid, _FINISH_THREADS, 0, params, overlap=True)
