"""The CUDA kernels, each called directly on a GPU, against the numerics contract."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_tensor.kernels import (
    cuda_dequantize,
    cuda_float32,
    cuda_lookup,
    cuda_partial_sums,
    cuda_sliced_codebook,
    pieces,
)
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_dequantize, assert_input_grad, assert_linear, assert_same_bits
from tests.kernels.gpu_layers import (
    ERRORS,
    Linear,
    assert_captured_and_on_streams,
    assert_empty,
    dense,
    product,
    random_layer,
    relative_error,
    runs,
)
from tests.strategies import Case, Operands, build, cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SCHEMES = st.sampled_from(("2x8g8", "1x8g8", "4x8g8", "2x6g8", "1x4g8", "2x12g8", "1x9g8")).map(AQLMScheme.parse)
TABLES = st.sampled_from(("2x8g8", "1x8g8", "4x4g8", "2x6g16", "1x2g8", "4x8g16", "8x8g32")).map(AQLMScheme.parse)
WIDE = st.sampled_from(("2x12g8", "1x12g8", "2x9g8", "1x10g8")).map(AQLMScheme.parse)
DECODED = st.sampled_from(
    ("2x8g8", "1x8g8", "3x8g8", "8x8g8", "2x5g8", "4x1g8", "2x12g8", "3x8g16", "2x8g24", "8x8g32", "1x16g8", "1x6g64")
).map(AQLMScheme.parse)
FLOAT32 = st.sampled_from(("2x8g8", "1x8g8", "3x8g8", "8x8g8", "2x5g8", "4x1g8")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 63, 64))
SHAPES = ((11008, 4096), (4096, 1023), (28672, 512), (16, 3000), (1392, 777), (8192, 28672))  # in, out
FEW_TOKENS = [  # kernels that read the codes, and schemes they are for
    pytest.param(cuda_lookup.linear, "2x8g8", id="2x8g8"),
    pytest.param(cuda_lookup.linear, "1x8g8", id="1x8g8"),
    pytest.param(cuda_lookup.linear, "2x12g8", id="2x12g8"),
    pytest.param(cuda_sliced_codebook.linear, "1x16g8", id="1x16g8"),
    pytest.param(cuda_sliced_codebook.linear, "1x16g16", id="1x16g16"),
]
PARTIAL_SUMS = [
    pytest.param(cuda_partial_sums.linear, "2x8g8", id="partial sums"),
    pytest.param(cuda_partial_sums.linear, "8x8g32", id="partial sums 8x8g32"),
]


def on_gpu(case: Case) -> Operands:
    return build(case).to("cuda")


@given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS))
def test_lookup(case: Case) -> None:
    assume(runs(cuda_lookup, "linear", case))
    assert_linear(cuda_lookup.linear, on_gpu(case))


@given(case=cases(schemes=TABLES, dtypes=HALF, rows=st.just(1)))
def test_partial_sums(case: Case) -> None:
    assume(runs(cuda_partial_sums, "linear", case))
    assert_linear(cuda_partial_sums.linear, on_gpu(case))


@given(case=cases(schemes=WIDE, dtypes=HALF, rows=st.just(1)))
def test_partial_sums_of_wide_codes(case: Case) -> None:
    case = replace(case, in_groups=case.in_groups + -case.in_groups % 8)  # whole vectors of codes for each lane
    assume(runs(cuda_partial_sums, "linear", case))
    assert_linear(cuda_partial_sums.linear, on_gpu(case))


@given(case=cases(schemes=TABLES, dtypes=HALF, rows=st.sampled_from((2, 3, 4, 5, 9))))
def test_partial_sums_of_few_tokens(case: Case) -> None:
    case = replace(case, in_groups=case.in_groups + -case.in_groups % 16)  # whole vectors of codes for each lane
    assume(runs(cuda_partial_sums, "linear", case))
    assert_linear(cuda_partial_sums.linear, on_gpu(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("scheme", "rows"), [*itertools.product(("2x8g8", "1x8g8", "8x8g32", "4x8g16"), (1, 2, 4, 18)), ("2x12g8", 1)]
)
@pytest.mark.parametrize(("in_features", "out_features"), [shape for shape in SHAPES if shape[0] % 128 == 0])
def test_partial_sums_shapes(scheme: str, in_features: int, out_features: int, rows: int, dtype: torch.dtype) -> None:
    codes, codebooks, scales, bias, x = random_layer(scheme, in_features, out_features, rows, dtype)
    y = cuda_partial_sums.linear(x, codes, codebooks, scales, bias)
    assert_same_bits(y, cuda_partial_sums.linear(x, codes, codebooks, scales, bias), "a second run gave other bits")
    error = relative_error(y, product(x, codes, codebooks, scales) + bias.double())
    assert error < ERRORS[dtype]


@given(case=cases(schemes=FLOAT32, dtypes=st.just(torch.float32), rows=ROWS))
def test_float32(case: Case) -> None:
    assume(runs(cuda_float32, "linear", case))
    assert_linear(cuda_float32.linear, on_gpu(case))


@given(case=cases(schemes=DECODED))
def test_dequantize(case: Case) -> None:
    assume(runs(cuda_dequantize, "dequantize", case))
    assert_dequantize(cuda_dequantize.dequantize, on_gpu(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["2x8g8", "3x8g16", "8x8g32", "2x12g8", "1x16g8", "1x16g16"])
@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 1023), (96, 40), (11008, 300)])
def test_dequantize_shapes(scheme: str, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """Codebooks in shared memory, once or several times, and in global memory; rows that end within a warp's turn."""
    codes, codebooks, scales, _, _ = random_layer(scheme, in_features, out_features, 1, dtype)
    weight = cuda_dequantize.dequantize(codes, codebooks, scales)
    assert relative_error(weight, dense(codes, codebooks, scales)) < ERRORS[dtype]
    assert torch.equal(
        cuda_dequantize.dequantize(codes[3:, 1:], codebooks, scales[3:]), weight[3:, codebooks.shape[3] :]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("linear", "scheme"), FEW_TOKENS)
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 16, 32, 64])
def test_layer_shapes(
    linear: Linear, scheme: str, in_features: int, out_features: int, rows: int, dtype: torch.dtype
) -> None:
    if in_features % AQLMScheme.parse(scheme).in_group_size:
        pytest.skip("groups do not divide the inputs")
    codes, codebooks, scales, bias, x = random_layer(scheme, in_features, out_features, rows, dtype)
    y = linear(x, codes, codebooks, scales, bias)
    assert_same_bits(y, linear(x, codes, codebooks, scales, bias), "a second run gave other bits")
    assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < ERRORS[dtype]


