"""Exactly one token on NVIDIA GPUs with 132 KB of shared memory per block (A100, Hopper, data-centre Blackwell).

For 1x8g8 and 2x8g8 (and fewer bits). Each block tabulates the products of its inputs with every codebook entry and then
looks up 4 bytes per code instead of 16, so that reading the codes is the bound instead of the lookups; see
`cuda/partial_sums.cu`. A second launch adds the blocks' partial sums in fixed order. It stops paying at two tokens.
"""

import struct

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_lookup, cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import finish
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.kernels.registry import Problem

__all__ = ["linear", "slower_than_next", "supports"]

_SOURCE = "partial_sums.cu"
_PARAMS = struct.Struct("4Qq4i")
_SHARED_BYTES = 128 << 10
_THREADS = 512
_LANE_BYTES = 4  # codes that a lane loads at once from one row
_ROWS_PER_UNIT = 8
# The second launch costs about 3 us: 2x8g8 takes 7.9 us against the lookup kernel's 7.5 at 4096 x 4096, and 12.3
# against 16.4 at 4096 x 14336 (bfloat16, one H100).
_LARGE_WEIGHTS = 1 << 25


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None if it can."""
    reason = cuda_lookup.supports(problem)
    if reason is not None:
        return reason
    if problem.rows != 1:
        return f"runs exactly 1 row of x, not {problem.rows}"
    if problem.scheme.num_codebooks > 2:
        return f"needs 1 or 2 codebooks, not {problem.scheme}"
    if problem.in_features % (8 * _LANE_BYTES // problem.scheme.num_codebooks):
        return f"needs whole vectors of codes per lane, which {problem.in_features} inputs do not give"
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    _, limit = cuda_runtime.device_limits(torch.device(problem.device).index or 0)
    if limit < _SHARED_BYTES:
        return f"needs {_SHARED_BYTES} bytes of shared memory per block, this GPU has {limit}"
    return None


def slower_than_next(problem: Problem) -> str | None:
    """Why the lookup kernel, which starts faster, is the better choice for a small weight; None for a large one."""
    weights = problem.out_features * problem.in_features
    if weights >= _LARGE_WEIGHTS:
        return None
    return f"slower than cuda_lookup below {_LARGE_WEIGHTS} weights, this layer has {weights}"


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias`` for the weight W that the codes stand for.

    Args:
        x: [1, in_features] float16 or bfloat16.
        codes: [out_features, in_features / 8, K] int8.
        codebooks: [K, 2^N, 1, 8], or [P, K, 2^N, 1, 8] for P equal row partitions; dtype of x.
        scales: [out_features, 1, 1, 1], dtype of x.
        bias: [out_features] or None.

    Returns:
        [1, out_features], dtype of x.
    """
    out = x.new_empty(1, codes.shape[0])
    if not out.numel() or not codes.numel():
        return out.zero_() if bias is None else out.copy_(bias)
    x, codes, codebooks, scales, bias = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
    if (codes.data_ptr() | codes.stride(0)) % _LANE_BYTES:
        codes = codes.clone(memory_format=torch.contiguous_format)
    books = partitioned(codebooks)
    partitions, num_books, size = books.shape[:3]
    rows, groups = codes.shape[0] // partitions, codes.shape[1]
    defines = (
        ("NUM_BOOKS", num_books),
        ("NBITS", size.bit_length() - 1),
        ("DTYPE_BF16", int(x.dtype == torch.bfloat16)),
    )
    with cuda_runtime.on_device(x.device):
        index = x.device.index
        kernel = cuda_runtime.load_kernel(_SOURCE, "partial_sums", defines, index, _SHARED_BYTES)
        processors, _ = cuda_runtime.device_limits(index)
        chunks = -(-groups * num_books // (32 * _LANE_BYTES))
        units = -(-rows // _ROWS_PER_UNIT)
        ranges = min(units, max(1, processors // (chunks * partitions)))
        partial = torch.empty(chunks, 1, codes.shape[0], dtype=torch.float32, device=x.device)
        values = (
            x.data_ptr(),
            codes.data_ptr(),
            books.data_ptr(),
            partial.data_ptr(),
            codes.stride(0),
            rows,
            groups,
            units // ranges,
            units % ranges,
        )
        kernel.launch((chunks, ranges, partitions), _THREADS, _SHARED_BYTES, _PARAMS.pack(*values))
        finish(partial, scales, bias, out)
    return out
