"""The CUDA kernel for one large codebook, called directly on a GPU, against the numerics contract."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_tensor.kernels import cuda_runtime, cuda_sliced_codebook
from aqlm_tensor.kernels.registry import Problem
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_kernel, assert_linear, assert_same_bits
from tests.strategies import LARGE_CASES, Case, build, cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SCHEMES = st.sampled_from(("1x16g8", "1x16g16", "1x12g8", "1x9g16")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 63, 64))
SHAPES = ((4096, 1023), (28672, 520), (16, 3000), (1392, 777), (8192, 4096))  # in_features, out_features
ERRORS = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


@given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS))
def test_contract(case: Case) -> None:
    problem = Problem(
        "linear",
        case.scheme,
        case.rows,
        case.in_features,
        case.out_features,
        case.partitions or 1,
        case.dtype,
        torch.device("cuda", torch.cuda.current_device()),
    )
    assume(cuda_sliced_codebook.supports(problem) is None)
    assert_kernel("cuda_sliced_codebook", "linear", build(case).to("cuda"))


@pytest.mark.parametrize("name", ["one token 1x16", "1x16g16, wide input"])
def test_large_cases(name: str) -> None:
    assert_kernel("cuda_sliced_codebook", "linear", build(LARGE_CASES[name]).to("cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["1x16g8", "1x16g16"])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 16, 32, 64])
def test_layer_shapes(scheme: str, in_features: int, out_features: int, rows: int, dtype: torch.dtype) -> None:
    codes, codebooks, scales, bias, x = random_layer(scheme, in_features, out_features, rows, dtype)
    y = cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias)
    again = cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias)
    assert_same_bits(y, again, "a second run gave other bits")
    assert relative_error(y, x.double() @ dense(codes, codebooks, scales).T + bias.double()) < ERRORS[dtype]


@pytest.mark.parametrize("limit", [166_912, 101_376, 65_536])
@pytest.mark.parametrize("scheme", ["1x16g8", "1x16g16"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_less_shared_memory(scheme: str, rows: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices that A100, RTX and Turing GPUs would take give the same product."""
    processors, _ = cuda_runtime.device_limits(torch.cuda.current_device())
    monkeypatch.setattr(cuda_runtime, "device_limits", lambda _: (processors, limit))
    codes, codebooks, scales, bias, x = random_layer(scheme, 2048, 1030, rows, torch.float16)
    y = cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias)
    assert relative_error(y, x.double() @ dense(codes, codebooks, scales).T + bias.double()) < 1e-3


@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("rows", [1, 40])
def test_partitions(partitions: int, rows: int) -> None:
    case = Case(AQLMScheme.parse("1x16g8"), 300 * partitions, 96, rows, torch.bfloat16, partitions, bias=True)
    assert_linear(cuda_sliced_codebook.linear, build(case).to("cuda"))
    assert_linear(cuda_sliced_codebook.linear, build(replace(case, in_groups=13, values="exact")).to("cuda"))


def test_empty() -> None:
    codes, codebooks, scales, bias, x = random_layer("1x16g8", 64, 24, 3, torch.float16)
    assert cuda_sliced_codebook.linear(x[:0], codes, codebooks, scales, bias).shape == (0, 24)
    no_inputs = cuda_sliced_codebook.linear(x[:, :0], codes[:, :0], codebooks, scales, bias)
    assert_same_bits(no_inputs, bias.expand(3, 24))


def test_sliced_codes() -> None:
    """Rows of codes that start at odd addresses or lie farther apart than they are long are read where they are."""
    codes, codebooks, scales, bias, x = random_layer("1x16g8", 1024, 200, 4, torch.bfloat16)
    whole = cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias)
    for start in (0, 1, 8):
        part, some = codes[:, start:], x[:, start * 8 :]
        expected = cuda_sliced_codebook.linear(some.contiguous(), part.contiguous(), codebooks, scales, bias)
        torch.testing.assert_close(cuda_sliced_codebook.linear(some, part, codebooks, scales, bias), expected)
    assert_same_bits(whole[:, 50:], cuda_sliced_codebook.linear(x, codes[50:], codebooks, scales[50:], bias[50:]))


def test_graph_capture_and_streams() -> None:
    codes, codebooks, scales, bias, x = random_layer("1x16g8", 2048, 1024, 3, torch.bfloat16)
    expected = cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias)
    x.mul_(2)
    graph.replay()
    assert_same_bits(y, cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias))
    assert not torch.equal(y, expected)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outputs = []
    for stream in streams * 8:
        with torch.cuda.stream(stream):
            outputs.append(cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias))
    torch.cuda.synchronize()
    for output in outputs:
        assert_same_bits(output, y)


def test_large_index() -> None:
    """Weights of more than 2^31 elements."""
    codes, codebooks, scales, _, x = random_layer("1x16g8", 8192, 300_000, 2, torch.bfloat16)
    y = cuda_sliced_codebook.linear(x, codes, codebooks, scales, None)
    tail = slice(299_000, None)
    assert relative_error(y[:, tail], x.double() @ dense(codes[tail], codebooks, scales[tail]).T) < 4e-3


def random_layer(
    scheme: str, in_features: int, out_features: int, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, codebooks, scales, bias and x on the GPU, drawn there."""
    group = AQLMScheme.parse(scheme).in_group_size
    shape = (out_features, in_features // group, 1)
    codes = torch.randint(-32768, 32768, shape, dtype=torch.int16, device="cuda")
    codebooks = torch.randn(1, 65536, 1, group, device="cuda").to(dtype)
    scales = torch.rand(out_features, 1, 1, 1, device="cuda").add(0.5).to(dtype)
    bias = torch.randn(out_features, device="cuda").to(dtype)
    return codes, codebooks, scales, bias, torch.randn(rows, in_features, device="cuda").to(dtype)


def dense(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight in float64."""
    weight = codebooks[0, codes[..., 0].long() & 65535, 0].double()
    return weight.flatten(1) * scales.double().view(-1, 1)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())
