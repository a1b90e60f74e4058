"""The CUDA kernels, each called directly on a GPU, against the numerics contract."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_tensor.kernels import cuda_dequantize, cuda_float32, cuda_lookup, cuda_partial_sums
from aqlm_tensor.kernels.registry import Op, Problem
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_dequantize, assert_input_grad, assert_linear, assert_same_bits
from tests.strategies import Case, Operands, build, cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SCHEMES = st.sampled_from(("2x8g8", "1x8g8", "4x8g8", "2x6g8", "1x4g8")).map(AQLMScheme.parse)
DECODED = st.sampled_from(("2x8g8", "1x8g8", "3x8g8", "8x8g8", "2x5g8", "4x1g8")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 63, 64))
SHAPES = ((11008, 4096), (4096, 1023), (28672, 512), (8, 3000), (1384, 777), (8192, 28672))


def runs(module, op: Op, case: Case) -> bool:
    """Whether the kernel claims to support the case."""
    problem = Problem(
        op,
        case.scheme,
        case.rows,
        case.in_features,
        case.out_features,
        case.partitions or 1,
        case.dtype,
        torch.device("cuda", torch.cuda.current_device()),
    )
    return module.supports(problem) is None


def on_gpu(case: Case) -> Operands:
    return build(case).to("cuda")


@given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS))
def test_lookup(case: Case) -> None:
    assume(runs(cuda_lookup, "linear", case))
    assert_linear(cuda_lookup.linear, on_gpu(case))


@given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=st.just(1)))
def test_partial_sums(case: Case) -> None:
    assume(runs(cuda_partial_sums, "linear", case))
    assert_linear(cuda_partial_sums.linear, on_gpu(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["2x8g8", "1x8g8"])
@pytest.mark.parametrize(("in_features", "out_features"), [shape for shape in SHAPES if shape[0] % 64 == 0])
def test_partial_sums_shapes(scheme: str, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    codes, codebooks, scales, bias, x = random_layer(scheme, in_features, out_features, 1, dtype)
    y = cuda_partial_sums.linear(x, codes, codebooks, scales, bias)
    assert_same_bits(y, cuda_partial_sums.linear(x, codes, codebooks, scales, bias), "a second run gave other bits")
    error = relative_error(y, x.double() @ dense(codes, codebooks, scales).T + bias.double())
    assert error < {torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]


@given(case=cases(schemes=DECODED, dtypes=st.just(torch.float32), rows=ROWS))
def test_float32(case: Case) -> None:
    assume(runs(cuda_float32, "linear", case))
    assert_linear(cuda_float32.linear, on_gpu(case))


@given(case=cases(schemes=DECODED))
def test_dequantize(case: Case) -> None:
    assume(runs(cuda_dequantize, "dequantize", case))
    assert_dequantize(cuda_dequantize.dequantize, on_gpu(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["2x8g8", "1x8g8"])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 16, 64])
def test_layer_shapes(scheme: str, in_features: int, out_features: int, rows: int, dtype: torch.dtype) -> None:
    codes, codebooks, scales, bias, x = random_layer(scheme, in_features, out_features, rows, dtype)
    y = cuda_lookup.linear(x, codes, codebooks, scales, bias)
    again = cuda_lookup.linear(x, codes, codebooks, scales, bias)
    assert_same_bits(y, again, "a second run gave other bits")
    error = relative_error(y, x.double() @ dense(codes, codebooks, scales).T + bias.double())
    assert error < {torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("scheme", ["2x8g8", "4x8g8"])
@pytest.mark.parametrize("rows", [1, 40])
def test_entries_near_the_end_of_float16(scheme: str, rows: int) -> None:
    """Sums of entries may leave float16's range although the weight, scaled, does not."""
    codes, codebooks, scales, _, x = random_layer(scheme, 256, 64, rows, torch.float16)
    codebooks = (codebooks.float().clamp(-2, 2) * 32_000).half()
    scales = (scales.float() / 100_000).half()
    y = cuda_lookup.linear(x, codes, codebooks, scales, None)
    assert relative_error(y, x.double() @ dense(codes, codebooks, scales).T) < 1e-3


