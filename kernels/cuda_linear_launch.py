"""What the CUDA kernels for few tokens share: the shape they plan for, their parameters, and adding split sums."""

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_tensor_map import SWIZZLE_64, SWIZZLE_128, tensor_map

__all__ = ["ROWS_PER_TILE", "Operands", "Shape", "finish", "launch", "operand_maps"]

ROWS_PER_TILE = 16
_PARAMS = struct.Struct("7Q2q8i")
_FINISH_PARAMS = struct.Struct("4Q2qi4x")
_FINISH_THREADS = 256

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # as `cuda_runtime.prepared` returns them


_X_BOX_INPUTS = 64
_SWIZZLES = {64: SWIZZLE_64, 128: SWIZZLE_128}


@dataclass(frozen=True)
class Shape:
    """What a plan depends on: codebooks, bits of a code, tokens, rows and groups of one of the equal row partitions."""

    books: int
    nbits: int
    tokens: int
    rows: int
    groups: int
    partitions: int


def operand_maps(x: Tensor, codes: Tensor, token_tiles: int, row_tiles: int, code_bytes: int) -> bytes:
    """Tensor maps of the codes and of x, for kernels that take both before their other parameters.

    Args:
        x: [tokens, in_features] of 16 bits an element, rows at multiples of 16 bytes, none of which overlap.
        codes: [out_features, groups, K] of one byte each, rows of whole pieces of 16 bytes at multiples of 16 bytes.
        token_tiles: a box of x has 8 times as many tokens, and 64 inputs.
        row_tiles: a box of codes has 16 times as many rows.
        code_bytes: of a row in a box of codes, 64 or 128.
    """
    row_bytes = codes.shape[1] * codes.shape[2]
    code_stride = codes.stride(0) if codes.shape[0] > 1 else row_bytes
    x_stride = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    code_box, x_box = (row_tiles * ROWS_PER_TILE, code_bytes), (8 * token_tiles, _X_BOX_INPUTS)
    return tensor_map(
        codes.data_ptr(), 1, (codes.shape[0], row_bytes), code_stride, code_box, _SWIZZLES[code_bytes]
    ) + tensor_map(x.data_ptr(), 2, (x.shape[0], x.shape[1]), 2 * x_stride, x_box, SWIZZLE_128)


def launch(
    kernel: cuda_runtime.Kernel,
    shape: Shape,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    out: Tensor,
    operands: Operands,
    *,
    superblock: int,
    slots: int = 0,
    maps: bytes = b"",
) -> None:
    """Write the product of operands into `out` [tokens, out_features] by a kernel that takes `LinearParams`.

    Runs on the current device. The struct is declared in ``cuda/codebooks.cuh``.

    Args:
        kernel: the kernel.
        shape: of the product.
        grid: row ranges, splits of the inputs, partitions; a second launch adds the sums of several splits.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        out: contiguous.
        operands: x, codes, codebooks, scales and bias.
        superblock: groups that are multiplied together; splits are whole numbers of them.
        slots: pieces of x that each part of a block keeps staged, or as the kernel says.
        maps: tensor maps, which precede the struct.
    """
    x, codes, codebooks, scales, bias = operands
    ranges, splits, _ = grid
    partial = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device) if splits > 1 else None
    tiles, superblocks = math.ceil(shape.rows / ROWS_PER_TILE), math.ceil(shape.groups / superblock)
    values = (
        x.data_ptr(),
        codes.data_ptr(),
        codebooks.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        x.stride(0),
        codes.stride(0) * codes.element_size(),
        shape.tokens,
        shape.rows,
        shape.groups,
        *divmod(tiles, ranges),
        *divmod(superblocks, splits),
        slots,
    )
    kernel.launch(grid, threads, shared_bytes, maps + _PARAMS.pack(*values), overlap=True)
    if partial is not None:
        finish(partial, scales, bias, out)


def finish(partial: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write ``partial.sum(0) * scales + bias`` into `out`, adding in order, on the current device.

    Args:
        partial: [splits, tokens, out_features] float32.
        scales: [out_features, 1, 1, 1], contiguous.
        bias: [out_features], contiguous, or None.
        out: [tokens, out_features], contiguous.
    """
    values = (
        partial.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.shape[1],
        out.numel(),
        partial.shape[0],
    )
    grid = (math.ceil(out.numel() / _FINISH_THREADS), 1, 1)
    kernel = _finish_kernel(out.dtype, out.device.index)
    kernel.launch(grid, _FINISH_THREADS, 0, _FINISH_PARAMS.pack(*values), overlap=True)


@functools.cache
def _finish_kernel(dtype: torch.dtype, index: int) -> cuda_runtime.Kernel:
    defines = (("DTYPE_BF16", int(dtype == torch.bfloat16)),)
    return cuda_runtime.load_kernel("finish_linear.cu", "finish_linear", defines, index)
