"""The lookup kernel's form for 17 to 64 tokens on Hopper GPUs: warpgroup products with the weights in registers.

`ldmatrix` looks up the weights in the order that x has in memory, so that the copy engine brings x and codes into
shared memory as they are and the load/store unit is left to the lookups. `cuda/lookup_wgmma.cu` describes the kernel;
its launch shape is chosen here, by arithmetic on the shape and the number of multiprocessors alone. Compute capability
9.0 only: later architectures dropped the instruction.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import ROWS_PER_TILE, Operands, Shape, launch, operand_maps

__all__ = ["Plan", "choose_plan", "plan_defines", "run_plan", "runs"]

_SOURCE = "lookup_wgmma.cu"
_CAPABILITY = (9, 0)
_THREADS = 544
_WARPS = 16  # that own row tiles
_SUPERBLOCK_BYTES = 64  # of a row's codes
_COPIES = 8
_SHARED_BYTES = 232448  # of a block, at most
_MOST_SLOTS = 8
_SOME_TOKENS = 32
# Measured on one H100: the share of shared memory's wavefronts that are used when all warps have rows, what a launch
# and filling the codebooks takes, what the second launch of a split sum takes, and bytes per cycle of L2 per
# multiprocessor.
_UTILIZATION = 0.87
_LAUNCH_CYCLES = 7000
_SPLIT_CYCLES = 5000
_L2_BYTES_PER_CYCLE = 20


@dataclass(frozen=True)
class Plan:
    """How one launch is shaped.

    Attributes:
        token_tiles: tiles of 8 tokens, 4 or 8.
        k_groups: parts of the inputs in a block.
        slots: of the ring of x.
        code_slots: of the ring of codes, a superblock each.
        box_tiles: row tiles whose codes one copy brings.
        ahead: whether lookups are made a step ahead.
        grid: row ranges, splits of the inputs, partitions.
        shared_bytes: dynamic shared memory.
    """

    token_tiles: int
    k_groups: int
    slots: int
    code_slots: int
    box_tiles: int
    ahead: bool
    grid: tuple[int, int, int]
    shared_bytes: int


def runs(x: Tensor, codes: Tensor) -> bool:
    """Whether tensor copies can bring such operands: rows of whole aligned pieces of codes, on Hopper."""
    return (
        torch.cuda.get_device_capability(codes.device) == _CAPABILITY
        and (codes.shape[1] * codes.shape[2] | codes.data_ptr() | codes.stride(0)) % 16 == 0
        and (x.shape[0] == 1 or x.stride(0) >= x.shape[1])
    )


def _rings(books: int, nbits: int, token_tiles: int, k_groups: int) -> tuple[int, int, int]:
    """Slots of x and of codes, and dynamic shared memory with codebooks, barriers and scratch; as in the kernel."""
    steps = min(4 if token_tiles == 8 else 8, 16 // books)
    code_slots = 3 if k_groups == 1 else 2 * k_groups
    fixed = math.ceil(math.ceil(books / 2) * (32 * _COPIES << nbits) / 1024) * 1024 + 16
    code_bytes = code_slots * (_WARPS // k_groups * ROWS_PER_TILE * _SUPERBLOCK_BYTES + 16)
    slot = steps // 2 * token_tiles * 1024 + 16
    slots = min(_MOST_SLOTS, (_SHARED_BYTES - fixed - code_bytes) // slot) // k_groups * k_groups
    return slots, code_slots, fixed + code_bytes + slots * slot


def _cycles(shape: Shape, token_tiles: int, k_groups: int, splits: int, grid_x: int) -> float:
    """Estimated time of one block: its wavefronts of shared memory, or reading x if that takes longer."""
    tiles = math.ceil(math.ceil(shape.rows / ROWS_PER_TILE) / grid_x)
    batches = math.ceil(tiles * k_groups / _WARPS)
    steps = math.ceil(shape.groups / 4 / splits)
    products = 4 * token_tiles * math.ceil(tiles / 4)  # x, read by each warpgroup's instructions
    staging = batches * 4 * token_tiles
    active = min(1.0, 0.4 + 0.6 * tiles * k_groups / _WARPS)
    shared = steps * (tiles * 10 * shape.books + products + staging) / (_UTILIZATION * active)
    staged = batches * steps * 64 * shape.tokens / _L2_BYTES_PER_CYCLE
    sums = _SPLIT_CYCLES + splits * shape.rows * shape.tokens / 300 if splits > 1 else 0
    return max(shared, staged) + sums + _LAUNCH_CYCLES


@functools.lru_cache(maxsize=4096)
def choose_plan(shape: Shape, processors: int) -> Plan:
    """The launch shape with the least estimated time for a shape of up to 64 tokens."""
    token_tiles = 4 if shape.tokens <= _SOME_TOKENS else 8
    tiles = math.ceil(shape.rows / ROWS_PER_TILE)
    superblocks = math.ceil(shape.groups * shape.books / _SUPERBLOCK_BYTES)
    best: tuple[float, Plan] | None = None
    for splits in (1, 2, 4, 8):
        grid_x = min(tiles, max(1, processors // (splits * shape.partitions)))
        for k_groups in (1, 2, 4):
            # Parts are added once, at the end, so they need all of a block's tiles at once.
            fits = k_groups == 1 or math.ceil(tiles / grid_x) * k_groups <= _WARPS
            slots, code_slots, size = _rings(shape.books, shape.nbits, token_tiles, k_groups)
            if not fits or slots == 0 or splits * k_groups > max(1, superblocks):
                continue
            cycles = _cycles(shape, token_tiles, k_groups, splits, grid_x)
            if best is None or cycles < best[0]:
                box_tiles = min(_WARPS // k_groups, math.ceil(tiles / grid_x))
                ahead = shape.books == 2 and (token_tiles < 8 or k_groups == 1)
                grid = grid_x, splits, shape.partitions
                best = cycles, Plan(token_tiles, k_groups, slots, code_slots, box_tiles, ahead, grid, size)
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
        ("GROUPS_PER_LANE", 16 // shape.books),
        ("COPIES", _COPIES),
        ("X_SLOTS", plan.slots),
        ("CODE_SLOTS", plan.code_slots),
        ("AHEAD", int(plan.ahead)),
    )


@functools.lru_cache(maxsize=4096)
def _kernel(shape: Shape, plan: Plan, dtype: torch.dtype, index: int) -> cuda_runtime.Kernel:
    return cuda_runtime.load_kernel(_SOURCE, "lookup_wgmma", plan_defines(shape, plan, dtype), index, plan.shared_bytes)


def run_plan(shape: Shape, plan: Plan, out: Tensor, operands: Operands) -> None:
    """Write the product of prepared operands that `runs` into `out` [tokens, out_features], on the current device."""
    kernel = _kernel(shape, plan, out.dtype, out.device.index)
    launch(
        *(kernel, shape, plan.grid, _THREADS, plan.shared_bytes, out, operands),
        superblock=_SUPERBLOCK_BYTES // shape.books,
        slots=plan.box_tiles,
        maps=operand_maps(operands[0], operands[1], plan.token_tiles, plan.box_tiles, _SUPERBLOCK_BYTES),
    )
