"""1 to 64 tokens in float32 on NVIDIA GPUs, without tensor cores: they would round the operands to TF32.

For schemes of up to eight codebooks of at most 256 entries over groups of 8 inputs. Meant for tests and for those who
train or evaluate in float32; nothing is tuned beyond reading the codes once for every 8 tokens.
"""

import struct

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.kernels.registry import Problem

__all__ = ["MAX_TOKENS", "linear", "supports"]

MAX_TOKENS = 64
_SOURCE = "lookup_float32.cu"
_PARAMS = struct.Struct("6Q2q3i4x")
_WARPS = 8
_TOKENS = 8


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None if it can."""
    if problem.op != "linear":
        return "computes linear only"
    if not 1 <= problem.rows <= MAX_TOKENS:
        return f"runs 1 to {MAX_TOKENS} rows of x, not {problem.rows}"
    return cuda_runtime.why_not_groups_of_8(problem, range(1, 9), (torch.float32,))


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias`` for the weight W that the codes stand for.

    Args:
        x: [tokens, in_features] float32, 1 to 64 tokens.
        codes: [out_features, in_features / 8, K] int8.
        codebooks: [K, 2^N, 1, 8], or [P, K, 2^N, 1, 8] for P equal row partitions.
        scales: [out_features, 1, 1, 1].
        bias: [out_features] or None.

    Returns:
        [tokens, out_features] float32.
    """
    out, done = cuda_runtime.empty_product(x, codes, bias)
    if done:
        return out
    x, codes, codebooks, scales, bias = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
    books = partitioned(codebooks)
    partitions, num_books, size = books.shape[:3]
    rows, groups = codes.shape[0] // partitions, codes.shape[1]
    shared_bytes = num_books * size * 32
    defines = (("NUM_BOOKS", num_books), ("NBITS", size.bit_length() - 1), ("TOKENS", _TOKENS))
    with cuda_runtime.on_device(x.device):
        kernel = cuda_runtime.load_kernel(_SOURCE, "lookup_float32", defines, x.device.index, shared_bytes)
        processors, _ = cuda_runtime.device_limits(x.device.index)
        grid = (min(-(-rows // _WARPS), 2 * processors), -(-x.shape[0] // _TOKENS), partitions)
        values = (
            x.data_ptr(),
            codes.data_ptr(),
            books.data_ptr(),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            codes.stride(0),
            x.shape[0],
            rows,
            groups,
        )
        kernel.launch(grid, _WARPS * 32, shared_bytes, _PARAMS.pack(*values))
    return out
