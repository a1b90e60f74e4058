"""Any scheme on a GPU with Triton: a few tokens from the codes, whole weights, and larger products piece by piece.

It serves what no CUDA kernel of this library does (long groups, many codebooks, up to 16 bits, out groups), and GPUs
without `cuda.core`. One token of 2x8g8 at 8192 x 28672 takes 172 us on one H100, as dense bfloat16 does; decoding the
weight for cuBLAS takes 395 us on top of the product, so more than three tokens take that road, gradients too, in a
workspace of at most 128 MiB. Tiles follow from the shapes; nothing is tuned at run time.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from aqlm_tensor.kernels import pieces, triton_kernels
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.kernels.registry import Problem

__all__ = ["MAX_TOKENS", "dequantize", "linear", "linear_input_grad", "supports"]

MAX_TOKENS = 3
_MAX_ENTRY = 64  # inputs of a group
_TILE_ROWS, _TILE_INPUTS = 8, 256  # of those tried the fastest for one token of 4x8g8 (one H100)
_BLOCKS_PER_PROCESSOR = 8  # worth splitting sums for


def supports(problem: Problem) -> str | None:
    """Why these kernels cannot run a problem, or None if they can."""
    scheme = problem.scheme
    if scheme.num_codebooks > 16 or scheme.in_group_size > _MAX_ENTRY:
        return f"needs at most 16 codebooks and groups of at most {_MAX_ENTRY} inputs, not {scheme}"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"computes in float32, float16 or bfloat16, not {problem.dtype}"
    if problem.device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available to torch"
    if problem.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < (8, 0):
            return f"needs compute capability 8.0 or later, not {capability[0]}.{capability[1]}"
    return None


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias``: x [M, I] to [M, O] in x's dtype, summed in float32.

    Args:
        x: [M, I].
        codes: [O / H, I / G, K].
        codebooks: [K, 2^N, H, G], or [P, K, 2^N, H, G] for P equal row partitions; dtype of x.
        scales: [O / H, 1, 1, 1], dtype of x.
        bias: [O] or None.
    """
    if x.shape[0] > MAX_TOKENS:
        return pieces.linear(x, codes, codebooks, scales, bias, _decode_into)
    books = partitioned(codebooks)
    partitions, num_books, size, out_group, in_group = books.shape
    out_features, in_groups = codes.shape[0] * out_group, codes.shape[1]
    out = x.new_empty(x.shape[0], out_features)
    if not out.numel() or not in_groups:
        return out.zero_() if bias is None else out.copy_(bias)
    x, codes, books, scales = _rows_contiguous(x), _codes(codes), books.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    tokens, rows = x.shape[0], codes.shape[0] // partitions
    width = _power_of_two(in_group)
    groups = max(1, _TILE_INPUTS // width)
    tiles = -(-rows // _TILE_ROWS)
    programs = tokens * partitions * out_group
    splits = _splits(tiles * programs, -(-in_groups // groups), x.device)
    stretch = -(-in_groups // (splits * groups)) * groups
    splits = -(-in_groups // stretch)
    sums = out if splits == 1 else x.new_empty(splits, tokens, out_features, dtype=torch.float32)
    kernel: Any = triton_kernels.decode_linear
    with _on(x.device):
        kernel[tiles, splits, programs](
            *(x, codes, books, scales, scales if bias is None else bias, sums),
            *(partitions, rows, in_groups, stretch, x.stride(0), codes.stride(0), out_features),
            K=num_books,
            SIZE=size,
            G=in_group,
            H=out_group,
            BO=_TILE_ROWS,
            BG=groups,
            BE=width,
            SPLIT=splits > 1,
            HAS_BIAS=bias is not None,
        )
        if splits > 1:
            finish: Any = triton_kernels.finish
            finish[-(-out_features // 256), tokens](
                *(sums, scales, scales if bias is None else bias, out, out_features, splits),
                H=out_group,
                BLOCK=256,
                HAS_BIAS=bias is not None,
            )
    return out


def linear_input_grad(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``grad @ W``, pieces of W's rows added in float32 in their order: grad [M, O] to [M, I]."""
    return pieces.linear_input_grad(grad, codes, codebooks, scales, _decode_into)


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The weight [O, I], each element rounded once to the codebooks' dtype."""
    return pieces.dequantize(codes, codebooks, scales, _decode_into)


def _decode_into(out: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> None:
    """Write the weight of codes with codebooks [P, K, 2^N, H, G] into the contiguous `out` [O, I]."""
    partitions, num_books, size, out_group, in_group = codebooks.shape
    codes, codebooks, scales = _codes(codes), codebooks.contiguous(), scales.contiguous()
    rows, in_groups = codes.shape[0] // partitions, codes.shape[1]
    width = _power_of_two(in_group)
    groups = min(max(1, 256 // width), _power_of_two(in_groups))
    block_rows = max(1, 2048 // (groups * width))
    grid = (-(-rows // block_rows), -(-in_groups // groups), partitions * out_group)
    decode: Any = triton_kernels.decode
    with _on(out.device):
        decode[grid](
            *(codes, codebooks, scales, out, rows, in_groups, codes.stride(0)),
            K=num_books,
            SIZE=size,
            G=in_group,
            H=out_group,
            BO=block_rows,
            BG=groups,
            BE=width,
        )


def _splits(blocks: int, steps: int, device: torch.device) -> int:
    """Into how many stretches to split the sums over in groups, so that all multiprocessors have work."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(steps, _BLOCKS_PER_PROCESSOR * processors // blocks))


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _codes(codes: Tensor) -> Tensor:
    """Codes whose rows are contiguous, but may lie farther apart than they are long."""
    books = codes.shape[2]
    return codes if codes.stride(2) == 1 and codes.stride(1) == books else codes.contiguous()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one; elsewhere (Triton's interpreter) do nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
