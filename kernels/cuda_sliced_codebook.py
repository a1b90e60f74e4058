"""1 to 64 tokens on NVIDIA GPUs for one codebook of up to 65536 entries (1x16g8, 1x16g16 and fewer bits).

Such a codebook is larger than shared memory, and gathering its entries from L2 takes longer than reading a dense
weight. Here every block keeps a slice of the codebook, four (or two) of an entry's numbers for a range of the entries,
and reads all codes of its rows; the slices' sums are added in fixed order by another launch. The less shared memory a
device has, the more slices there are. Up to 16 tokens that is faster than a dense product if the weight is large (8192
x 28672 on one H100: 1.3 times at one token). `cuda/sliced_codebook.cu` describes the kernel, which
`aqlm_tensor.kernels.cuda_int8_codebook` runs with codebooks in 8-bit integers, too.
"""

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import finish
from aqlm_tensor.kernels.int8_codebooks import Int8Codebooks
from aqlm_tensor.kernels.registry import Problem

__all__ = [
    "MAX_TOKENS",
    "Plan",
    "Shape",
    "Variant",
    "choose_plan",
    "linear",
    "run_plan",
    "shape_of",
    "supports",
    "variant_defines",
]

MAX_TOKENS = 64
_SOURCE = "sliced_codebook.cu"
_PARAMS = struct.Struct("5Qq6i")
_FRAGMENT_PARAMS = struct.Struct("2Qq3i4x")
_FRAGMENT_THREADS = 256
_GROUPS_PER_LANE = 8
_BARRIER_BYTES = 16  # of a slot
# Microseconds on one H100, fitted to four shapes: staging a superblock of x (and more for each warp that waits and each
# byte), and adding the k warps' sums of one batch of tiles.
_STAGING_COST, _STAGING_COST_PER_WARP, _STAGING_COST_PER_BYTE = 0.2, 0.0125, 1 / 110_000
_ADDING_COST = 0.8


@dataclass(frozen=True)
class Variant:
    """Compile-time shape of the kernel, see the constants in ``sliced_codebook.cu``; `row_warps` are to choose from."""

    width: int
    token_tiles: int
    few_tokens: bool
    warps: int
    row_tiles: int
    row_warps: tuple[int, ...]
    int8: bool = False

    @property
    def tile_rows(self) -> int:
        """Rows of the weight in a tile."""
        return 4 if self.few_tokens else 8

    @property
    def superblock(self) -> int:
        """Groups that a warp takes at once."""
        return 8 * _GROUPS_PER_LANE

    def slot_bytes(self, tokens: int) -> int:
        """Shared memory of one superblock's activations."""
        rows = tokens if self.few_tokens else 8 * self.token_tiles
        return rows * self.tile_rows * _GROUPS_PER_LANE * self.width // 8 * 16


# Up to 8, 16, 32 and 64 tokens. Fewer and wider lookups are better until x is read as often as the codebook. Of 16
# tokens on one H200, 8192 x 28672: 143 us, with 8 row warps 148, with 3 row tiles 145, with 8 warps of 8 row tiles 135,
# which for 28672 x 8192 take 149 instead of 136.
VARIANTS = (
    Variant(8, 1, True, 16, 6, (2, 4, 8, 16)),
    Variant(8, 1, False, 16, 4, (8, 16)),
    Variant(4, 2, False, 8, 8, (8,)),
    Variant(4, 4, False, 8, 4, (8,)),
)
# The same for slices of two dimensions in 8-bit integers.
INT8_VARIANTS = (
    Variant(4, 1, True, 16, 6, (2, 4, 8), int8=True),
    Variant(4, 1, False, 16, 4, (4, 8), int8=True),
    Variant(4, 2, False, 16, 3, (8, 16), int8=True),
    Variant(4, 4, False, 8, 5, (8,), int8=True),
)


@dataclass(frozen=True)
class Shape:
    """What a plan depends on: bits of a code, inputs of a group, tokens; rows and groups of one of the partitions."""

    nbits: int
    group: int
    tokens: int
    rows: int
    groups: int
    partitions: int