@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("rows", [1, 40])
def test_partitions(partitions: int, rows: int) -> None:
    case = Case(AQLMScheme.parse("2x8g8"), 300 * partitions, 96, rows, torch.bfloat16, partitions, bias=True)
    assert_linear(cuda_lookup.linear, on_gpu(case))
    assert_input_grad(cuda_dequantize.linear_input_grad, on_gpu(case))


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_dequantize, "WORKSPACE_BYTES", 100_000)
    case = Case(AQLMScheme.parse("2x8g8"), 600, 96, 100, torch.bfloat16, 2, bias=True)
    assert_linear(cuda_dequantize.linear, on_gpu(case))
    assert_input_grad(cuda_dequantize.linear_input_grad, on_gpu(case))
    assert_linear(cuda_dequantize.linear, on_gpu(replace(case, dtype=torch.float32)))


def test_sliced_codes() -> None:
    """Rows of codes that start at odd addresses or lie farther apart than they are long are read where they are."""
    codes, codebooks, scales, bias, x = random_layer("2x8g8", 1024, 200, 4, torch.bfloat16)
    whole = cuda_lookup.linear(x, codes, codebooks, scales, bias)
    for start in (0, 1, 8):
        part, some = codes[:, start:], x[:, start * 8 :]
        expected = cuda_lookup.linear(some.contiguous(), part.contiguous(), codebooks, scales, bias)
        torch.testing.assert_close(cuda_lookup.linear(some, part, codebooks, scales, bias), expected)
    assert_same_bits(whole[:, 50:], cuda_lookup.linear(x, codes[50:], codebooks, scales[50:], bias[50:]))


def test_graph_capture_and_streams() -> None:
    codes, codebooks, scales, bias, x = random_layer("2x8g8", 2048, 1024, 3, torch.bfloat16)
    expected = cuda_lookup.linear(x, codes, codebooks, scales, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_lookup.linear(x, codes, codebooks, scales, bias)
    x.mul_(2)
    graph.replay()
    assert_same_bits(y, cuda_lookup.linear(x, codes, codebooks, scales, bias))
    assert not torch.equal(y, expected)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outputs = []
    for stream in streams * 8:
        with torch.cuda.stream(stream):
            outputs.append(cuda_lookup.linear(x, codes, codebooks, scales, bias))
    torch.cuda.synchronize()
    for output in outputs:
        assert_same_bits(output, y)


def test_large_index() -> None:
    """Weights of more than 2^31 elements."""
    codes, codebooks, scales, _, x = random_layer("1x8g8", 8192, 300_000, 2, torch.bfloat16)
    y = cuda_lookup.linear(x, codes, codebooks, scales, None)
    tail = slice(299_000, None)
    assert relative_error(y[:, tail], x.double() @ dense(codes[tail], codebooks, scales[tail]).T) < 4e-3
    weight = cuda_dequantize.dequantize(codes, codebooks, scales)
    assert relative_error(weight[tail], dense(codes[tail], codebooks, scales[tail])) < 4e-3


def random_layer(
    scheme: str, in_features: int, out_features: int, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, codebooks, scales, bias and x on the GPU, drawn there."""
    books = AQLMScheme.parse(scheme).num_codebooks
    codes = torch.randint(-128, 128, (out_features, in_features // 8, books), dtype=torch.int8, device="cuda")
    codebooks = torch.randn(books, 256, 1, 8, device="cuda").to(dtype)
    scales = torch.rand(out_features, 1, 1, 1, device="cuda").add(0.5).to(dtype)
    bias = torch.randn(out_features, device="cuda").to(dtype)
    return codes, codebooks, scales, bias, torch.randn(rows, in_features, device="cuda").to(dtype)


def dense(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight in float64."""
    indices = codes.long() & 255
    groups = sum(codebooks[c, indices[..., c], 0].double() for c in range(codes.shape[2]))
    assert isinstance(groups, torch.Tensor)
    return groups.flatten(1) * scales.double().view(-1, 1)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())
