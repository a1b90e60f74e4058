"""1 to 256 tokens on NVIDIA GPUs, 64 at once: weights looked up from shared memory straight into tensor-core operands.

For schemes of one, two or four codebooks of up to 256 entries over groups of 8 inputs (1x8g8, 2x8g8, 4x8g8), and one or
two of up to 4096 where a block can have that much shared memory (2x12g8: A100, Hopper). The weight is never stored:
one launch reads the codes once and is bound by the lookups (16 bytes of shared memory each) up to some 16 tokens, by
reading x and the tensor cores at 64. `cuda/lookup_linear.cu` describes the kernel; its variant and launch shape are
chosen here, by arithmetic on the shape and the device's properties alone. Hopper has two forms of its own, in
`cuda_lookup_stream` and `cuda_lookup_hopper`.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_lookup_hopper, cuda_lookup_stream, cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import ROWS_PER_TILE, Operands, Shape, launch
from aqlm_tensor.kernels.registry import Problem

__all__ = [
    "MAX_TOKENS",
    "Plan",
    "Variant",
    "choose_plan",
    "linear",
    "plan_with",
    "run_plan",
    "slower_than_next",
    "supports",
    "variant_defines",
]

MAX_TOKENS = 256
_TOKENS_AT_ONCE, _FEWEST_TOKENS = 64, 8
_PORTABLE_TOKENS = 16  # beyond, and for large weights, Hopper's own forms are faster
_BYTE_BITS, _MAX_BITS = 8, 12
_SOURCE = "lookup_linear.cu"
_L2_BYTES_PER_CYCLE = 20  # of one multiprocessor while the codes stream in, measured on one H100
# Keeping all of x staged must leave room in L1, which has the rest of the shared memory, for the loads in flight: with
# less than 60 KB of it 8 tokens of 8192 x 28672 took 59 us instead of 51 (one H100).
_SHARED_SHARE = 0.7
_BATCH_CYCLES = 600  # barriers and refilling the pipeline, once per batch of tiles
_SPLIT_CYCLES = 4000  # the second launch of a split sum


@dataclass(frozen=True)
class Variant:
    """Compile-time shape of the kernel, see the constants in ``lookup_linear.cu``."""

    token_tiles: int
    warps: int
    row_tiles: int
    row_warps: int
    groups_per_lane: int
    copies: int = 8

    @property
    def k_warps(self) -> int:
        """Warps that take different superblocks."""
        return self.warps // self.row_warps

    @property
    def batch(self) -> int:
        """Row tiles one block accumulates at once."""
        return self.row_tiles * self.row_warps

    def sum_bytes(self, tokens: int) -> int:
        """Shared memory in which the k warps' accumulators are added."""
        tiles_per_round = max(1, self.row_tiles // self.token_tiles)
        return self.k_warps * tokens * (ROWS_PER_TILE * tiles_per_round * self.row_warps + 4) * 4


VARIANTS = (
    Variant(1, 8, 4, 1, 8),
    Variant(2, 8, 4, 2, 8),
    Variant(4, 8, 4, 2, 4),
    Variant(8, 8, 2, 4, 8),
)


@dataclass(frozen=True)
class Plan:
    """How one launch is shaped: grid, staged superblocks of x per k warp, dynamic shared memory."""

    variant: Variant
    grid: tuple[int, int, int]
    slots: int
    shared_bytes: int


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None if it can."""
    if problem.op != "linear":
        return "computes linear only"
    if not 1 <= problem.rows <= MAX_TOKENS:
        return f"runs 1 to {MAX_TOKENS} rows of x, not {problem.rows}"
    halves, scheme = (torch.float16, torch.bfloat16), problem.scheme
    if scheme.nbits_per_codebook <= _BYTE_BITS:
        return cuda_runtime.why_not_groups_of_8(problem, (1, 2, 4), halves)
    reason = cuda_runtime.why_not_groups_of_8(problem, (1, 2), halves, _MAX_BITS)
    if reason is not None:
        return reason
    processors, limit = cuda_runtime.device_limits(torch.device(problem.device).index or 0)
    books, nbits, groups = scheme.num_codebooks, scheme.nbits_per_codebook, problem.in_features // 8
    if choose_plan(Shape(books, nbits, _FEWEST_TOKENS, ROWS_PER_TILE, groups, 1), processors, limit) is None:
        return f"needs room beside the codebooks of {scheme}, this GPU has {limit} bytes of shared memory per block"
    return None


def slower_than_next(problem: Problem) -> str | None:
    """Why a kernel for many tokens is the better choice where nothing was measured."""
    if problem.rows <= _TOKENS_AT_ONCE:
        return None
    return f"needs several launches for more than {_TOKENS_AT_ONCE} rows of x"


def _cycles(shape: Shape, variant: Variant, splits: int, grid_x: int) -> float:
    """Estimated time of one block: its lookups and staged reads, tensor-core work or traffic, whichever is longest."""
    per_lane = variant.groups_per_lane
    tiles = math.ceil(math.ceil(shape.rows / ROWS_PER_TILE) / grid_x)
    batches = math.ceil(tiles / variant.batch)
    superblocks = math.ceil(math.ceil(shape.groups / (4 * per_lane)) / splits)
    steps = math.ceil(superblocks / variant.k_warps) * variant.k_warps * per_lane
    token_tiles = variant.token_tiles
    shared = steps * (tiles * 8 * shape.books + math.ceil(tiles / variant.row_tiles) * 4 * token_tiles)
    tensor = steps * tiles * 2 * token_tiles * 1.7
    staged = batches * superblocks * per_lane * 4 * 16 * shape.tokens / _L2_BYTES_PER_CYCLE
    sums = 2 * variant.k_warps * tiles * 16 * shape.tokens / 32
    cycles = max(shared, tensor, staged) + sums + batches * _BATCH_CYCLES
    return cycles + (_SPLIT_CYCLES + splits * tiles * shape.tokens if splits > 1 else 0)


def _fit(shape: Shape, variant: Variant, superblocks: int, limit: int) -> tuple[int, int] | None:
    """Slots of staged x and bytes of shared memory, or None if the variant does not fit."""
    row_bytes = 16 * variant.copies * (2 if variant.copies == 8 or shape.books > 1 else 1)
    fixed = math.ceil(shape.books / 2) * (row_bytes << shape.nbits) + variant.sum_bytes(shape.tokens)
    slot = variant.k_warps * variant.token_tiles * 8 * 4 * variant.groups_per_lane * 16
    wanted = max(1, math.ceil(superblocks / variant.k_warps))
    if fixed + wanted * slot <= limit * _SHARED_SHARE:
        return wanted, fixed + wanted * slot
    slots = min(wanted, 2)
    return (slots, fixed + slots * slot) if fixed + slots * slot <= limit else None


def plan_with(shape: Shape, variant: Variant, processors: int, limit: int) -> Plan | None:
    """The best launch shape for a variant on a device, or None if it needs more shared memory than `limit`."""
    tiles = math.ceil(shape.rows / ROWS_PER_TILE)
    per_lane = variant.groups_per_lane
    superblocks = math.ceil(shape.groups / (4 * per_lane))
    best: tuple[float, Plan] | None = None
    for splits in (1, 2, 4, 8, 16):
        if splits > max(1, superblocks // variant.k_warps):
            break
        grid_x = min(tiles, max(1, processors // (splits * shape.partitions)))
        fit = _fit(shape, variant, math.ceil(superblocks / splits), limit)
        if fit is None:
            if splits == 1:
                return None
            continue
        cycles = _cycles(shape, variant, splits, grid_x)
        if best is None or cycles < best[0]:
            best = cycles, Plan(variant, (grid_x, splits, shape.partitions), *fit)
    return best[1] if best else None


def _group_bytes(shape: Shape) -> int:
    """Bytes of one group's codes."""
    return shape.books * (1 if shape.nbits <= _BYTE_BITS else 2)


@functools.lru_cache(maxsize=4096)
def choose_plan(shape: Shape, processors: int, limit: int) -> Plan | None:
    """The plan for a shape; None if no variant fits, so that the tokens must be split over several launches.

    Devices with less shared memory than Hopper's get fewer copies of the codebooks, then fewer warps.
    """
    # With four codebooks the variant for 64 tokens is the faster one from 17 on: 156 us against 176 for 8192 x 28672.
    fitting = [v for v in VARIANTS if v.token_tiles * 8 >= shape.tokens and (shape.books < 4 or v.token_tiles != 4)]
    variant = fitting[0]
    variant = replace(variant, groups_per_lane=min(variant.groups_per_lane, 16 // _group_bytes(shape)))
    for copies in (8, 4, 2, 1):
        for warps in (variant.warps, variant.warps // 2):
            if warps >= variant.row_warps:
                plan = plan_with(shape, replace(variant, copies=copies, warps=warps), processors, limit)
                if plan is not None:
                    return plan
    return None


def variant_defines(shape: Shape, plan: Plan, dtype: torch.dtype, aligned: bool) -> tuple[tuple[str, int], ...]:
    """The compile-time constants of the kernel for a plan; `aligned` if lanes can load their codes as whole vectors."""
    variant = plan.variant
    return (
        ("NUM_BOOKS", shape.books),
        ("NBITS", shape.nbits),
        ("DTYPE_BF16", int(dtype == torch.bfloat16)),
        ("WARPS", variant.warps),
        ("ROW_TILES", variant.row_tiles),
        ("TOKEN_TILES", variant.token_tiles),
        ("ROW_WARPS", variant.row_warps),
        ("GROUPS_PER_LANE", plan.variant.groups_per_lane),
        ("COPIES", variant.copies),
        ("ALIGNED", int(aligned)),
    )


@functools.lru_cache(maxsize=4096)
def _kernel(shape: Shape, plan: Plan, dtype: torch.dtype, aligned: bool, index: int) -> cuda_runtime.Kernel:
    defines = variant_defines(shape, plan, dtype, aligned)
    return cuda_runtime.load_kernel(_SOURCE, "lookup_linear", defines, index, cuda_runtime.device_limits(index)[1])


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias`` for the weight W that the codes stand for.

    Args:
        x: [tokens, in_features], 1 to 256 tokens, float16 or bfloat16.
        codes: [out_features, in_features / 8, K] int8, int16 for more than 8 bits.
        codebooks: [K, 2^N, 1, 8], or [P, K, 2^N, 1, 8] for P equal row partitions; dtype of x.
        scales: [out_features, 1, 1, 1], dtype of x.
        bias: [out_features] or None.

    Returns:
        [tokens, out_features], dtype of x.
    """
    out_features, groups, books = codes.shape
    partitions = codebooks.shape[0] if codebooks.dim() == 5 else 1
    nbits = codebooks.shape[-3].bit_length() - 1
    out, done = cuda_runtime.empty_product(x, codes, bias)
    if done:
        return out
    operands = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
    shape = Shape(books, nbits, x.shape[0], out_features // partitions, groups, partitions)
    with cuda_runtime.on_device(x.device):
        _product(shape, out, operands, _TOKENS_AT_ONCE, *cuda_runtime.device_limits(x.device.index))
    return out


def _product(shape: Shape, out: Tensor, operands: Operands, at_once: int, processors: int, limit: int) -> None:
    """Write `linear` of prepared operands into `out`, by several launches if there are more than `at_once` tokens."""
    if shape.tokens > at_once:
        for first in range(0, shape.tokens, at_once):
            some = slice(first, min(first + at_once, shape.tokens))
            part = replace(shape, tokens=some.stop - first)
            _product(part, out[some], (operands[0][some], *operands[1:]), at_once, processors, limit)
        return
    on_hopper = shape.nbits <= _BYTE_BITS and cuda_lookup_hopper.runs(operands[0], operands[1])
    if on_hopper and cuda_lookup_stream.wins(shape):
        cuda_lookup_stream.run_plan(shape, cuda_lookup_stream.choose_plan(shape, processors, limit), out, operands)
    elif on_hopper and shape.tokens > _PORTABLE_TOKENS:
        cuda_lookup_hopper.run_plan(shape, cuda_lookup_hopper.choose_plan(shape, processors), out, operands)
    elif (plan := choose_plan(shape, processors, limit)) is not None:
        run_plan(shape, plan, out, operands)
    else:
        assert at_once > _FEWEST_TOKENS, "8 tokens fit every supported device"
        _product(shape, out, operands, max(_FEWEST_TOKENS, shape.tokens // 16 * 8), processors, limit)


def run_plan(shape: Shape, plan: Plan, out: Tensor, operands: Operands) -> None:
    """Write `linear` of prepared operands into the rows `out` with a given plan, on the current device."""
    variant, codes = plan.variant, operands[1]
    lane_bytes, row_bytes = variant.groups_per_lane * _group_bytes(shape), codes.stride(0) * codes.element_size()
    aligned = shape.groups % variant.groups_per_lane == 0 and (codes.data_ptr() | row_bytes) % lane_bytes == 0
    kernel = _kernel(shape, plan, out.dtype, aligned, out.device.index)
    threads, superblock = variant.warps * 32, 4 * variant.groups_per_lane
    launch(kernel, shape, plan.grid, threads, plan.shared_bytes, out, operands, superblock=superblock, slots=plan.slots)