@dataclass(frozen=True)
class Plan:
    """How one launch is shaped: ranges of entries, warps that share rows, staged superblocks of x per k warp."""

    variant: Variant
    entry_parts: int
    row_warps: int
    grid: tuple[int, int, int]
    slots: int
    shared_bytes: int


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None if it can."""
    scheme = problem.scheme
    if problem.op != "linear":
        return "computes linear only"
    if scheme.in_group_size not in (8, 16) or scheme.out_group_size != 1:
        return f"needs groups of 8 or 16 inputs and 1 output, not {scheme}"
    if scheme.num_codebooks != 1 or scheme.nbits_per_codebook < 9:
        return f"needs one codebook of at least 9 bits, not {scheme}"
    if not 1 <= problem.rows <= MAX_TOKENS:
        return f"runs 1 to {MAX_TOKENS} rows of x, not {problem.rows}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, not {problem.dtype}"
    return cuda_runtime.why_not_on(problem.device, problem.dtype)


def _plan_with(
    shape: Shape, variant: Variant, entry_parts: int, row_warps: int, processors: int, limit: int
) -> tuple[float, Plan] | None:
    """Overhead in microseconds and the plan, or None if it needs more shared memory than `limit`."""
    k_warps = variant.warps // row_warps
    superblocks = math.ceil(shape.groups / variant.superblock)
    slices = shape.group * 2 // variant.width * entry_parts
    tiles = math.ceil(shape.rows / variant.tile_rows)
    ranges = min(tiles, max(1, processors // (slices * shape.partitions)))
    entries = math.ceil((1 << shape.nbits) / entry_parts)
    fixed = math.ceil(entries * variant.width / (2 if variant.int8 else 1) / 128) * 128
    if k_warps > 1:
        fixed += k_warps * shape.tokens * (variant.tile_rows * row_warps + 4) * 4
    blocks = math.ceil(superblocks / k_warps)
    slot = k_warps * (variant.slot_bytes(shape.tokens) + _BARRIER_BYTES)
    resident = fixed + blocks * slot <= limit
    slots = blocks if resident else 2
    if fixed + slots * slot > limit:
        return None
    batches = math.ceil(math.ceil(tiles / ranges) / (variant.row_tiles * row_warps))
    staging = (_STAGING_COST + _STAGING_COST_PER_WARP * row_warps + _STAGING_COST_PER_BYTE * slot) * blocks
    staging *= 1 if resident else batches
    cost = staging + _ADDING_COST * batches * (k_warps > 1)
    grid = (slices, ranges, shape.partitions)
    return cost, Plan(variant, entry_parts, row_warps, grid, slots, fixed + slots * slot)


@functools.lru_cache(maxsize=4096)
def choose_plan(shape: Shape, processors: int, limit: int, int8: bool = False) -> Plan:
    """The plan for a shape of at least one group on a device with `limit` bytes of shared memory per block."""
    variants = INT8_VARIANTS if int8 else VARIANTS
    variant = next(v for v in variants if shape.tokens <= (8 if v.few_tokens else 16 * v.token_tiles))
    superblocks = math.ceil(shape.groups / variant.superblock)
    row_warps = [n for n in variant.row_warps if variant.warps // n <= superblocks] or [variant.warps]
    entry_parts = 1
    while True:  # ends: 64 KB hold the activations and a small part of the codebook
        plans = [_plan_with(shape, variant, entry_parts, n, processors, limit) for n in row_warps]
        fitting = [plan for plan in plans if plan is not None]
        if fitting:
            return min(fitting, key=lambda plan: plan[0])[1]
        entry_parts += 1


def variant_defines(shape: Shape, plan: Plan, dtype: torch.dtype, aligned: bool) -> tuple[tuple[str, int], ...]:
    """The compile-time constants of the kernel for a plan; `aligned` if lanes can load their codes as whole vectors."""
    variant = plan.variant
    return (
        ("NBITS", shape.nbits),
        ("GROUP", shape.group),
        ("WIDTH", variant.width),
        ("INT8", int(variant.int8)),
        ("ENTRY_PARTS", plan.entry_parts),
        ("DTYPE_BF16", int(dtype == torch.bfloat16)),
        ("WARPS", variant.warps),
        ("ROW_WARPS", plan.row_warps),
        ("ROW_TILES", variant.row_tiles),
        ("TOKEN_TILES", variant.token_tiles),
        ("FEW_TOKENS", int(variant.few_tokens)),
        ("ALIGNED", int(aligned)),
    )


@functools.lru_cache(maxsize=4096)
def _kernels(
    shape: Shape, plan: Plan, dtype: torch.dtype, aligned: bool, index: int
) -> tuple[cuda_runtime.Kernel, cuda_runtime.Kernel]:
    """The kernels that arrange x and that multiply."""
    defines = variant_defines(shape, plan, dtype, aligned)
    limit = cuda_runtime.device_limits(index)[1]
    return (
        cuda_runtime.load_kernel(_SOURCE, "slice_x", defines, index),
        cuda_runtime.load_kernel(_SOURCE, "sliced_codebook", defines, index, limit),
    )


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias`` for the weight W that the codes stand for.

    Args:
        x: [tokens, in_features], 1 to 64 tokens, float16 or bfloat16.
        codes: [out_features, in_features / G, 1] int16.
        codebooks: [1, 2^N, 1, G], or [P, 1, 2^N, 1, G] for P equal row partitions; G 8 or 16; dtype of x.
        scales: [out_features, 1, 1, 1], dtype of x.
        bias: [out_features] or None.

    Returns:
        [tokens, out_features], dtype of x.
    """
    out, done = cuda_runtime.empty_product(x, codes, bias)
    if done:
        return out
    operands = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
    shape = shape_of(x, codes, codebooks)
    with cuda_runtime.on_device(x.device):
        run_plan(shape, choose_plan(shape, *cuda_runtime.device_limits(x.device.index)), out, *operands)
    return out