@pytest.mark.parametrize("rows", [65, 128, 200, 256])
def test_several_launches(rows: int) -> None:
    codes, codebooks, scales, bias, x = random_layer("2x8g8", 1024, 600, rows, torch.bfloat16)
    y = cuda_lookup.linear(x, codes, codebooks, scales, bias)
    assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < 4e-3


@pytest.mark.parametrize("scheme", ["2x8g8", "4x8g8"])
@pytest.mark.parametrize("rows", [1, 40])
def test_entries_near_the_end_of_float16(scheme: str, rows: int) -> None:
    """Sums of entries may leave float16's range although the weight, scaled, does not."""
    codes, codebooks, scales, _, x = random_layer(scheme, 256, 64, rows, torch.float16)
    codebooks = (codebooks.float().clamp(-2, 2) * 32_000).half()
    scales = (scales.float() / 100_000).half()
    y = cuda_lookup.linear(x, codes, codebooks, scales, None)
    assert relative_error(y, product(x, codes, codebooks, scales)) < 1e-3


@pytest.mark.parametrize(("linear", "scheme"), FEW_TOKENS)
@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("rows", [1, 40])
def test_partitions(linear: Linear, scheme: str, partitions: int, rows: int) -> None:
    case = Case(AQLMScheme.parse(scheme), 300 * partitions, 96, rows, torch.bfloat16, partitions, bias=True)
    assert_linear(linear, on_gpu(case))
    assert_linear(linear, on_gpu(replace(case, in_groups=13, values="exact")))
    assert_input_grad(cuda_dequantize.linear_input_grad, on_gpu(case))


@pytest.mark.parametrize(
    ("scheme", "rows"),
    [*itertools.product(("2x8g8", "1x8g8", "2x6g8", "8x8g32", "4x8g8"), (1, 3, 6)), ("2x12g8", 1)],
)
def test_partial_sums_partitions(rows: int, scheme: str) -> None:
    case = Case(AQLMScheme.parse(scheme), 300 * 3, 96, rows, torch.bfloat16, 3, bias=True)
    for values in ("normal", "wide", "exact", "nonfinite", "bad_entry"):
        for dtype in (torch.float16, torch.bfloat16):
            assert_linear(cuda_partial_sums.linear, on_gpu(replace(case, dtype=dtype, values=values)))


