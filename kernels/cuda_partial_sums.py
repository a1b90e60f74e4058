"""One to four tokens on NVIDIA GPUs with 132 KB of shared memory per block (A100, Hopper, data-centre Blackwell).

For 1x8g8 and 2x8g8 (and fewer bits). Each block tabulates the products of its inputs with every codebook entry and then
looks up 4 bytes per code (8 for two to four tokens, see `cuda_few_tokens`) instead of 16, so that reading the codes is
the bound instead of the lookups; see `cuda/partial_sums.cu`. A second launch adds the blocks' partial sums in fixed
order.
"""

import struct

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_few_tokens, cuda_lookup, cuda_runtime
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
    if problem.rows > cuda_few_tokens.MAX_TOKENS:
        return f"runs 1 to {cuda_few_tokens.MAX_TOKENS} rows of x, not {problem.rows}"
    if problem.scheme.num_codebooks > 2:
        return f"needs 1 or 2 codebooks, not {problem.scheme}"
    lane_bytes = _LANE_BYTES if problem.rows == 1 else cuda_few_tokens.LANE_BYTES
    if problem.in_features % (8 * lane_bytes // problem.scheme.num_codebooks):
        return f"needs whole vectors of codes per lane, which {problem.in_features} inputs do not give"
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    _, limit = cuda_runtime.device_limits(torch.device(problem.device).index or 0)
    if limit < cuda_few_tokens.SHARED_BYTES:
        return f"needs {cuda_few_tokens.SHARED_BYTES} bytes of shared memory per block, this GPU has {limit}"
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
        x: [tokens, in_features], 1 to 4 tokens, float16 or bfloat16.
        codes: [out_features, in_features / 8, K] int8.
        codebooks: [K, 2^N, 1, 8], or [P, K, 2^N, 1, 8] for P equal row partitions; dtype of x.
        scales: [out_features, 1, 1, 1], dtype of x.
        bias: [out_features] or None.

    Returns:
        [tokens, out_features], dtype of x.
    """
    out = x.new_empty(x.shape[0], codes.shape[0])
    if not out.numel() or not codes.numel():
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    operands = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
    with cuda_runtime.on_device(x.device):
        if x.shape[0] == 1:
            _run_one(*operands, out)
        else:
            cuda_few_tokens.run(*operands, out)
    return out


def _run_one(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the product of prepared operands with one row of x into `out`, on the current device."""
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
    kernel.launch((chunks, ranges, partitions), _THREADS, _SHARED_BYTES, _PARAMS.pack(*values), overlap=True)
    finish(partial, scales, bias, out)
