"""Every CUDA source compiles for every supported architecture, and the runtime's cache; none of it needs a GPU."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from aqlm_tensor.kernels import (
    cuda_dequantize,
    cuda_few_tokens,
    cuda_lookup,
    cuda_runtime,
    cuda_sliced_codebook,
)
from aqlm_tensor.kernels.cuda_linear_launch import Shape

pytest.importorskip("cuda.core", reason="needs cuda-core")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs the CUDA bindings of cuda-core")

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
# multiprocessors and the most shared memory of a block: RTX 2080, A100, RTX 4090, H100
DEVICES = ((46, 65536), (108, 166912), (128, 101376), (132, 232448))


def shared_limit(arch: str) -> int:
    return 65536 if arch == "sm_75" else 101376 if arch in ("sm_86", "sm_89", "sm_120") else 166912


def lookup_defines(tokens: int, arch: str, nbits: int) -> tuple[tuple[str, int], ...]:
    limit = shared_limit(arch)
    shape = Shape(2, nbits, tokens, 4096, 512, 1)
    plan = cuda_lookup.choose_plan(shape, 40, limit)
    assert plan is not None
    return cuda_lookup.variant_defines(shape, plan, torch.float16 if arch == "sm_75" else torch.bfloat16, tokens > 1)


def each_first_elsewhere_in_full(*variants: tuple[Any, ...]) -> list[Any]:
    """Each variant for each architecture; all but the first only for the oldest and Hopper outside `make test-full`."""
    quick = {(arch, *variant) for arch in ("sm_75", "sm_90a") for variant in variants}
    quick |= {(arch, *variants[0]) for arch in ARCHITECTURES}
    return [
        pytest.param(*case, marks=() if case in quick else pytest.mark.full)
        for case in ((arch, *variant) for arch, variant in itertools.product(ARCHITECTURES, variants))
    ]


@pytest.mark.parametrize(
    ("arch", "tokens", "nbits"),
    [*each_first_elsewhere_in_full((32, 8), (1, 8)), ("sm_75", 16, 10), ("sm_90a", 16, 12)],
)
def test_lookup_compiles(arch: str, tokens: int, nbits: int) -> None:
    code = cuda_runtime.compile_source("lookup_linear.cu", lookup_defines(tokens, arch, nbits), arch)
    assert b"lookup_linear" in code


@pytest.mark.parametrize(
    ("arch", "tokens", "group", "aligned", "int8"),
    each_first_elsewhere_in_full(
        (64, 8, True, False), (1, 8, True, False), (16, 16, False, False), (1, 8, True, True), (64, 16, False, True)
    ),
)
def test_sliced_codebook_compiles(arch: str, tokens: int, group: int, aligned: bool, int8: bool) -> None:
    shape = cuda_sliced_codebook.Shape(16, group, tokens, 4096, 4096 // group, 1)
    plan = cuda_sliced_codebook.choose_plan(shape, 40, shared_limit(arch), int8)
    dtype = torch.float16 if arch == "sm_75" else torch.bfloat16
    defines = cuda_sliced_codebook.variant_defines(shape, plan, dtype, aligned)
    code = cuda_runtime.compile_source("sliced_codebook.cu", defines, arch)
    assert b"sliced_codebook" in code
    assert b"slice_x" in code


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_others_compile(arch: str) -> None:
    dtype = 0 if arch == "sm_75" else 1
    assert b"finish_linear" in cuda_runtime.compile_source("finish_linear.cu", (("DTYPE_BF16", dtype),), arch)
    defines = (("NUM_BOOKS", 3), ("NBITS", 7), ("TOKENS", 8))
    assert b"lookup_float32" in cuda_runtime.compile_source("lookup_float32.cu", defines, arch)


@pytest.mark.parametrize(
    ("arch", "books", "nbits", "group"),
    [
        ("sm_80", 1, 8, 8),
        ("sm_86", 2, 2, 8),
        ("sm_89", 4, 6, 16),
        ("sm_90a", 8, 8, 32),
        ("sm_100", 8, 8, 8),
        ("sm_120", 2, 8, 16),
    ],
)
def test_partial_sums_compile(arch: str, books: int, nbits: int, group: int) -> None:
    dtype = torch.float16 if arch in ("sm_80", "sm_120") else torch.bfloat16
    defines = cuda_few_tokens.defines(books, nbits, group, dtype)
    assert b"partial_sums" in cuda_runtime.compile_source("partial_sums.cu", defines, arch)
    code = cuda_runtime.compile_source("few_tokens.cu", defines, arch)
    assert b"few_tokens" in code
    assert b"finish_few_tokens" in code
    defines = cuda_few_tokens.defines(min(books, 2), 10 + nbits // 4, 8, dtype)
    assert b"wide_sums" in cuda_runtime.compile_source("wide_sums.cu", defines, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("books", "size", "group", "dtype"),
    [(2, 256, 8, torch.float16), (8, 256, 32, torch.float32), (1, 65536, 16, torch.float16), (2, 4096, 8, None)],
)
def test_dequantize_compiles(books: int, size: int, group: int, dtype: torch.dtype | None, arch: str) -> None:
    if dtype is None:
        dtype = torch.float16 if arch == "sm_75" else torch.bfloat16
    chosen = cuda_dequantize.plan(books, size, group, dtype, shared_limit(arch))
    assert chosen.shared_bytes <= shared_limit(arch)
    code = cuda_runtime.compile_source("dequantize.cu", (*chosen.defines, ("ALIGNED", 1)), arch)
    assert b"dequantize" in code


def test_compile_error_is_reported() -> None:
    with pytest.raises(Exception, match="NUM_BOOKS"):
        cuda_runtime.compile_source("dequantize.cu", (("DTYPE", 1),), "sm_80")


def test_second_process_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQLM_TENSOR_CACHE", str(tmp_path))
    defines = (*cuda_dequantize.plan(1, 256, 8, torch.float32, 65536).defines, ("ALIGNED", 0))
    code = cuda_runtime.cubin("dequantize.cu", defines, "sm_80")
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == code
    assert re.fullmatch(r"dequantize-sm_80-[0-9a-f]{32}\.cubin", file.name)
    monkeypatch.setattr(cuda_runtime, "compile_source", None)  # must not be called again
    assert cuda_runtime.cubin("dequantize.cu", defines, "sm_80") == code


def test_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AQLM_TENSOR_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(cuda_runtime, "compile_source", lambda *_: b"code")
    assert cuda_runtime.cubin("dequantize.cu", (), "sm_80") == b"code"


@pytest.mark.parametrize(("processors", "limit"), DEVICES)
@pytest.mark.parametrize(("books", "nbits"), [(1, 8), (2, 8), (4, 8), (1, 12), (2, 12)])
@pytest.mark.parametrize(("rows", "groups"), [(4096, 512), (28672, 1024), (8192, 3584), (1, 1), (1000, 173)])
def test_plans_fit_the_device(processors: int, limit: int, books: int, nbits: int, rows: int, groups: int) -> None:
    for tokens in (1, 4, 8, 9, 16, 32, 64):
        plan = cuda_lookup.choose_plan(Shape(books, nbits, tokens, rows, groups, 1), processors, limit)
        if plan is None:
            assert tokens > 8 or books * 16 << nbits > limit * 0.6, "8 tokens must fit, beside the codebooks"
            continue
        variant = plan.variant
        assert plan.shared_bytes <= limit
        assert variant.token_tiles * 8 >= tokens
        assert variant.k_warps * variant.row_warps == variant.warps
        assert plan.grid[0] <= -(-rows // 16)
        assert plan.grid[0] * plan.grid[1] <= max(processors, plan.grid[1])


@pytest.mark.parametrize(("processors", "limit"), DEVICES)
@pytest.mark.parametrize(("nbits", "group"), [(16, 8), (16, 16), (9, 8)])
@pytest.mark.parametrize(("rows", "groups"), [(4096, 512), (28672, 1024), (8192, 3584), (1, 1), (1000, 173)])
def test_sliced_codebook_plans_fit_the_device(
    processors: int, limit: int, nbits: int, group: int, rows: int, groups: int
) -> None:
    for tokens, int8 in itertools.product((1, 8, 9, 16, 17, 32, 64), (False, True)):
        for partitions in (1, 3, 200):
            shape = cuda_sliced_codebook.Shape(nbits, group, tokens, rows, groups, partitions)
            plan = cuda_sliced_codebook.choose_plan(shape, processors, limit, int8)
            variant = plan.variant
            assert plan.shared_bytes <= limit
            assert tokens <= (8 if variant.few_tokens else 16 * variant.token_tiles)
            assert variant.warps % plan.row_warps == 0
            assert plan.grid[0] * variant.width == 2 * group * plan.entry_parts
            assert 1 <= plan.grid[1] <= -(-rows // variant.tile_rows)
            k_warps = variant.warps // plan.row_warps
            superblocks = -(-groups // variant.superblock)
            assert k_warps <= superblocks, "every k warp has work, or it would leave the others at a barrier"
            assert plan.slots >= min(2, -(-superblocks // k_warps))
