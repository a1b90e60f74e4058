"""The CPU kernel, compiled with Numba: every scheme, every float dtype, the same bits for any number of threads.

Few rows of x go through tables of partial dot products (numba_lookup) where codes have at most 8 bits and the weight
enough rows to repay the tables, else they are multiplied with entries as these are gathered (numba_gather); more rows
go through blocks of the weight decoded into cache (numba_product). The gradient to x has the first and the last of
these ways (numba_scatter, numba_product). `method` and `grad_method` choose from the problem's sizes alone.

What it costs: the first call of each kind in a process loads a compiled function from Numba's cache on disk
(milliseconds; `__pycache__` of this package, or the user's cache directory where that is read-only); the first ever on
a machine compiles it, one to two seconds each. The lookup kernel keeps a repacked copy of the codes, as large as they
are, until the codes are freed. float16 and bfloat16 operands are widened as they are read; sums are in float32.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from aqlm_tensor.kernels import numba_codes
from aqlm_tensor.kernels.numba_bytes import can_permute
from aqlm_tensor.kernels.numba_decode import LARGE_BOOKS, Weight, decode_rows
from aqlm_tensor.kernels.numba_gather import TOKENS, gather_linear
from aqlm_tensor.kernels.numba_lookup import PERMUTE_TOKENS, lookup_linear
from aqlm_tensor.kernels.numba_parallel import as_float32
from aqlm_tensor.kernels.numba_product import product, product_input_grad
from aqlm_tensor.kernels.numba_scatter import LANES as SCATTER_LANES
from aqlm_tensor.kernels.numba_scatter import scatter_input_grad
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.kernels.registry import Problem

__all__ = ["dequantize", "grad_method", "invalidate", "linear", "linear_input_grad", "method", "supports"]

Method = Literal["lookup", "gather", "product"]
GradMethod = Literal["scatter", "product"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEQUANTIZE_ELEMENTS = 1 << 22  # decoded at a time where the result is not float32: 16 MB

invalidate = numba_codes.invalidate


def supports(problem: Problem) -> str | None:
    """None where this kernel can run the problem, otherwise the reason why not."""
    if problem.device.type != "cpu":
        return f"runs on cpu, not on {problem.device.type}"
    if problem.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {problem.dtype}"
    return None


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, I] times the transposed weight plus bias [O]: [M, O] in x's dtype, accumulated in float32."""
    bias = None if bias is None else as_float32(bias)
    if x.shape[0] == 0 or codes.numel() == 0:
        y = x.new_zeros(x.shape[0], codes.shape[0] * codebooks.shape[-2], dtype=torch.float32)
        return (y if bias is None else y + bias).to(x.dtype)
    way = method(x.shape[0], codes.shape, codebooks.shape)
    if way == "lookup":
        y = lookup_linear(x, codes, partitioned(codebooks), scales, bias)
    else:
        multiply = gather_linear if way == "gather" else product
        y = multiply(x, Weight.of(codes, codebooks, scales), bias)
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def linear_input_grad(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Grad [M, O] times the weight: [M, I] in grad's dtype, accumulated in float32."""
    if grad.shape[0] == 0 or codes.numel() == 0:
        return grad.new_zeros(grad.shape[0], codes.shape[1] * codebooks.shape[-1])
    if grad_method(grad.shape[0], codes.shape, codebooks.shape) == "scatter" and codebooks.isfinite().all():
        x_grad = scatter_input_grad(grad, codes, partitioned(codebooks), scales)
    else:
        x_grad = product_input_grad(grad, Weight.of(codes, codebooks, scales))
    return x_grad.to(grad.dtype).contiguous()


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The dense weight [O, I] in the codebooks' dtype, each element rounded once from float32."""
    weight = Weight.of(codes, codebooks, scales)
    out_features, in_features = weight.shape
    if codebooks.dtype == torch.float32:
        return decode_rows(weight, 0, out_features)
    out = codebooks.new_empty(out_features, in_features)
    step = max(1, _DEQUANTIZE_ELEMENTS // max(1, in_features))
    for start in range(0, out_features, step):
        out[start : start + step] = decode_rows(weight, start, min(start + step, out_features))
    return out


@functools.lru_cache(maxsize=1024)
def method(rows: int, codes_shape: tuple[int, ...], books_shape: tuple[int, ...]) -> Method:
    """The way that is expected to be fastest for so many rows of x."""
    num_codebooks, size, _, group = books_shape[-4:]
    codes, table = _lookups(codes_shape, books_shape)
    gather = _GATHER_LARGE if num_codebooks * size * group > LARGE_BOOKS else _GATHER

    def by_gather(tokens: int) -> float:
        return -(-group // 8) * codes * (gather + (0.4 + 0.2 * tokens) / num_codebooks)

    lookup_costs = _LOOKUP_COSTS | _PERMUTE_COSTS if can_permute() else _LOOKUP_COSTS

    def by_lookup(tokens: int) -> float:
        per_lookup, per_product = lookup_costs[tokens]
        return per_lookup * codes + per_product * table

    costs: dict[Method, float] = {
        "gather": _swept(rows, TOKENS, by_gather),
        "product": _product_cost(rows, codes_shape, books_shape),
    }
    if size <= 256:
        costs["lookup"] = _LOOKUP_CALL + _swept(rows, tuple(sorted(lookup_costs)), by_lookup)
    return min(costs, key=costs.__getitem__)


@functools.lru_cache(maxsize=1024)
def grad_method(rows: int, codes_shape: tuple[int, ...], books_shape: tuple[int, ...]) -> GradMethod:
    """The way that is expected to be fastest for so many rows of the gradient."""
    if books_shape[-3] > 256:
        return "product"
    codes, table = _lookups(codes_shape, books_shape)

    def by_scatter(tokens: int) -> float:
        per_lookup, per_product = _SCATTER_COSTS[tokens]
        return per_lookup * codes + per_product * table

    cost = _LOOKUP_CALL + _swept(rows, SCATTER_LANES, by_scatter)
    return "scatter" if cost < _product_cost(rows, codes_shape, books_shape) else "product"


def _lookups(codes_shape: tuple[int, ...], books_shape: tuple[int, ...]) -> tuple[int, int]:
    """How many codes there are to look up, and how many multiplications in all tables of partial products."""
    partitions, num_codebooks, size, out_group, group = (1, *books_shape)[-5:]
    columns = codes_shape[1] * num_codebooks * out_group
    return codes_shape[0] * columns, columns * partitions * size * group


def _product_cost(rows: int, codes_shape: tuple[int, ...], books_shape: tuple[int, ...]) -> float:
    """The cost of decoding the weight and multiplying it."""
    num_codebooks, _, out_group, group = books_shape[-4:]
    weights = codes_shape[0] * out_group * codes_shape[1] * group
    decode = _DECODE_COST * (1 + num_codebooks / 2) / min(group, 8)
    return weights * (decode + _PRODUCT_COST * (-(-rows // 6) * 6))


def _swept(rows: int, widths: tuple[int, ...], cost: Callable[[int], float]) -> float:
    """The cost of passes over the codes that serve up to widths[-1] rows of x each."""
    whole, rest = divmod(rows, widths[-1])
    last = next(width for width in widths if width >= rest)
    return whole * cost(widths[-1]) + (cost(last) if rest else 0.0)


# The cost model, in nanoseconds, fitted to one core of an AMD EPYC (Zen 4). Only ratios matter, and they differ little
# between processors because every way is bound by the caches and the vector units; being constants, they make the
# same choice, and so the same bits, in every process of a machine.
_LOOKUP_CALL = 15_000.0  # more than the others need before they begin
_LOOKUP_COSTS = {  # lanes: per lookup, per entry and input of a table
    1: (0.28, 0.06),
    4: (0.35, 0.20),
    8: (0.45, 0.22),
    16: (0.70, 0.28),
}
_PERMUTE_COSTS = {tokens: (0.11 * tokens, 0.06 * tokens) for tokens in range(1, PERMUTE_TOKENS + 1)}
_SCATTER_COSTS = {1: (0.25, 0.06), 4: (0.5, 0.2), 8: (0.55, 0.22), 16: (1.25, 0.28)}  # lanes: as for lookups
_GATHER = 0.3  # per code and 8 floats
_GATHER_LARGE = 1.0  # the same from books that the second-level cache does not hold
_DECODE_COST = 1.1  # per group of at most 8, half of it again for each codebook
_PRODUCT_COST = 0.0185  # per multiplication and addition
