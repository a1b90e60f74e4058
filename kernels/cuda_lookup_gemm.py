"""Many tokens on Hopper GPUs: weights looked up from shared memory into tensor-core operands, never stored.

For 1x8g8, 2x8g8 and 4x8g8. Decoding a weight for cuBLAS costs the time to write and read it, whatever the number of
tokens; here every weight is decoded once for each tile of 128 or 256 tokens, beside the products of another warpgroup.
`cuda/lookup_gemm.cu` describes the kernel. It needs a copy of x in another order. Compute capability 9.0 only.
"""

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import Shape, finish
from aqlm_tensor.kernels.registry import Problem

__all__ = ["Plan", "choose_plan", "linear", "plan_defines", "supports"]

_SOURCE = "lookup_gemm.cu"
_PARAMS = struct.Struct("7Qq5i4x")
_ARRANGE_PARAMS = struct.Struct("2Qq3i4x")
_ARRANGE_THREADS = 256
_THREADS = 384
_CLUSTER = 2
_TILE_ROWS = 128
_LANE_BYTES = 16  # codes that a lane loads at once from one row
_COPIES = 8
_STEPS = 2  # of one slot of the ring
_LEAST_SUPERBLOCKS, _MOST_SPLITS = 4, 8  # a second launch adds the splits' sums
_RING_BYTES, _RING_BYTES_FOUR_BOOKS, _MOST_SLOTS = 160 << 10, 96 << 10, 8


