"""The lookup kernel's form for up to 32 tokens on Hopper GPUs: codes and x by tensor copies, lookups the only bound.

As fast as lookups from shared memory allow, but for some 3 us to start and to end. `cuda/lookup_stream.cu` describes
the kernel; its launch shape is chosen here, by arithmetic on the shape and the number of multiprocessors alone. Compute
capability 9.0 only: it has not been tried on later ones, of which most have too little shared memory.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import ROWS_PER_TILE, Operands, Shape, launch, operand_maps

__all__ = ["Plan", "choose_plan", "max_tokens", "plan_defines", "run_plan", "wins"]

_SOURCE = "lookup_stream.cu"
_THREADS = 256
_PIECES = 8  # of a row's codes in a stage
_COPIES = 8
_PIECE_BYTES = 16  # of a row's codes, which a warp takes at once
_MOST_TILES = 14
_LEAST_STAGES, _MOST_STAGES = 2, 4
_FEW_TOKENS_WEIGHTS, _MANY_TOKENS_WEIGHTS = 1 << 25, 1 << 26
# Cycles, fitted to measurements on one H200: to start and to end, the second launch of a split sum, and how much of it
# each of its sums takes.
_LAUNCH_CYCLES = 7000
_SPLIT_CYCLES = 1500
_SUMS_PER_CYCLE = 300


@dataclass(frozen=True)
class Plan:
    """How one launch is shaped.

    Attributes:
        token_tiles: tiles of 8 tokens.
        row_warps: warps that take row tiles in turn; the others take other inputs.
        row_tiles: the most row tiles of a warp.
        stages: of the ring of codes and x.
        grid: row ranges, splits of the inputs, partitions.
        shared_bytes: dynamic shared memory.
    """

    token_tiles: int
    row_warps: int
    row_tiles: int
    stages: int
    grid: tuple[int, int, int]
    shared_bytes: int


def max_tokens(books: int) -> int:
    """The most tokens: stages hold more inputs of each with one codebook, and no two of them have room for 32."""
    return 16 if books == 1 else 32


def wins(shape: Shape) -> bool:
    """Whether this is the fastest form for a shape on Hopper, as measured on one H200, whose clock is an H100's.

    2x8g8 with 16 tokens takes 45 us at 8192 x 28672 (in x out), where the portable form takes 58, and 7.9 at 4096 x
    4096 (8.4 the wgmma form); with 4 tokens 13.7 at 4096 x 14336, 7.5 at 4096 x 4096 (16.0 and 6.9 the portable form);
    with 32 tokens 53 at 8192 x 28672, 19.4 at 4096 x 14336 (61 and 18.3 the wgmma form).
    """
    weights = shape.partitions * shape.rows * shape.groups * 8
    if shape.tokens > max_tokens(shape.books):
        return False
    return weights >= (_FEW_TOKENS_WEIGHTS if shape.tokens <= 8 else 0 if shape.tokens <= 16 else _MANY_TOKENS_WEIGHTS)


def _shared_bytes(shape: Shape, token_tiles: int, row_tiles: int, stages: int) -> int:
    """Codebooks, stages of so many row tiles, barriers, scratch, scales and biases; as in ``lookup_stream.cu``."""
    rows = row_tiles * ROWS_PER_TILE
    books = math.ceil(shape.books / 2) * (32 * _COPIES << shape.nbits)
    stage = rows * _PIECES * _PIECE_BYTES + _PIECES * 2 // shape.books * token_tiles * 1024
    return math.ceil(books / 1024) * 1024 + stages * (stage + 16) + 16 + rows * 8


def _cycles(shape: Shape, token_tiles: int, tiles: int, splits: int, waves: int) -> float:
    """Estimated time: wavefronts of shared memory of a block of so many row tiles, in as many waves as there are."""
    pieces = math.ceil(math.ceil(shape.groups * shape.books / _PIECE_BYTES) / splits)
    chunks = math.ceil(pieces / _PIECES)
    x = 16 * token_tiles // shape.books
    block = chunks * _PIECES * (tiles * 36 + 2 * x) + tiles * 16 * shape.tokens
    sums = _SPLIT_CYCLES + splits * shape.partitions * shape.rows * shape.tokens / _SUMS_PER_CYCLE if splits > 1 else 0
    return waves * (block + _LAUNCH_CYCLES) + sums


@functools.lru_cache(maxsize=4096)
def choose_plan(shape: Shape, processors: int, limit: int) -> Plan:
    """The launch shape with the least estimated time for a shape of up to `max_tokens`.

    Args:
        shape: of the product.
        processors: multiprocessors of the GPU.
        limit: bytes of shared memory that a block may have, at least 227 KiB.
    """
    token_tiles = next(tiles for tiles in (1, 2, 4) if 8 * tiles >= shape.tokens)
    row_warps = 2 if token_tiles == 4 else 1  # for want of registers
    tiles = math.ceil(shape.rows / ROWS_PER_TILE)
    pieces = math.ceil(shape.groups * shape.books / _PIECE_BYTES)
    best: tuple[float, Plan] | None = None
    for splits in (1, 2, 3, 4, 6, 8):
        if splits > max(1, pieces // _PIECES):
            break
        at_once = max(1, processors // (splits * shape.partitions))
        waves = math.ceil(tiles / (at_once * _MOST_TILES))
        ranges = min(tiles, at_once * waves)
        row_tiles = math.ceil(math.ceil(tiles / ranges) / row_warps)
        cycles = _cycles(shape, token_tiles, math.ceil(tiles / ranges), splits, waves)
        if best is None or cycles < best[0]:
            stages = _MOST_STAGES
            while (size := _shared_bytes(shape, token_tiles, row_tiles * row_warps, stages)) > limit:
                stages -= 1
            assert stages >= _LEAST_STAGES, "two stages fit with as many row tiles and tokens as there may be"
            grid = ranges, splits, shape.partitions
            best = cycles, Plan(token_tiles, row_warps, row_tiles, stages, grid, size)
    assert best is not None, "no split fits every shape"
    return best[1]


def plan_defines(shape: Shape, plan: Plan, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The compile-time constants of the kernel for a plan."""
    return (
        ("NUM_BOOKS", shape.books),
        ("NBITS", shape.nbits),
        ("DTYPE_BF16", int(dtype == torch.bfloat16)),
        ("GROUPS_PER_LANE", 4 // shape.books),
        ("COPIES", _COPIES),
        ("TOKEN_TILES", plan.token_tiles),
        ("ROW_WARPS", plan.row_warps),
        ("ROW_TILES", plan.row_tiles),
        ("STAGES", plan.stages),
    )


@functools.lru_cache(maxsize=4096)
def _kernel(shape: Shape, plan: Plan, dtype: torch.dtype, index: int) -> cuda_runtime.Kernel:
    return cuda_runtime.load_kernel(
        _SOURCE, "lookup_stream", plan_defines(shape, plan, dtype), index, plan.shared_bytes
    )


def run_plan(shape: Shape, plan: Plan, out: Tensor, operands: Operands) -> None:
    """Write the product of prepared operands into `out` [tokens, out_features], on the current device.

    Rows of codes must be whole aligned pieces of 16 bytes.
    """
    kernel = _kernel(shape, plan, out.dtype, out.device.index)
    launch(
        *(kernel, shape, plan.grid, _THREADS, plan.shared_bytes, out, operands),
        superblock=_PIECE_BYTES // shape.books,
        maps=operand_maps(
            operands[0], operands[1], plan.token_tiles, plan.row_warps * plan.row_tiles, _PIECES * _PIECE_BYTES
        ),
    )
