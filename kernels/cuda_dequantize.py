"""Decode whole weights on NVIDIA GPUs, and multiply many tokens by decoding a piece of the weight at a time.

Decoding is bound by memory: 8192 x 28672 from 2x8g8 takes 200 us on one H100, 2.6 TB/s read and written where a plain
copy moves 3.0. For more than some hundred tokens a product is bound by arithmetic, and cuBLAS on decoded pieces is hard
to beat; the pieces share one workspace (`aqlm_tensor.kernels.pieces`), so no dense weight is ever kept. Gradients with
respect to the input take the same road at every size. For schemes of up to eight codebooks over groups of a multiple of
8 inputs, up to 64; codebooks beyond shared memory (1x16) are gathered from L2.
"""

import functools
import importlib.util
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime, pieces
from aqlm_tensor.kernels.registry import Problem

__all__ = ["Plan", "dequantize", "linear", "linear_input_grad", "plan", "slower_than_next", "supports"]

_SOURCE = "dequantize.cu"
_PARAMS = struct.Struct("4Qq2i")
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_WARPS = 8
_COPIES_BYTES = 64 << 10  # of books per block with all copies: leaves two blocks or more on an sm_80 multiprocessor


def supports(problem: Problem) -> str | None:
    """Why these kernels cannot run a problem, or None if they can."""
    scheme = problem.scheme
    if scheme.in_group_size % 8 or scheme.in_group_size > 64 or scheme.out_group_size != 1:
        return f"needs groups of 8, 16, ... 64 inputs and 1 output, not {scheme}"
    if scheme.num_codebooks > 8:
        return f"needs at most 8 codebooks, not {scheme}"
    if problem.dtype not in _DTYPES:
        return f"computes in float32, float16 or bfloat16, not {problem.dtype}"
    return cuda_runtime.why_not_on(problem.device, problem.dtype)


def slower_than_next(problem: Problem) -> str | None:
    """Why the Triton kernel, which multiplies few tokens without decoding the weight first, is the better choice."""
    if problem.op != "linear" or importlib.util.find_spec("triton") is None:
        return None
    from aqlm_tensor.kernels import triton_linear

    if problem.rows > triton_linear.MAX_TOKENS or triton_linear.supports(problem) is not None:
        return None
    return f"slower than triton for 1 to {triton_linear.MAX_TOKENS} rows of x"


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The weight [O, I] that codes [O, I / G, K] stand for, each element rounded once to the codebooks' dtype.

    Args:
        codes: [O, I / G, K].
        codebooks: [K, 2^N, 1, G], or [P, K, 2^N, 1, G] for P equal row partitions.
        scales: [O, 1, 1, 1].
    """
    return pieces.dequantize(codes, codebooks, scales, _decode_into)


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias``, a piece of W's rows at a time: x [M, I] to [M, O]."""
    return pieces.linear(x, codes, codebooks, scales, bias, _decode_into)


def linear_input_grad(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``grad @ W``, pieces of W's rows added in float32 in their order: grad [M, O] to [M, I]."""
    return pieces.linear_input_grad(grad, codes, codebooks, scales, _decode_into)


@dataclass(frozen=True)
class Plan:
    """How weights of one scheme are decoded on a device.

    Attributes:
        defines: the kernel's compile-time constants, but for ALIGNED.
        shared_bytes: dynamic shared memory of a block; 0 if the codebooks stay in global memory.
        resident: blocks on a multiprocessor.
        pieces_per_turn: 16-byte pieces of a row that a warp decodes at once.
    """

    defines: tuple[tuple[str, int], ...]
    shared_bytes: int
    resident: int
    pieces_per_turn: int


@functools.cache
def plan(num_books: int, size: int, group: int, dtype: torch.dtype, limit: int) -> Plan:
    """The plan for a scheme on a device that gives a block up to `limit` bytes of shared memory."""
    book_bytes = num_books * size * group * dtype.itemsize
    copies = next((c for c in (8, 4, 2) if book_bytes * c <= _COPIES_BYTES), int(book_bytes <= limit))
    shared_bytes = book_bytes * copies
    unroll = 8 if num_books * (1 if size <= 256 else 2) <= 8 else 4
    defines = (
        ("NUM_BOOKS", num_books),
        ("NBITS", size.bit_length() - 1),
        ("GROUP", group),
        ("DTYPE", _DTYPES[dtype]),
        ("COPIES", copies),
        ("UNROLL", unroll),
    )
    # More blocks that share a multiprocessor write no faster, but gathers from L2 need many in flight (one H100).
    resident = 4 if not copies else 2 if 2 * (shared_bytes + 1024) <= limit else 1
    return Plan(defines, shared_bytes, resident, 32 * unroll)


@dataclass(frozen=True)
class _Launch:
    """Everything about a launch but the addresses: kernel, blocks, dynamic shared memory, parameters after them."""

    kernel: cuda_runtime.Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _launch(
    codes: torch.Size, code_stride: int, aligned: bool, codebooks: torch.Size, dtype: torch.dtype, index: int
) -> _Launch:
    """The launch for codes [O, I / G, K] with rows so far apart and codebooks [P, K, 2^N, 1, G]."""
    partitions, books, size, _, group = codebooks
    processors, limit = cuda_runtime.device_limits(index)
    chosen = plan(books, size, group, dtype, limit)
    defines = (*chosen.defines, ("ALIGNED", int(aligned)))
    rows, groups = codes[0] // partitions, codes[1]
    turns = rows * math.ceil(groups * group * dtype.itemsize / (16 * chosen.pieces_per_turn))
    blocks = min(math.ceil(turns / _WARPS), max(1, chosen.resident * processors // partitions))
    return _Launch(
        cuda_runtime.load_kernel(_SOURCE, "dequantize", defines, index, chosen.shared_bytes),
        (blocks, partitions, 1),
        chosen.shared_bytes,
        (code_stride, rows, groups),
    )


def _decode_into(out: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> None:
    """Write the weight of codes [O, I / G, K] with codebooks [P, K, 2^N, 1, G] into the contiguous `out` [O, I]."""
    if not codes.is_contiguous() and (codes.stride(2) != 1 or codes.stride(1) != codes.shape[2]):
        codes = codes.contiguous()
    if not codebooks.is_contiguous() or codebooks.data_ptr() & 15:
        codebooks = codebooks.clone(memory_format=torch.contiguous_format)
    if not scales.is_contiguous():
        scales = scales.contiguous()
    address, stride, device = codes.data_ptr(), codes.stride(0), out.device
    code_bytes = codes.shape[2] * codes.element_size()
    aligned = (address | stride * codes.element_size()) % code_bytes == 0
    with cuda_runtime.on_device(device):
        launch = _launch(codes.shape, stride, aligned, codebooks.shape, out.dtype, device.index)
        addresses = (address, codebooks.data_ptr(), scales.data_ptr(), out.data_ptr())
        params = _PARAMS.pack(*addresses, *launch.sizes)
        launch.kernel.launch(launch.grid, _WARPS * 32, launch.shared_bytes, params)
