"""The lookup kernel's form for Hopper: compiled anywhere, its plans checked anywhere, run on a GPU that has it."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_tensor.kernels import cuda_lookup, cuda_lookup_hopper, cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import Shape
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_linear, assert_same_bits
from tests.kernels.gpu_layers import ERRORS, product, random_layer, relative_error
from tests.strategies import Case, build, cases

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")]
LIMIT = 232448  # bytes of shared memory of a block
SCHEMES = st.sampled_from(("2x8g8", "1x8g8", "4x8g8", "2x6g8")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 3, 8, 9, 16, 17, 32, 33, 64))


@pytest.fixture
def _whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_lookup_hopper, "wins", lambda _: True)


@pytest.mark.parametrize("tokens", [1, 24, 64])
@pytest.mark.parametrize(("books", "groups"), [(1, 512), (2, 128), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiles(books: int, groups: int, tokens: int, dtype: torch.dtype) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    shape = Shape(books, 8, tokens, 4096, groups, 1)
    defines = cuda_lookup_hopper.plan_defines(shape, cuda_lookup_hopper.choose_plan(shape, 132), dtype)
    assert b"lookup_wgmma" in cuda_runtime.compile_source("lookup_wgmma.cu", defines, "sm_90a")


@pytest.mark.parametrize("books", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 9, 17, 64])
@pytest.mark.parametrize("partitions", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "groups"), [(4096, 512), (28672, 1024), (8192, 3584), (1, 16), (1000, 176), (10**6, 16)]
)
def test_plans(rows: int, groups: int, partitions: int, tokens: int, books: int) -> None:
    plan = cuda_lookup_hopper.choose_plan(Shape(books, 8, tokens, rows, groups, partitions), 132)
    tiles = math.ceil(rows / 16)
    assert plan.shared_bytes <= LIMIT
    assert plan.token_tiles * 8 >= tokens
    assert plan.grid[0] <= tiles
    assert plan.grid[0] * plan.grid[1] * plan.grid[2] <= 132
    assert plan.k_groups == 1 or math.ceil(tiles / plan.grid[0]) * plan.k_groups <= 16


class TestOnHopper:
    pytestmark = needs_hopper

    @given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS))
    def test_contract(self, case: Case) -> None:
        operands = build(case).to("cuda")
        shape = Shape(case.scheme.num_codebooks, 8, case.rows, 1, case.in_features // 8, 1)
        assume(case.rows > 0 and operands.parts[0].numel() and cuda_lookup_hopper.runs(shape, operands.parts[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_lookup_hopper, "wins", lambda _: True)
            assert_linear(cuda_lookup.linear, operands)

    @pytest.mark.usefixtures("_whole_range")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scheme", ["1x8g8", "2x8g8", "4x8g8"])
    @pytest.mark.parametrize("rows", [1, 8, 13, 17, 33, 64])
    @pytest.mark.parametrize(
        ("in_features", "out_features"),
        [(128, 40), (1024, 300), (4224, 3000), (28672, 512), (8192, 28672), (256, 40000)],
    )
    def test_shapes(self, in_features: int, out_features: int, rows: int, scheme: str, dtype: torch.dtype) -> None:
        """Few and many row tiles per block, split sums, superblocks that end beyond the last group."""
        codes, codebooks, scales, bias, x = random_layer(scheme, in_features, out_features, rows, dtype)
        y = cuda_lookup.linear(x, codes, codebooks, scales, bias)
        assert_same_bits(y, cuda_lookup.linear(x, codes, codebooks, scales, bias), "a second run gave other bits")
        assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < ERRORS[dtype]
        assert torch.isfinite(y).all()

    @pytest.mark.usefixtures("_whole_range")
    @pytest.mark.parametrize("rows", [1, 40])
    def test_partitions(self, rows: int) -> None:
        case = Case(AQLMScheme.parse("2x8g8"), 600, 128, rows, torch.bfloat16, 2, bias=True)
        assert_linear(cuda_lookup.linear, build(case).to("cuda"))
