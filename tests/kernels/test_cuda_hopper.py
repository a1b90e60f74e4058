"""The lookup kernel's two forms for Hopper: compiled and planned anywhere, run on a GPU that has it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_tensor.kernels import cuda_lookup, cuda_lookup_hopper, cuda_lookup_stream, cuda_runtime
from aqlm_tensor.kernels.cuda_linear_launch import Shape
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_linear, assert_same_bits
from tests.kernels.gpu_layers import ERRORS, needs_hopper, product, random_layer, relative_error
from tests.strategies import Case, build, cases

LIMIT = 232448  # bytes of shared memory of a block
SCHEMES = st.sampled_from(("2x8g8", "1x8g8", "4x8g8", "2x6g8", "2x1g8")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 3, 8, 9, 16, 17, 32, 33, 64))
SHAPES = ((4096, 512), (28672, 1024), (8192, 3584), (1, 16), (1000, 176), (10**6, 16))  # rows, groups


@pytest.mark.parametrize("tokens", [1, 9, 24, 64])
@pytest.mark.parametrize(("books", "groups"), [(1, 512), (2, 128), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiles(books: int, groups: int, tokens: int, dtype: torch.dtype) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    shape = Shape(books, 8, tokens, 4096, groups, 1)
    if fits(shape):
        plan = cuda_lookup_stream.choose_plan(shape, 132, LIMIT)
        defines, name = cuda_lookup_stream.plan_defines(shape, plan, dtype), "lookup_stream"
    else:
        plan = cuda_lookup_hopper.choose_plan(shape, 132)
        defines, name = cuda_lookup_hopper.plan_defines(shape, plan, dtype), "lookup_wgmma"
    assert name.encode() in cuda_runtime.compile_source(f"{name}.cu", defines, "sm_90a")


@pytest.mark.parametrize(("books", "nbits"), [(1, 8), (2, 8), (4, 8), (2, 1)])
@pytest.mark.parametrize("tokens", [1, 9, 17, 64])
@pytest.mark.parametrize("partitions", [1, 2, 3])
@pytest.mark.parametrize(("rows", "groups"), SHAPES)
def test_plans(rows: int, groups: int, partitions: int, tokens: int, books: int, nbits: int) -> None:
    plan = cuda_lookup_hopper.choose_plan(Shape(books, nbits, tokens, rows, groups, partitions), 132)
    tiles = math.ceil(rows / 16)
    assert plan.shared_bytes <= LIMIT
    assert plan.token_tiles * 8 >= tokens
    assert plan.grid[0] <= tiles
    assert plan.grid[0] * plan.grid[1] * plan.grid[2] <= 132
    assert plan.k_groups == 1 or math.ceil(tiles / plan.grid[0]) * plan.k_groups <= 16
    assert plan.box_tiles >= min(16 // plan.k_groups, math.ceil(tiles / plan.grid[0]))
    assert plan.slots >= plan.k_groups
    assert plan.slots % plan.k_groups == 0
    assert plan.code_slots >= plan.k_groups


@pytest.mark.parametrize(("books", "nbits"), [(1, 8), (2, 8), (4, 8), (2, 1)])
@pytest.mark.parametrize("tokens", [1, 9, 32])
@pytest.mark.parametrize("partitions", [1, 200])
@pytest.mark.parametrize(("rows", "groups"), SHAPES)
def test_plans_for_few_tokens(rows: int, groups: int, partitions: int, tokens: int, books: int, nbits: int) -> None:
    tokens = min(tokens, cuda_lookup_stream.max_tokens(books))
    plan = cuda_lookup_stream.choose_plan(Shape(books, nbits, tokens, rows, groups, partitions), 132, LIMIT)
    tiles = math.ceil(rows / 16)
    assert plan.shared_bytes <= LIMIT
    assert plan.stages >= 2
    assert plan.token_tiles * 8 >= tokens
    assert plan.grid[0] <= tiles
    assert math.ceil(tiles / plan.grid[0]) <= plan.row_tiles * plan.row_warps <= 14


def fits(shape: Shape) -> bool:
    return shape.tokens <= cuda_lookup_stream.max_tokens(shape.books)


@pytest.fixture
def _whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_lookup_stream, "wins", fits)


class TestOnHopper:
    pytestmark = needs_hopper

    @given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS))
    def test_contract(self, case: Case) -> None:
        operands = build(replace(case, in_groups=16 * case.in_groups)).to("cuda")
        assume(case.rows > 0 and operands.parts[0].numel())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_lookup_stream, "wins", fits)
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

    @pytest.mark.usefixtures("_whole_range")
    @pytest.mark.parametrize("rows", [4, 40])
    def test_past_the_last_codes(self, rows: int) -> None:
        """An entry that is not finite only reaches the rows that use it, though copies end beyond the last group."""
        codes, codebooks, scales, bias, x = random_layer("2x8g8", 320, 100, rows, torch.bfloat16)
        codes[codes == 0] = 1
        codebooks[:, 0] = math.inf
        assert torch.isfinite(cuda_lookup.linear(x, codes, codebooks, scales, bias)).all()

    @pytest.mark.usefixtures("_whole_range")
    @pytest.mark.parametrize("rows", [4, 40])
    def test_strided_rows(self, rows: int) -> None:
        """Rows of x that lie farther apart, and the same row again and again, which no tensor map can describe."""
        codes, codebooks, scales, bias, x = random_layer("2x8g8", 1024, 300, rows, torch.bfloat16)
        y = cuda_lookup.linear(x, codes, codebooks, scales, bias)
        apart = torch.cat((x, x), 1)[:, :1024]
        assert_same_bits(y, cuda_lookup.linear(apart, codes, codebooks, scales, bias))
        again = cuda_lookup.linear(x[:1].expand(rows, -1), codes, codebooks, scales, bias)
        assert relative_error(again, y[:1].expand(rows, -1)) < ERRORS[torch.bfloat16]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(4224, 3000), (256, 40000), (4096, 4096)])
    def test_the_wgmma_form_with_32_tokens(
        self, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cuda_lookup_stream, "wins", lambda _: False)
        codes, codebooks, scales, bias, x = random_layer("2x8g8", *shape, 32, dtype)
        y = cuda_lookup.linear(x, codes, codebooks, scales, bias)
        assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < ERRORS[dtype]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("rows", [3, 16, 30, 64])
    def test_the_portable_form(self, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_lookup_hopper, "runs", lambda *_: False)
        codes, codebooks, scales, bias, x = random_layer("2x8g8", 4096, 3000, rows, dtype)
        y = cuda_lookup.linear(x, codes, codebooks, scales, bias)
        assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < ERRORS[dtype]