@pytest.mark.parametrize("workspace", [50_000, 100_000, 500_000])
@pytest.mark.parametrize("scheme", ["2x8g8", "1x16g8"])
def test_pieces(scheme: str, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a partition, and several partitions in one."""
    monkeypatch.setattr(pieces, "WORKSPACE_BYTES", workspace)
    case = Case(AQLMScheme.parse(scheme), 900, 96, 100, torch.bfloat16, 3, bias=True)
    assert_linear(cuda_dequantize.linear, on_gpu(case))
    assert_linear(cuda_dequantize.linear, on_gpu(replace(case, bias=False)))
    assert_input_grad(cuda_dequantize.linear_input_grad, on_gpu(case))
    assert_linear(cuda_dequantize.linear, on_gpu(replace(case, dtype=torch.float32)))


@pytest.mark.parametrize(("linear", "scheme"), [*FEW_TOKENS, *PARTIAL_SUMS])
def test_sliced_codes(linear: Linear, scheme: str) -> None:
    """Rows of codes that start at odd addresses or lie farther apart than they are long are read where they are."""
    codes, codebooks, scales, bias, x = random_layer(scheme, 1024, 200, 4, torch.bfloat16)
    whole = linear(x, codes, codebooks, scales, bias)
    for start in (0, 1, 8) if linear is not cuda_partial_sums.linear else (0, 8):
        part, some = codes[:, start:], x[:, start * codebooks.shape[3] :]
        expected = linear(some.contiguous(), part.contiguous(), codebooks, scales, bias)
        torch.testing.assert_close(linear(some, part, codebooks, scales, bias), expected)
    first = 48 if linear is cuda_partial_sums.linear else 50  # that order of adding depends on a row's place among 8
    assert_same_bits(whole[:, first:], linear(x, codes[first:], codebooks, scales[first:], bias[first:]))


@pytest.mark.parametrize(("linear", "scheme"), [*FEW_TOKENS, *PARTIAL_SUMS])
def test_empty(linear: Linear, scheme: str) -> None:
    assert_empty(linear, random_layer(scheme, 128, 24, 3, torch.float16))


@pytest.mark.parametrize(("linear", "scheme"), [*FEW_TOKENS, *PARTIAL_SUMS])
def test_graph_capture_and_streams(linear: Linear, scheme: str) -> None:
    assert_captured_and_on_streams(linear, random_layer(scheme, 2048, 1024, 3, torch.bfloat16))


@pytest.mark.parametrize(("linear", "scheme"), [*FEW_TOKENS, *PARTIAL_SUMS])
@pytest.mark.parametrize("rows", [1, 4])
def test_operands_written_by_the_kernel_before(linear: Linear, scheme: str, rows: int) -> None:
    """A kernel that starts before the one ahead of it has ended still reads what that wrote, weights included."""
    first = random_layer(scheme, 4096, 4096, rows, torch.bfloat16)
    second = random_layer(scheme, 4096, 4096, rows, torch.bfloat16)
    expected = []
    for codes, codebooks, scales, bias, x in (first, second):
        torch.cuda.synchronize()
        expected.append(linear(x, codes, codebooks, scales, bias))
    now = [operand.clone() for operand in first]
    outputs = []
    for step in range(20):
        for operand, source in zip(now, (first, second)[step % 2], strict=True):
            operand.copy_(source)
        codes, codebooks, scales, bias, x = now
        outputs.append(linear(x, codes, codebooks, scales, bias))
    for step, output in enumerate(outputs):
        assert_same_bits(output, expected[step % 2])


@pytest.mark.parametrize(
    ("linear", "scheme"), [(cuda_lookup.linear, "1x8g8"), (cuda_sliced_codebook.linear, "1x16g8")], ids=["8", "16"]
)
def test_large_index(linear: Linear, scheme: str) -> None:
    """Weights of more than 2^31 elements."""
    codes, codebooks, scales, _, x = random_layer(scheme, 8192, 300_000, 2, torch.bfloat16)
    y = linear(x, codes, codebooks, scales, None)
    tail = slice(299_000, None)
    assert relative_error(y[:, tail], product(x, codes[tail], codebooks, scales[tail])) < 4e-3
    weight = cuda_dequantize.dequantize(codes, codebooks, scales)
    assert relative_error(weight[tail], dense(codes[tail], codebooks, scales[tail])) < 4e-3
