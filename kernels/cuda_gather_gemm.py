"""Any number of tokens on Hopper GPUs for one codebook of up to 65536 entries (1x16g8, 1x16g16 and fewer bits).

Such a codebook is larger than shared memory. Its entries are gathered from the second level of the cache into tiles of
weights, which the tensor cores multiply while the next are on their way; nothing decoded is ever stored. Up to some
hundred tokens the gathers alone bound it, beyond them the product, as long as few tiles of tokens share the gathers;
beyond about a thousand tokens cuBLAS on a decoded weight is faster. `cuda/gather_gemm.cu` describes the kernel.
Compute capability 9.0 only.
"""

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.kernels import cuda_runtime
from aqlm_tensor.kernels.cuda_tensor_map import SWIZZLE_128, tensor_map
from aqlm_tensor.kernels.registry import Problem

__all__ = ["Variant", "choose_variant", "cluster_work", "linear", "slower_than_next", "supports"]

_SOURCE = "gather_gemm.cu"
_PARAMS = struct.Struct("128s6Qq4i56x")
_ADD_PARAMS = struct.Struct("4Q4i")
_ADD_THREADS = 256
_CONSUMERS = 256
_TILE_ROWS = 128
_STAGE_INPUTS = 64
_MOST_TOKENS = 1024  # beyond, each weight is gathered too often
_BARRIER_BYTES = 24  # of a stage


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None if it can."""
    scheme = problem.scheme
    if problem.op != "linear":
        return "computes linear only"
    if problem.rows < 1:
        return "needs at least one row of x"
    if scheme.in_group_size not in (8, 16) or scheme.out_group_size != 1:
        return f"needs groups of 8 or 16 inputs and 1 output, not {scheme}"
    if scheme.num_codebooks != 1 or scheme.nbits_per_codebook < 9:
        return f"needs one codebook of at least 9 bits, not {scheme}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, not {problem.dtype}"
    reason = cuda_runtime.why_not_on(problem.device, problem.dtype)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(problem.device) != (9, 0):
        return "needs compute capability 9.0 (Hopper)"
    if problem.in_features % _STAGE_INPUTS:
        return f"needs a multiple of {_STAGE_INPUTS} inputs, not {problem.in_features}"
    return None


def slower_than_next(problem: Problem) -> str | None:
    """Why decoding the weight for cuBLAS is the better choice."""
    if problem.rows <= _MOST_TOKENS:
        return None
    return f"slower than cuda_dequantize beyond {_MOST_TOKENS} rows of x"


@dataclass(frozen=True)
class Variant:
    """Compile-time shape of the kernel, see the constants in ``gather_gemm.cu``."""

    token_tiles: int
    token_blocks: int
    row_blocks: int
    stages: int
    gather_warps: int = 2
    near_bytes: int = 0

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.token_blocks * self.row_blocks

    @property
    def threads(self) -> int:
        """Threads of a block: whole warpgroups, two more warps than gather."""
        return _CONSUMERS + math.ceil((self.gather_warps + 2) / 4) * 128

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        rows = _TILE_ROWS + 8 * self.token_tiles
        return self.stages * (rows * 2 * _STAGE_INPUTS + _BARRIER_BYTES) + self.near_bytes

    def tiles(self, tokens: int, rows: int) -> int:
        """Tiles of outputs that a cluster works on at once."""
        of_tokens = math.ceil(tokens / (8 * self.token_tiles * self.token_blocks))
        return of_tokens * math.ceil(rows / (_TILE_ROWS * self.row_blocks))

    def defines(self, nbits: int, group: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
        """The compile-time constants."""
        return (
            ("NBITS", nbits),
            ("GROUP", group),
            ("DTYPE_BF16", int(dtype == torch.bfloat16)),
            ("TOKEN_TILES", self.token_tiles),
            ("TOKEN_BLOCKS", self.token_blocks),
            ("ROW_BLOCKS", self.row_blocks),
            ("STAGES", self.stages),
            ("GATHER_WARPS", self.gather_warps),
            ("NEAR", self.near_bytes // (2 * group)),
        )


# By inputs of a group: the most tokens, and the variant that was fastest up to that, on one H200.
_VARIANTS = {
    8: (
        (32, Variant(4, 1, 2, 4, 8, 140 << 10)),
        (64, Variant(8, 1, 2, 4, 8, 128 << 10)),
        (128, Variant(16, 1, 2, 3, 8, 128 << 10)),
        (256, Variant(32, 1, 2, 4)),
        (math.inf, Variant(32, 2, 1, 4)),
    ),
    16: (
        (32, Variant(4, 1, 2, 8, 4)),
        (64, Variant(8, 1, 2, 8, 4)),
        (128, Variant(16, 1, 2, 6, 4)),
        (256, Variant(32, 1, 2, 4)),
        (math.inf, Variant(32, 2, 1, 4)),
    ),
}
_WHOLE_TILES = 0.95  # of the clusters' time: no tile is divided if whole ones keep them busy for that much
_LEAST_STAGES = 4  # of a cluster


@functools.lru_cache(maxsize=1024)
def choose_variant(tokens: int, group: int) -> Variant:
    """The variant for so many tokens and codebooks of `group` inputs."""
    return next(variant for most, variant in _VARIANTS[group] if tokens <= most)


def cluster_work(tiles: int, stages: int, clusters: int) -> tuple[int, int]:
    """How many of `clusters` to start, and the stages that they get no fractions of: those of a tile, or 1.

    Args:
        tiles: that clusters work on at once, at least one.
        stages: of a tile.
        clusters: that the device runs at once.
    """
    turns = math.ceil(tiles / clusters)
    if tiles >= _WHOLE_TILES * turns * clusters:
        return clusters, stages
    return min(clusters, math.ceil(tiles * stages / _LEAST_STAGES)), 1


@dataclass(frozen=True)
class _Launch:
    """Everything about the launches for a shape but the addresses.

    Attributes:
        variant: of the kernels.
        multiply: the kernel that gathers and multiplies.
        grid: its blocks.
        sizes: its parameters after the addresses and the codes' stride.
        part_elements: of the buffer for parts of tiles; 0 if there are whole tiles only.
        add: the kernel that adds parts of tiles.
        add_grid: its blocks.
        add_sizes: its parameters after the addresses.
    """

    variant: Variant
    multiply: cuda_runtime.Kernel
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    part_elements: int
    add: cuda_runtime.Kernel
    add_grid: tuple[int, int, int]
    add_sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _launch(tokens: int, codes: torch.Size, codebooks: torch.Size, dtype: torch.dtype, index: int) -> _Launch:
    """The launches for x of so many rows; looked up at every call, since planning takes longer than small products."""
    partitions, _, size, _, group = (1, *codebooks)[-5:]
    rows, stages = codes[0] // partitions, codes[1] * group // _STAGE_INPUTS
    variant = choose_variant(tokens, group)
    defines = variant.defines(size.bit_length() - 1, group, dtype)
    multiply = cuda_runtime.load_kernel(_SOURCE, "gather_gemm", defines, index, variant.shared_bytes)
    tiles = variant.tiles(tokens, rows)
    clusters, quantum = cluster_work(tiles, stages, max(1, _most_clusters(multiply, variant) // partitions))
    part_elements = partitions * clusters * 2 * variant.cluster * 8 * variant.token_tiles * _TILE_ROWS
    return _Launch(
        variant,
        multiply,
        (clusters * variant.cluster, 1, partitions),
        (tokens, rows, stages, quantum),
        part_elements if quantum == 1 else 0,
        cuda_runtime.load_kernel(_SOURCE, "add_parts", defines, index),
        (tiles * variant.cluster * variant.token_tiles, 1, partitions),
        (tokens, rows, stages, clusters),
    )


def _most_clusters(kernel: cuda_runtime.Kernel, variant: Variant) -> int:
    """How many clusters the device runs at once: each stays within a part of it, and some processors may be idle."""
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    size = driver.CUlaunchAttribute()
    size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size.value.clusterDim.x, size.value.clusterDim.y, size.value.clusterDim.z = variant.cluster, 1, 1
    config = driver.CUlaunchConfig()
    processors = cuda_runtime.device_limits(kernel.index)[0]
    config.gridDimX, config.gridDimY, config.gridDimZ = processors // variant.cluster * variant.cluster, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = variant.threads, 1, 1
    config.sharedMemBytes = variant.shared_bytes
    config.numAttrs, config.attrs = 1, [size]
    status, clusters = driver.cuOccupancyMaxActiveClusters(driver.CUfunction(kernel.function), config)
    if status != driver.CUresult.CUDA_SUCCESS or clusters < 1:
        raise RuntimeError(
            f"{kernel.name} cannot run in clusters of {variant.cluster} blocks: {status.name}, {clusters}"
        )
    return clusters


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.t() + bias`` for the weight W that the codes stand for.

    Args:
        x: [tokens, in_features] float16 or bfloat16; in_features a multiple of 64.
        codes: [out_features, in_features / G, 1] int16.
        codebooks: [1, 2^N, 1, G], or [P, 1, 2^N, 1, G] for P equal row partitions; G 8 or 16; dtype of x.
        scales: [out_features, 1, 1, 1], dtype of x.
        bias: [out_features] or None.

    Returns:
        [tokens, out_features], dtype of x.
    """
    tokens = x.shape[0]
    out, done = cuda_runtime.empty_product(x, codes, bias)
    if done:
        return out
    x, codes, codebooks, scales, bias = cuda_runtime.prepared(x, codes, codebooks, scales, bias)
    stage_bytes = 2 * _STAGE_INPUTS // codebooks.shape[-1]  # of a row's codes
    if (codes.data_ptr() | 2 * codes.stride(0)) % stage_bytes:
        codes = codes.clone(memory_format=torch.contiguous_format)
    device = x.device
    with cuda_runtime.on_device(device):
        launch = _launch(tokens, codes.shape, codebooks.shape, x.dtype, device.index)
        variant = launch.variant
        tile = (8 * variant.token_tiles // variant.row_blocks, _STAGE_INPUTS)
        x_map = tensor_map(x.data_ptr(), 2, (tokens, x.shape[1]), 2 * x.stride(0), tile, SWIZZLE_128)
        parts = x.new_empty(launch.part_elements, dtype=torch.float32) if launch.part_elements else None
        shared = (0 if parts is None else parts.data_ptr(), 2 * codes.stride(0))
        outer = (scales.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
        params = _PARAMS.pack(x_map, codes.data_ptr(), codebooks.data_ptr(), *outer, *shared, *launch.sizes)
        launch.multiply.launch(launch.grid, variant.threads, variant.shared_bytes, params, overlap=True)
        if parts is not None:
            params = _ADD_PARAMS.pack(parts.data_ptr(), *outer, *launch.add_sizes)
            launch.add.launch(launch.add_grid, _ADD_THREADS, 0, params, overlap=True)
    return out
