"""The product of many tokens with gathered entries of a large codebook on Hopper: compiled and planned anywhere."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_tensor.kernels import cuda_gather_gemm, cuda_runtime
from aqlm_tensor.kernels.cuda_gather_gemm import choose_variant, cluster_work
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
TOKENS = (1, 32, 33, 64, 65, 128, 129, 256, 257, 600, 100_000)
SCHEMES = st.sampled_from(("1x16g8", "1x16g16", "1x9g8", "1x12g16")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 17, 33, 65, 129, 257, 520))


@pytest.mark.parametrize(("tokens", "group", "dtype"), [(20, 8, torch.bfloat16), (600, 16, torch.float16)], ids=str)
def test_compiles(tokens: int, group: int, dtype: torch.dtype) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    defines = choose_variant(tokens, group).defines(16, group, dtype)
    code = cuda_runtime.compile_source("gather_gemm.cu", defines, "sm_90a")
    assert b"gather_gemm" in code
    assert b"add_parts" in code


@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_variants_fit(tokens: int, group: int) -> None:
    variant = choose_variant(tokens, group)
    assert variant.shared_bytes <= LIMIT
    assert variant.threads % 128 == 0
    assert variant.cluster <= 8
    assert variant.near_bytes % (2 * group) == 0
    assert 128 // variant.token_blocks // variant.gather_warps >= 8, "a lane gathers at least two pieces"


@given(tiles=st.integers(1, 3000), stages=st.integers(1, 448), clusters=st.integers(1, 132))
def test_work_is_shared(tiles: int, stages: int, clusters: int) -> None:
    """Every stage of every tile belongs to one cluster, none has many more, and whole tiles stay whole."""
    count, quantum = cluster_work(tiles, stages, clusters)
    assert 1 <= count <= clusters
    assert quantum in (1, stages)
    quanta = tiles * stages // quantum
    ends = [c * quanta // count * quantum for c in range(count + 1)]  # as the kernel has it
    assert ends[0] == 0
    assert ends[-1] == tiles * stages
    most = max(last - first for first, last in itertools.pairwise(ends))
    assert most <= max(tiles * stages / clusters / 0.95, 4) + 1
    # The clusters that the adding kernel looks for are those that worked on a tile.
    for tile in {0, tiles // 2, tiles - 1}:
        units = (tile * stages, (tile + 1) * stages - 1)
        first, last = (((unit // quantum + 1) * count - 1) // quanta for unit in units)
        assert ends[first] <= units[0] < ends[first + 1]
        assert ends[last] <= units[1] < ends[last + 1]


class TestOnHopper:
    pytestmark = needs_hopper

    @given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS), stages=st.sampled_from((1, 2, 3, 5, 16)))
    def test_contract(self, case: Case, stages: int) -> None:
        case = replace(case, in_groups=64 * stages // case.scheme.in_group_size)
        # the error of all outputs together is bounded for independent ones; 300 times the same row of x gives few
        assume(case.out_features > 0 and case.x_layout != "expanded")
        assert runs(cuda_gather_gemm, "linear", case)
        assert_linear(cuda_gather_gemm.linear, build(case).to("cuda"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scheme", ["1x16g8", "1x16g16"])
    @pytest.mark.parametrize("rows", [17, 64, 128, 200, 384, 700])
    @pytest.mark.parametrize(
        ("in_features", "out_features"), [(128, 40), (1024, 301), (4224, 3000), (28672, 512), (1152, 9000)]
    )
    def test_shapes(self, in_features: int, out_features: int, rows: int, scheme: str, dtype: torch.dtype) -> None:
        """Few and many tiles per cluster, rows that end within a tile, an odd number of rows."""
        codes, codebooks, scales, bias, x = random_layer(scheme, in_features, out_features, rows, dtype)
        y = cuda_gather_gemm.linear(x, codes, codebooks, scales, bias)
        for _ in range(3):
            again = cuda_gather_gemm.linear(x, codes, codebooks, scales, bias)
            assert_same_bits(y, again, "another run gave other bits")
        assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < ERRORS[dtype]

    @pytest.mark.parametrize("rows", [64, 512, 2048])
    def test_large(self, rows: int) -> None:
        """All clusters take several tiles."""
        codes, codebooks, scales, bias, x = random_layer("1x16g8", 8192, 28672, rows, torch.bfloat16)
        y = cuda_gather_gemm.linear(x, codes, codebooks, scales, bias)
        assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < 4e-3

    def test_rows_of_x_and_codes_apart(self) -> None:
        codes, codebooks, scales, bias, x = random_layer("1x16g8", 2048, 300, 100, torch.float16)
        rows = cuda_gather_gemm.linear(x, codes[172:], codebooks, scales[172:], bias[172:])
        assert relative_error(rows, product(x, codes[172:], codebooks, scales[172:]) + bias[172:].double()) < 1e-3
        for start in (64, 3):
            part, some = codes[:, start : start + 128], x[:, start * 8 : start * 8 + 1024]
            y = cuda_gather_gemm.linear(some, part, codebooks, scales, None)
            assert relative_error(y, product(some, part, codebooks, scales)) < 1e-3

    @pytest.mark.parametrize("rows", [30, 300])
    def test_nonfinite_tokens_stay_alone(self, rows: int) -> None:
        codes, codebooks, scales, bias, x = random_layer("1x16g8", 1024, 301, rows, torch.bfloat16)
        clean = cuda_gather_gemm.linear(x, codes, codebooks, scales, bias)
        x[3, 5], x[17, 900] = math.inf, math.nan
        y = cuda_gather_gemm.linear(x, codes, codebooks, scales, bias)
        others = [row for row in range(rows) if row not in (3, 17)]
        assert_same_bits(y[others], clean[others])
        assert not y[[3, 17]].isfinite().any()

    def test_empty(self) -> None:
        assert_empty(cuda_gather_gemm.linear, random_layer("1x16g8", 128, 24, 70, torch.float16))

    def test_graph_capture_and_streams(self) -> None:
        assert_captured_and_on_streams(cuda_gather_gemm.linear, random_layer("1x16g8", 2048, 1024, 200, torch.bfloat16))
