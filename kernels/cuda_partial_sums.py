"""One to 64 tokens on NVIDIA GPUs with 132 KB of shared memory per block (A100, Hopper, data-centre Blackwell).

For one, two, four or eight codebooks of up to 256 entries over groups of 8, 16 or 32 inputs (2x8g8, 8x8g32, 4x8g16),
and for one token of one or two codebooks of up to 4096 entries (2x12g8). Each block tabulates the
products of its inputs with every codebook entry and then looks up 4 bytes per code (8 for four tokens, see
`cuda_few_tokens`, 2 for wide codes, see `cuda_one_token`) instead of 16 to 64, so that reading the codes is the bound
instead of the lookups. A second launch adds the blocks' partial sums in fixed order. Every four tokens more take that
time again, so for groups of 8 `cuda_lookup` is the better choice for more than four.
"""

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_few_tokens, cuda_lookup, cuda_one_token, cuda_runtime
from aqlm_tensor.kernels.registry import Problem
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["linear", "slower_than_next", "supports"]

_BOOKS, _GROUPS = (1, 2, 4, 8), (8, 16, 32)
_MOST_WIDE_BOOKS = 2  # of codes of more than 8 bits
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
    wide = scheme.nbits_per_codebook in cuda_one_token.WIDE_BITS
    reason = _why_not_wide(scheme, problem.rows) if wide else _why_not_scheme(scheme)
    if reason is not None:
        return reason
    lane_bytes, shared_bytes = cuda_few_tokens.LANE_BYTES, cuda_few_tokens.SHARED_BYTES
    if problem.rows == 1:
        variant = cuda_one_token.variant_of(scheme.nbits_per_codebook)
        lane_bytes, shared_bytes = variant.lane_bytes, variant.shared_bytes
    code_bytes = problem.in_features // scheme.in_group_size * scheme.num_codebooks * scheme.codes_dtype.itemsize
    if code_bytes % lane_bytes:
        return f"needs whole vectors of codes per lane, which {problem.in_features} inputs do not give"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, not {problem.dtype}"
    reason = cuda_runtime.why_not_on(problem.device, problem.dtype)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    _, limit = cuda_runtime.device_limits(torch.device(problem.device).index or 0)
    if limit < shared_bytes:
        return f"needs {shared_bytes} bytes of shared memory per block, this GPU has {limit}"
    return None


def _why_not_scheme(scheme: AQLMScheme) -> str | None:
    """Why there is no kernel for a scheme with codes of other than 9 to 12 bits."""
    if scheme.out_group_size != 1 or scheme.in_group_size not in _GROUPS:
        return f"needs groups of {', '.join(map(str, _GROUPS))} inputs and 1 output, not {scheme}"
    most_bits = max(cuda_one_token.WIDE_BITS)
    if scheme.num_codebooks not in _BOOKS or scheme.nbits_per_codebook > most_bits:
        return f"needs {', '.join(map(str, _BOOKS))} codebooks of at most {most_bits} bits, not {scheme}"
    if scheme.in_group_size > 8 * scheme.num_codebooks:
        return f"needs a codebook for every 8 inputs of a group, not {scheme}"
    return None


def _why_not_wide(scheme: AQLMScheme, rows: int) -> str | None:
    """Why there is no kernel for a scheme with codes of 9 to 12 bits and a number of rows of x."""
    if rows > 1:
        return f"runs 1 row of x for codes of more than 8 bits, not {rows}"
    if scheme.out_group_size != 1 or scheme.in_group_size != 8 or scheme.num_codebooks > _MOST_WIDE_BOOKS:
        return f"needs 1 or {_MOST_WIDE_BOOKS} codebooks over groups of 8 inputs and 1 output, not {scheme}"
    return None


def slower_than_next(problem: Problem) -> str | None:
    """Why a kernel for more tokens, or one that starts faster, is the better choice where nothing was measured."""
    if problem.scheme.nbits_per_codebook in cuda_one_token.WIDE_BITS:
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
    out, done = cuda_runtime.empty_product(x, codes, bias)
    if done:
        return out
    operands = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
    with cuda_runtime.on_device(x.device):
        (cuda_one_token if x.shape[0] == 1 else cuda_few_tokens).run(operands, out)
    return out