@dataclass(frozen=True)
class Plan:
    """How one launch is shaped: tiles of 8 tokens that are multiplied at once, blocks, dynamic shared memory."""

    token_tiles: int
    grid: tuple[int, int, int]
    shared_bytes: int


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None if it can."""
    if problem.op != "linear":
        return "computes linear only"
    if problem.rows < 1:
        return "needs at least one row of x"
    reason = cuda_runtime.why_not_groups_of_8(problem, (1, 2, 4), (torch.float16, torch.bfloat16))
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(problem.device) != (9, 0):
        return "needs compute capability 9.0 (Hopper)"
    if problem.in_features // 8 * problem.scheme.num_codebooks % _LANE_BYTES:
        return f"needs whole vectors of codes per lane, which {problem.in_features} inputs do not give"
    return None


@functools.lru_cache(maxsize=4096)
def choose_plan(shape: Shape, processors: int) -> Plan:
    """The launch shape for a shape of any number of tokens and at least one group.

    The inputs are split where tiles alone would leave at least half of the GPU idle.
    """
    token_tiles = 16 if shape.tokens <= 128 else 32
    slot = _STEPS * 512 * token_tiles
    ring = _RING_BYTES if shape.books < 4 else _RING_BYTES_FOUR_BOOKS
    slots = min(ring // slot, _MOST_SLOTS)
    shared_bytes = math.ceil(shape.books / 2) * (32 * _COPIES << shape.nbits) + slots * (slot + 16) + 16
    tiles = math.ceil(shape.rows / (_CLUSTER * _TILE_ROWS)) * math.ceil(shape.tokens / (8 * token_tiles))
    clusters = max(1, processors // (_CLUSTER * shape.partitions))
    superblocks = math.ceil(shape.groups * shape.books / (4 * _LANE_BYTES))
    splits = max(1, min(clusters // tiles, superblocks // _LEAST_SUPERBLOCKS, _MOST_SPLITS))
    return Plan(
        token_tiles, (_CLUSTER * min(tiles, max(1, clusters // splits)), splits, shape.partitions), shared_bytes
    )


def plan_defines(shape: Shape, plan: Plan, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The compile-time constants of the kernel for a plan."""
    return (
        ("NUM_BOOKS", shape.books),
        ("NBITS", shape.nbits),
        ("DTYPE_BF16", int(dtype == torch.bfloat16)),
        ("TOKEN_TILES", plan.token_tiles),
        ("GROUPS_PER_LANE", _LANE_BYTES // shape.books),
        ("COPIES", _COPIES),
    )


@dataclass(frozen=True)
class _Launch:
    """Everything about the launches for a shape but the addresses.

    Attributes:
        arrange: the kernel that copies x in the order in which it is consumed.
        arrange_grid: its blocks.
        arrange_sizes: its parameters after the addresses and x's stride.
        arranged: elements of the copy.
        multiply: the kernel that multiplies.
        plan: how it is launched.
        sizes: its parameters after the addresses and the codes' stride.
    """

    arrange: cuda_runtime.Kernel
    arrange_grid: tuple[int, int, int]
    arrange_sizes: tuple[int, ...]
    arranged: int
    multiply: cuda_runtime.Kernel
    plan: Plan
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _launch(tokens: int, codes: torch.Size, codebooks: torch.Size, dtype: torch.dtype, index: int) -> _Launch:
    """The launches for x of so many rows; looked up at every call, since planning takes longer than small products."""
    partitions, books, size = (1, *codebooks)[-5:-2]
    rows, groups = codes[0] // partitions, codes[1]
    shape = Shape(books, size.bit_length() - 1, tokens, rows, groups, partitions)
    plan = choose_plan(shape, cuda_runtime.device_limits(index)[0])
    defines = plan_defines(shape, plan, dtype)
    superblocks = math.ceil(groups * books / (4 * _LANE_BYTES))
    at_once, tiles = 8 * plan.token_tiles, math.ceil(tokens / (8 * plan.token_tiles))
    blocks = math.ceil(at_once * superblocks * _LANE_BYTES // (books * _STEPS) / _ARRANGE_THREADS)
    return _Launch(
        cuda_runtime.load_kernel(_SOURCE, "arrange_x", defines, index),
        (blocks, tiles, 1),
        (tokens, groups, superblocks),
        tiles * superblocks * 4 * _LANE_BYTES // books * at_once * 8,
        cuda_runtime.load_kernel(_SOURCE, "lookup_gemm", defines, index, plan.shared_bytes),
        plan,
        (tokens, rows, groups, *divmod(superblocks, plan.grid[1])),
    )


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias`` for the weight W that the codes stand for.

    Args:
        x: [tokens, in_features] float16 or bfloat16.
        codes: [out_features, in_features / 8, K] int8; in_features * K a multiple of 128.
        codebooks: [K, 2^N, 1, 8], or [P, K, 2^N, 1, 8] for P equal row partitions; dtype of x.
        scales: [out_features, 1, 1, 1], dtype of x.
        bias: [out_features] or None.

    Returns:
        [tokens, out_features], dtype of x.
    """
    tokens, out_features = x.shape[0], codes.shape[0]
    out, done = cuda_runtime.empty_product(x, codes, bias)
    if done:
        return out
    x, codes, codebooks, scales, bias = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
    code_stride = codes.stride(0)
    if (codes.data_ptr() | code_stride) % _LANE_BYTES:
        codes = codes.clone(memory_format=torch.contiguous_format)
        code_stride = codes.stride(0)
    device = x.device
    with cuda_runtime.on_device(device):
        launch = _launch(tokens, codes.shape, codebooks.shape, x.dtype, device.index)
        plan, splits = launch.plan, launch.plan.grid[1]
        arranged = x.new_empty(launch.arranged)
        partial = x.new_empty(splits, tokens, out_features, dtype=torch.float32) if splits > 1 else None
        addresses = (x.data_ptr(), arranged.data_ptr())
        params = _ARRANGE_PARAMS.pack(*addresses, x.stride(0), *launch.arrange_sizes)
        launch.arrange.launch(launch.arrange_grid, _ARRANGE_THREADS, 0, params)
        addresses = (
            arranged.data_ptr(),
            codes.data_ptr(),
            codebooks.data_ptr(),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            0 if partial is None else partial.data_ptr(),
        )
        params = _PARAMS.pack(*addresses, code_stride, *launch.sizes)
        launch.multiply.launch(plan.grid, _THREADS, plan.shared_bytes, params, overlap=True)
        if partial is not None:
            finish(partial, scales, bias, out)
    return out
