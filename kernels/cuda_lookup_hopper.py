"""The lookup kernel's form for Hopper GPUs: warpgroup products with the looked-up weights in registers.

Faster than the portable form where reading x costs as much as the lookups, that is beyond some 16 tokens, and a little
below for large weights, where the same lookups bound both. `cuda/lookup_wgmma.cu` describes the kernel; its launch
shape is chosen here, by arithmetic on the shape and the number of multiprocessors alone. Compute capability 9.0 only:
later architectures dropped the instruction.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import ROWS_PER_TILE, Operands, Shape, launch

__all__ = ["Plan", "choose_plan", "plan_defines", "run_plan", "runs", "wins"]

_SOURCE = "lookup_wgmma.cu"
_CAPABILITY = (9, 0)
_THREADS = 640
_WARPS = 16  # that own row tiles
_LANE_BYTES = 16  # codes that a lane loads at once from one row
_COPIES = 8
# Measured on one H100: the share of shared memory's wavefronts that are used when all warps have rows, what a launch
# and filling the codebooks takes, what the second launch of a split sum takes, and bytes per cycle of L2 per
# multiprocessor.
_UTILIZATION = 0.87
_LAUNCH_CYCLES = 7000
_SPLIT_CYCLES = 5000
_L2_BYTES_PER_CYCLE = 20
_FEW_TOKENS, _SOME_TOKENS = 8, 32
_FEW_GROUPS = 512
_LARGE_WEIGHTS = 1 << 25


@dataclass(frozen=True)
class Plan:
    """How one launch is shaped: tiles of 8 tokens, parts of the inputs in a block, grid, dynamic shared memory."""

    token_tiles: int
    k_groups: int
    grid: tuple[int, int, int]
    shared_bytes: int


def runs(shape: Shape, codes: Tensor) -> bool:
    """Whether this form can run a shape with such codes: whole aligned vectors of them per lane, on Hopper."""
    return (
        torch.cuda.get_device_capability(codes.device) == _CAPABILITY
        and shape.groups * shape.books % _LANE_BYTES == 0
        and (codes.data_ptr() | codes.stride(0)) % _LANE_BYTES == 0
    )


def wins(shape: Shape) -> bool:
    """Whether this form is the faster one for a shape, as measured on one H100.

    With 4 tokens of 2x8g8 it takes 15.7 us against 17.0 at 4096 x 14336 (in x out), with 32 tokens 64 against 78 at
    8192 x 28672, with 64 tokens 86 against 110; at 4096 x 4096 with 4 tokens 8.5 against 7.7, with 64 14.0 against
    13.4. Four codebooks were measured from 17 tokens on.
    """
    if shape.books > 2:
        return shape.tokens > _SOME_TOKENS and shape.groups > _FEW_GROUPS
    large = shape.partitions * shape.rows * shape.groups * 8 >= _LARGE_WEIGHTS
    return large or _FEW_TOKENS < shape.tokens <= _SOME_TOKENS


def _shared_bytes(books: int, nbits: int, token_tiles: int) -> int:
    """Dynamic shared memory: codebooks, ring of staged x with its barriers, scratch; as in ``lookup_wgmma.cu``."""
    slots = 6 if token_tiles == 8 else 8
    steps = 4 if token_tiles == 8 or books > 2 else 8
    slot = steps * (512 * token_tiles + 128 // steps) + 16
    return math.ceil(books / 2) * (32 * _COPIES << nbits) + slots * slot + 16


def _cycles(shape: Shape, token_tiles: int, k_groups: int, splits: int, grid_x: int) -> float:
    """Estimated time of one block: its wavefronts of shared memory, or reading x if that takes longer."""
    tiles = math.ceil(math.ceil(shape.rows / ROWS_PER_TILE) / grid_x)
    batches = math.ceil(tiles * k_groups / _WARPS)
    steps = math.ceil(shape.groups / 4 / splits)
    products = 16 * token_tiles // k_groups  # x, read by each warpgroup's instructions
    staging = 10 * token_tiles
    active = min(1.0, 0.4 + 0.6 * tiles * k_groups / _WARPS)
    shared = steps * (tiles * (8 * shape.books + 2) + batches * (products + staging)) / (_UTILIZATION * active)
    staged = batches * steps * 64 * shape.tokens / _L2_BYTES_PER_CYCLE
    sums = _SPLIT_CYCLES + splits * shape.rows * shape.tokens / 300 if splits > 1 else 0
    return max(shared, staged) + sums + _LAUNCH_CYCLES


@functools.lru_cache(maxsize=4096)
def choose_plan(shape: Shape, processors: int) -> Plan:
    """The launch shape with the least estimated time for a shape of up to 64 tokens."""
    token_tiles = next(tiles for tiles in (1, 2, 4, 8) if 8 * tiles >= shape.tokens)
    tiles = math.ceil(shape.rows / ROWS_PER_TILE)
    superblocks = math.ceil(shape.groups * shape.books / (4 * _LANE_BYTES))
    best: tuple[float, Plan] | None = None
    for splits in (1, 2, 4, 8):
        grid_x = min(tiles, max(1, processors // (splits * shape.partitions)))
        for k_groups in (1, 2, 4) if token_tiles < 8 else (1,):
            # Parts are added once, at the end, so they need all of a block's tiles at once.
            fits = k_groups == 1 or math.ceil(tiles / grid_x) * k_groups <= _WARPS
            if not fits or splits * k_groups > max(1, superblocks):
                continue
            cycles = _cycles(shape, token_tiles, k_groups, splits, grid_x)
            if best is None or cycles < best[0]:
                size = _shared_bytes(shape.books, shape.nbits, token_tiles)
                best = cycles, Plan(token_tiles, k_groups, (grid_x, splits, shape.partitions), size)
    assert best is not None, "one part of the inputs and no split fit every shape"
    return best[1]


def plan_defines(shape: Shape, plan: Plan, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The compile-time constants of the kernel for a plan."""
    return (
        ("NUM_BOOKS", shape.books),
        ("NBITS", shape.nbits),
        ("DTYPE_BF16", int(dtype == torch.bfloat16)),
        ("TOKEN_TILES", plan.token_tiles),
        ("K_GROUPS", plan.k_groups),
        ("GROUPS_PER_LANE", _LANE_BYTES // shape.books),
        ("COPIES", _COPIES),
    )


@functools.lru_cache(maxsize=4096)
def _kernel(shape: Shape, plan: Plan, dtype: torch.dtype, index: int) -> cuda_runtime.Kernel:
    return cuda_runtime.load_kernel(_SOURCE, "lookup_wgmma", plan_defines(shape, plan, dtype), index, plan.shared_bytes)


def run_plan(shape: Shape, plan: Plan, out: Tensor, operands: Operands) -> None:
    """Write the product of prepared operands into `out` [tokens, out_features], on the current device."""
    kernel = _kernel(shape, plan, out.dtype, out.device.index)
    superblock = 4 * _LANE_BYTES // shape.books
    launch(kernel, shape, plan.grid, _THREADS, plan.shared_bytes, out, operands, superblock=superblock)