def shape_of(x: Tensor, codes: Tensor, codebooks: Tensor) -> Shape:
    """What a plan depends on, of operands as `linear` takes them."""
    partitions = codebooks.shape[0] if codebooks.dim() == 5 else 1
    nbits = codebooks.shape[-3].bit_length() - 1
    return Shape(nbits, codebooks.shape[-1], x.shape[0], codes.shape[0] // partitions, codes.shape[1], partitions)


def run_plan(
    shape: Shape,
    plan: Plan,
    out: Tensor,
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    int8: Int8Codebooks | None = None,
) -> None:
    """Write `linear` of prepared operands into `out` with a given plan, on the current device.

    A plan of an int8 variant multiplies with `int8`, the copy of the codebooks.
    """
    variant = plan.variant
    aligned = shape.groups % _GROUPS_PER_LANE == 0 and (codes.data_ptr() | codes.stride(0) * 2) % 16 == 0
    slice_x, multiply = _kernels(shape, plan, x.dtype, aligned, x.device.index)
    superblocks = math.ceil(shape.groups / variant.superblock)
    fragment_bytes = shape.group * 2 // variant.width * superblocks * variant.slot_bytes(shape.tokens)
    fragments = torch.empty(fragment_bytes, dtype=torch.uint8, device=x.device)
    partial = torch.empty(plan.grid[0], *out.shape, dtype=torch.float32, device=x.device)
    values = (x.data_ptr(), fragments.data_ptr(), x.stride(0), shape.tokens, shape.groups, superblocks)
    blocks = math.ceil(fragment_bytes / (16 * _FRAGMENT_THREADS))
    slice_x.launch((blocks, 1, 1), _FRAGMENT_THREADS, 0, _FRAGMENT_PARAMS.pack(*values), overlap=True)
    tiles = math.ceil(shape.rows / variant.tile_rows)
    values = (
        fragments.data_ptr(),
        codes.data_ptr(),
        codebooks.data_ptr() if int8 is None else int8.entries.data_ptr(),
        0 if int8 is None else int8.scales.data_ptr(),
        partial.data_ptr(),
        codes.stride(0),
        shape.tokens,
        shape.rows,
        shape.groups,
        tiles // plan.grid[1],
        tiles % plan.grid[1],
        plan.slots,
    )
    multiply.launch(plan.grid, variant.warps * 32, plan.shared_bytes, _PARAMS.pack(*values), overlap=True)
    finish(partial, scales, bias, out)
