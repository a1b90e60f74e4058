"""1 to 64 tokens on NVIDIA GPUs for one codebook of up to 65536 entries in 8-bit integers: fast, less accurate.

The product of `aqlm_tensor.kernels.cuda_sliced_codebook` with the copy of the codebook that
`aqlm_tensor.kernels.int8_codebooks` makes at the first use: with room for all entries of a slice no lookup is in vain.
With the copied entries the product is as exact as any other kernel's; what they miss of the stored ones is said there.
Since it changes results, this kernel runs only where the option `int8_codebooks` is allowed, or forced by name.

Of 8192x28672 in 1x16g8 on one H200: 90 us at 1 to 8 tokens, 101 at 16 and 151 at 64, where the stored codebook takes
125 to 132, 143 and 211.
"""

from torch import Tensor

from aqlm_tensor.kernels import cuda_gather_gemm, cuda_runtime, cuda_sliced_codebook, int8_codebooks
from aqlm_tensor.kernels.registry import Problem

__all__ = ["invalidate", "linear", "slower_than_next", "supports"]

_MOST_TOKENS_OF_16 = 32  # of groups of 16 inputs: 177 us at 64 tokens of 8192 x 28672, cuda_gather_gemm 140 (one H100)


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None if it can."""
    return cuda_sliced_codebook.supports(problem)


def slower_than_next(problem: Problem) -> str | None:
    """Why the stored codebook is the better choice even where the option is allowed."""
    if problem.scheme.in_group_size == 8 or problem.rows <= _MOST_TOKENS_OF_16:
        return None
    if cuda_gather_gemm.supports(problem) is not None:
        return None
    return f"slower than cuda_gather_gemm for groups of 16 inputs and more than {_MOST_TOKENS_OF_16} rows of x"


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias`` for the weight W that the codes stand for with rounded codebooks.

    Args:
        x: [tokens, in_features], 1 to 64 tokens, float16 or bfloat16.
        codes: [out_features, in_features / G, 1] int16.
        codebooks: [1, 2^N, 1, G], or [P, 1, 2^N, 1, G] for P equal row partitions; G 8 or 16; dtype of x.
        scales: [out_features, 1, 1, 1], dtype of x.
        bias: [out_features] or None.

    Returns:
        [tokens, out_features], dtype of x.

    Raises:
        ValueError: if an entry of the codebooks is NaN or infinite.
        RuntimeError: while a CUDA graph is captured, if the codebooks were not rounded before.
    """
    out, done = cuda_runtime.empty_product(x, codes, bias)
    if done:
        return out
    shape = cuda_sliced_codebook.shape_of(x, codes, codebooks)
    with cuda_runtime.on_device(x.device):
        rounded = int8_codebooks.quantized(codebooks)
        plan = cuda_sliced_codebook.choose_plan(shape, *cuda_runtime.device_limits(x.device.index), int8=True)
        operands = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
        cuda_sliced_codebook.run_plan(shape, plan, out, *operands, rounded)
    return out


def invalidate(codebooks: Tensor) -> None:
    """Round these codebooks anew when they are used next."""
    int8_codebooks.invalidate(codebooks)
