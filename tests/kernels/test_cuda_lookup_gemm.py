"""The product of many tokens with looked-up weights on Hopper: compiled and planned anywhere, run where it can."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_tensor.kernels import cuda_lookup_gemm, cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import Shape
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_linear, assert_same_bits
from tests.kernels.gpu_layers import (
    ERRORS,
    assert_captured_and_on_streams,
    assert_empty,
    needs_hopper,
    product,
    random_layer,
    relative_error,
    runs,
)
from tests.strategies import Case, build, cases

LIMIT = 232448  # bytes of shared memory of a block
SCHEMES = st.sampled_from(("2x8g8", "1x8g8", "4x8g8", "2x6g8")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 8, 65, 127, 128, 129, 256, 300))
WHOLE_VECTORS = st.sampled_from((16, 32, 48, 128, 144, 512))  # groups: lanes load 16 codes at once


@pytest.mark.parametrize("tokens", [100, 512])
@pytest.mark.parametrize("books", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiles(books: int, tokens: int, dtype: torch.dtype) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    shape = Shape(books, 8, tokens, 4096, 512, 1)
    defines = cuda_lookup_gemm.plan_defines(shape, cuda_lookup_gemm.choose_plan(shape, 132), dtype)
    code = cuda_runtime.compile_source("lookup_gemm.cu", defines, "sm_90a")
    assert b"lookup_gemm" in code
    assert b"arrange_x" in code


@pytest.mark.parametrize("books", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 65, 200, 300, 2048, 100_000])
@pytest.mark.parametrize("partitions", [1, 3, 200])
@pytest.mark.parametrize("rows", [1, 1000, 28672])
def test_plans(rows: int, partitions: int, tokens: int, books: int) -> None:
    plan = cuda_lookup_gemm.choose_plan(Shape(books, 8, tokens, rows, 512, partitions), 132)
    assert plan.shared_bytes <= LIMIT
    assert plan.grid[0] % 2 == 0, "whole clusters"
    assert 2 <= plan.grid[0] <= 132
    assert plan.grid[0] // 2 <= math.ceil(rows / 256) * math.ceil(tokens / (8 * plan.token_tiles))
    assert plan.grid[0] * plan.grid[1] * plan.grid[2] <= max(132, 2 * partitions)
    assert 1 <= plan.grid[1] <= 8
    assert plan.grid[2] == partitions


class TestOnHopper:
    pytestmark = needs_hopper

    @given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS), groups=WHOLE_VECTORS)
    def test_contract(self, case: Case, groups: int) -> None:
        case = replace(case, in_groups=groups)
        # the error of all outputs together is bounded for independent ones; 300 times the same row of x gives few
        assume(case.out_features > 0 and case.x_layout != "expanded")
        assert runs(cuda_lookup_gemm, "linear", case)
        assert_linear(cuda_lookup_gemm.linear, build(case).to("cuda"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scheme", ["1x8g8", "2x8g8", "4x8g8"])
    @pytest.mark.parametrize("rows", [65, 128, 200, 384, 700])
    @pytest.mark.parametrize(
        ("in_features", "out_features"), [(128, 40), (1024, 301), (4224, 3000), (28672, 512), (1152, 9000)]
    )
    def test_shapes(self, in_features: int, out_features: int, rows: int, scheme: str, dtype: torch.dtype) -> None:
        """Few and many tiles per cluster, rows and groups that end within a tile, an odd number of rows."""
        codes, codebooks, scales, bias, x = random_layer(scheme, in_features, out_features, rows, dtype)
        y = cuda_lookup_gemm.linear(x, codes, codebooks, scales, bias)
        for _ in range(3):
            again = cuda_lookup_gemm.linear(x, codes, codebooks, scales, bias)
            assert_same_bits(y, again, "another run gave other bits")
        assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < ERRORS[dtype]

    def test_large(self) -> None:
        """All clusters take several tiles, and tiles of 512 tokens share rows."""
        codes, codebooks, scales, bias, x = random_layer("2x8g8", 8192, 28672, 512, torch.bfloat16)
        y = cuda_lookup_gemm.linear(x, codes, codebooks, scales, bias)
        assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < 4e-3

    @pytest.mark.parametrize("rows", [70, 300])
    def test_partitions(self, rows: int) -> None:
        case = Case(AQLMScheme.parse("2x8g8"), 600, 128, rows, torch.bfloat16, 2, bias=True)
        assert_linear(cuda_lookup_gemm.linear, build(case).to("cuda"))
        assert_linear(cuda_lookup_gemm.linear, build(replace(case, out_groups=603, partitions=3)).to("cuda"))

    def test_rows_of_x_and_codes_apart(self) -> None:
        codes, codebooks, scales, bias, x = random_layer("2x8g8", 2048, 300, 100, torch.float16)
        whole = cuda_lookup_gemm.linear(x, codes, codebooks, scales, bias)
        assert_same_bits(whole[:, 50:], cuda_lookup_gemm.linear(x, codes[50:], codebooks, scales[50:], bias[50:]))
        for start in (64, 3):
            part, some = codes[:, start : start + 128], x[:, start * 8 : start * 8 + 1024]
            y = cuda_lookup_gemm.linear(some, part, codebooks, scales, None)
            assert relative_error(y, product(some, part, codebooks, scales)) < 1e-3

    def test_empty(self) -> None:
        assert_empty(cuda_lookup_gemm.linear, random_layer("2x8g8", 128, 24, 70, torch.float16))

    def test_graph_capture_and_streams(self) -> None:
        assert_captured_and_on_streams(cuda_lookup_gemm.linear, random_layer("2x8g8", 2048, 1024, 200, torch.bfloat16))
