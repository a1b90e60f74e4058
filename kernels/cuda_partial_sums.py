"""One to 64 tokens on NVIDIA GPUs with 132 KB of shared memory per block (A100, Hopper, data-centre Blackwell).

For one, two, four or eight codebooks of up to 256 entries over groups of 8, 16 or 32 inputs (2x8g8, 8x8g32, 4x8g16),
and for one token of one or two codebooks of up to 4096 entries (2x12g8, see `cuda_wide_sums`). Each block tabulates the
products of its inputs with every codebook entry and then looks up 4 bytes per code (8 for four tokens, see
`cuda_few_tokens`) instead of 16 to 64, so that reading the codes is the bound instead of the lookups; see
`cuda/partial_sums.cu`. A second launch adds the blocks' partial sums in fixed order. Every four tokens more take that
time again, so for groups of 8 `cuda_lookup` is the better choice for more than four.
"""

import struct

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_few_tokens, cuda_lookup, cuda_runtime, cuda_wide_sums
from aqlm_tensor.kernels.cuda_linear_launch import finish
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.kernels.registry import Problem
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["linear", "slower_than_next", "supports"]

_SOURCE = "partial_sums.cu"
_PARAMS = struct.Struct("4Qq4i")
_SHARED_BYTES = 128 << 10
_THREADS = 512
_LANE_BYTES = 4  # codes that a lane loads at once from one row
_ROWS_PER_UNIT = 8
_BOOKS, _GROUPS = (1, 2, 4, 8), (8, 16, 32)
_MOST_ENTRIES = 256  # beyond, codes have 16 bits
# The second launch costs about 3 us: 2x8g8 takes 7.9 us against the lookup kernel's 7.5 at 4096 x 4096, and 12.3
# against 16.4 at 4096 x 14336 (bfloat16, one H100).
_LARGE_WEIGHTS = 1 << 25
_MOST_TOKENS = 48  # of 8x8g32: 468 us against 448 of `cuda_dequantize` for 64 at 8192 x 28672 (bfloat16, one H200)


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None if it can."""
    if problem.op != "linear":
        return "computes linear only"
    if not 1 <= problem.rows <= cuda_few_tokens.MAX_TOKENS:
        return f"runs 1 to {cuda_few_tokens.MAX_TOKENS} rows of x, not {problem.rows}"
    scheme = problem.scheme
    wide = scheme.nbits_per_codebook in cuda_wide_sums.BITS
    reason = _why_not_wide(scheme, problem.rows) if wide else _why_not_scheme(scheme)
    if reason is not None:
        return reason
    few_bytes = _LANE_BYTES if problem.rows == 1 else cuda_few_tokens.LANE_BYTES
    lane_bytes = cuda_wide_sums.LANE_BYTES // 2 if wide else few_bytes
    if problem.in_features // scheme.in_group_size * scheme.num_codebooks % lane_bytes:
        return f"needs whole vectors of codes per lane, which {problem.in_features} inputs do not give"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, not {problem.dtype}"
    reason = cuda_runtime.why_not_on(problem.device, problem.dtype)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    _, limit = cuda_runtime.device_limits(torch.device(problem.device).index or 0)
    needed = cuda_wide_sums.shared_bytes(scheme.nbits_per_codebook) if wide else cuda_few_tokens.SHARED_BYTES
    if limit < needed:
        return f"needs {needed} bytes of shared memory per block, this GPU has {limit}"
    return None


def _why_not_scheme(scheme: AQLMScheme) -> str | None:
    """Why there is no kernel for a scheme with codes of other than 9 to 12 bits."""
    if scheme.out_group_size != 1 or scheme.in_group_size not in _GROUPS:
        return f"needs groups of {', '.join(map(str, _GROUPS))} inputs and 1 output, not {scheme}"
    if scheme.num_codebooks not in _BOOKS or scheme.nbits_per_codebook > max(cuda_wide_sums.BITS):
        return f"needs {', '.join(map(str, _BOOKS))} codebooks of at most {max(cuda_wide_sums.BITS)} bits, not {scheme}"
    if scheme.in_group_size > 8 * scheme.num_codebooks:
        return f"needs a codebook for every 8 inputs of a group, not {scheme}"
    return None


def _why_not_wide(scheme: AQLMScheme, rows: int) -> str | None:
    """Why there is no kernel for a scheme with codes of 9 to 12 bits and a number of rows of x."""
    if rows > 1:
        return f"runs 1 row of x for codes of more than 8 bits, not {rows}"
    if scheme.out_group_size != 1 or scheme.in_group_size != 8 or scheme.num_codebooks > cuda_wide_sums.MAX_BOOKS:
        return f"needs 1 or {cuda_wide_sums.MAX_BOOKS} codebooks over groups of 8 inputs and 1 output, not {scheme}"
    return None


def slower_than_next(problem: Problem) -> str | None:
    """Why a kernel for more tokens, or one that starts faster, is the better choice where nothing was measured."""
    if problem.scheme.nbits_per_codebook in cuda_wide_sums.BITS:
        return None
    if cuda_lookup.supports(problem) is not None:
        return None if problem.rows <= _MOST_TOKENS else f"slower than decoding for more than {_MOST_TOKENS} rows of x"
    if problem.rows > cuda_few_tokens.TILE_TOKENS:
        return f"slower than cuda_lookup for more than {cuda_few_tokens.TILE_TOKENS} rows of x"
    weights = problem.out_features * problem.in_features
    if weights >= _LARGE_WEIGHTS:
        return None
    return f"slower than cuda_lookup below {_LARGE_WEIGHTS} weights, this layer has {weights}"


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias`` for the weight W that the codes stand for.

    Args:
        x: [tokens, in_features], 1 to 64 tokens, float16 or bfloat16.
        codes: [out_features, in_features / G, K] int8, int16 for more than 8 bits.
        codebooks: [K, 2^N, 1, G], or [P, K, 2^N, 1, G] for P equal row partitions; dtype of x.
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
        if codebooks.shape[-3] > _MOST_ENTRIES:
            cuda_wide_sums.run(*operands, out)
        elif x.shape[0] == 1:
            _run_one(*operands, out)
        else:
            cuda_few_tokens.run(*operands, out)
    return out


def _run_one(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the product of prepared operands with one row of x into `out`, on the current device."""
    if (codes.data_ptr() | codes.stride(0)) % _LANE_BYTES:
        codes = codes.clone(memory_format=torch.contiguous_format)
    books = partitioned(codebooks)
    partitions, num_books, size, _, group = books.shape
    rows, groups = codes.shape[0] // partitions, codes.shape[1]
    defines = cuda_few_tokens.defines(num_books, size.bit_length() - 1, group, x.dtype)
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
