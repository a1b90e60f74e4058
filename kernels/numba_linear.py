"""The CPU kernel, compiled with Numba: every scheme, every float dtype, the same bits for any number of threads.

Few rows of x go through tables of partial dot products (numba_lookup), which needs codes of at most 8 bits; more rows,
and wider codes, through blocks of the weight decoded into cache (numba_product). `lookup_pays` chooses between them
from the problem's sizes alone.

What it costs: the first call of each kind in a process loads a compiled function from Numba's cache on disk
(milliseconds; `__pycache__` of this package, or the user's cache directory where that is read-only); the first ever on
a machine compiles it, one to two seconds each. The lookup kernel keeps a repacked copy of the codes, as large as they
are, until the codes are freed. float16 and bfloat16 operands are widened first; accumulation is in float32.
"""

import functools

import torch
from torch import Tensor

from aqlm_tensor.kernels.registry import Problem

__all__ = ["dequantize", "invalidate", "linear", "linear_input_grad", "lookup_pays", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEQUANTIZE_ELEMENTS = 1 << 22  # decoded at a time where the result is not float32: 16 MB


def supports(problem: Problem) -> str | None:
    """None where this kernel can run the problem, otherwise the reason why not."""
    if problem.device.type != "cpu":
        return f"runs on cpu, not on {problem.device.type}"
    if problem.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {problem.dtype}"
    return None


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, I] times the transposed weight plus bias [O]: [M, O] in x's dtype, accumulated in float32."""
    from aqlm_tensor.kernels.numba_decode import Weight
    from aqlm_tensor.kernels.numba_lookup import lookup_linear
    from aqlm_tensor.kernels.numba_parallel import as_float32
    from aqlm_tensor.kernels.numba_product import product

    bias = None if bias is None else as_float32(bias)
    if x.shape[0] == 0 or codes.numel() == 0:
        y = x.new_zeros(x.shape[0], codes.shape[0] * codebooks.shape[-2], dtype=torch.float32)
        return (y if bias is None else y + bias).to(x.dtype)
    if lookup_pays(x.shape[0], tuple(codes.shape), tuple(codebooks.shape)):
        books = codebooks if codebooks.dim() == 5 else codebooks.unsqueeze(0)
        return lookup_linear(x, codes, books, scales, bias).to(x.dtype)
    return product(x, Weight.of(codes, codebooks, scales), bias).to(x.dtype)


def linear_input_grad(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Grad [M, O] times the weight: [M, I] in grad's dtype, accumulated in float32."""
    from aqlm_tensor.kernels.numba_decode import Weight
    from aqlm_tensor.kernels.numba_product import product_input_grad

    if grad.shape[0] == 0 or codes.numel() == 0:
        return grad.new_zeros(grad.shape[0], codes.shape[1] * codebooks.shape[-1])
    return product_input_grad(grad, Weight.of(codes, codebooks, scales)).to(grad.dtype).contiguous()


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The dense weight [O, I] in the codebooks' dtype, each element rounded once from float32."""
    from aqlm_tensor.kernels.numba_decode import Weight, decode_rows

    weight = Weight.of(codes, codebooks, scales)
    out_features, in_features = weight.shape
    if codebooks.dtype == torch.float32:
        return decode_rows(weight, 0, out_features)
    out = codebooks.new_empty(out_features, in_features)
    step = max(1, _DEQUANTIZE_ELEMENTS // max(1, in_features))
    for start in range(0, out_features, step):
        out[start : start + step] = decode_rows(weight, start, min(start + step, out_features))
    return out


def invalidate(codes: Tensor) -> None:
    """Forget the repacked copies of the storage that these codes lie in."""
    from aqlm_tensor.kernels.numba_codes import invalidate

    invalidate(codes)


@functools.lru_cache(maxsize=1024)
def lookup_pays(rows: int, codes_shape: tuple[int, ...], books_shape: tuple[int, ...]) -> bool:
    """Whether tables are expected to be faster than blocks of the decoded weight for so many rows of x."""
    partitions, num_codebooks, size, out_group, group = (1, *books_shape)[-5:]
    if size > 256:
        return False
    out_groups, columns = codes_shape[0], codes_shape[1] * num_codebooks
    lookup = 0.0
    for start in range(0, rows, _SWEEP_TOKENS):
        per_lookup, per_product = next(
            cost for lanes, *cost in _SWEEP_COSTS if lanes >= min(rows - start, _SWEEP_TOKENS)
        )
        lookup += columns * out_group * (out_groups * per_lookup + partitions * size * group * per_product)
    weights = out_groups * out_group * codes_shape[1] * group
    product = weights * (_DECODE_COST * (1 + num_codebooks / 2) / min(group, 8) + _PRODUCT_COST * (-(-rows // 6) * 6))
    return lookup <= product


# The cost model, in nanoseconds, fitted to one core of an AMD EPYC (Zen 4) at 4096 x 11008. Only ratios matter, and
# they differ little between processors because both sides are bound by the L1 cache and the vector units; being
# constants, they make the same choice, and so the same bits, in every process.
_SWEEP_TOKENS = 16
_SWEEP_COSTS = (  # lanes, per lookup, per entry and input of a table
    (1, 0.20, 0.06),
    (4, 0.31, 0.20),
    (8, 0.38, 0.22),
    (16, 0.60, 0.28),
)
_DECODE_COST = 0.8  # per group of at most 8, half of it again for each codebook
_PRODUCT_COST = 0.0185  # per multiplication and addition
