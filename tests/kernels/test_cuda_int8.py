"""The CUDA kernel for a codebook in 8-bit integers, on a GPU: right for what it rounded to, and run only if allowed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from aqlm_tensor import AQLMTensor
from aqlm_tensor.kernels import cuda_int8_codebook, cuda_runtime, int8_codebooks, ops, registry
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_kernel, assert_same_bits
from tests.kernels.gpu_layers import ERRORS, Layer, assert_empty, product, random_layer, relative_error
from tests.strategies import VALUES, Case, Operands, Values, build, cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NAME, OPTION = "cuda_int8_codebook", "int8_codebooks"
SCHEMES = st.sampled_from(("1x16g8", "1x16g16", "1x12g8", "1x9g16")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 63, 64))
FINITE: st.SearchStrategy[Values] = st.sampled_from([values for values in VALUES if values != "bad_entry"])


def _on_grid(operands: Operands) -> Operands:
    """The same with codebooks that lose nothing in 8-bit integers: multiples of a power of two for each slice."""
    books = operands.codebooks
    copy = int8_codebooks.quantized(books)
    smallest = torch.finfo(books.dtype).smallest_normal * torch.finfo(books.dtype).eps
    steps = torch.exp2(torch.floor(torch.log2(copy.scales.double().clamp(min=smallest))))
    exact = int8_codebooks.restored(replace(copy, scales=steps)).to(books.dtype).view_as(books)
    return replace(operands, codebooks=exact)


@given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS, values=FINITE))
def test_contract(case: Case) -> None:
    assert_kernel(NAME, "linear", _on_grid(build(case)).to("cuda"))


def _rounded(layer: Layer) -> torch.Tensor:
    """The product with the rounded entries, in float64."""
    codes, codebooks, scales, bias, x = layer
    entries = int8_codebooks.restored(int8_codebooks.quantized(codebooks))[0]
    return product(x, codes, entries, scales) + bias.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 16, 33])
@pytest.mark.parametrize(("scheme", "in_features"), [("1x16g8", 28672), ("1x16g16", 4352)])
def test_any_codebook(scheme: str, in_features: int, rows: int, dtype: torch.dtype) -> None:
    codes, codebooks, scales, bias, x = layer = random_layer(scheme, in_features, 1030, rows, dtype)
    y = cuda_int8_codebook.linear(x, codes, codebooks, scales, bias)
    assert relative_error(y, _rounded(layer)) < ERRORS[dtype]
    lost = relative_error(y, product(x, codes, codebooks, scales) + bias.double())
    assert 0.007 < lost < 0.013, "the documented error, and not the exact kernel"


@pytest.mark.parametrize("limit", [166_912, 101_376, 65_536])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_less_shared_memory(rows: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices that A100, RTX and Turing GPUs would take give the same product."""
    processors, _ = cuda_runtime.device_limits(torch.cuda.current_device())
    monkeypatch.setattr(cuda_runtime, "device_limits", lambda _: (processors, limit))
    codes, codebooks, scales, bias, x = layer = random_layer("1x16g8", 2048, 1030, rows, torch.float16)
    assert relative_error(cuda_int8_codebook.linear(x, codes, codebooks, scales, bias), _rounded(layer)) < 1e-3


def test_runs_only_where_allowed_and_changes_nothing_stored() -> None:
    codes, codebooks, scales, bias, x = random_layer("1x16g8", 8192, 8192, 4, torch.bfloat16)
    before = [part.clone() for part in (codes, codebooks, scales)]
    weight = AQLMTensor(codes, codebooks, scales)
    with registry.record() as ran:
        exact = F.linear(x, weight, bias)
        with registry.allow(OPTION):
            rounded = F.linear(x, weight, bias)
        again = F.linear(x, weight, bias)
    assert [name == NAME for _, name in ran] == [False, True, False]
    assert_same_bits(exact, again)
    assert 0.003 < relative_error(rounded, exact.double()) < 0.013
    for part, copy in zip(weight.parts(), before, strict=True):
        assert_same_bits(part, copy, "what is stored was changed")


def test_falls_back_where_it_cannot_run() -> None:
    codes, codebooks, scales, bias, x = random_layer("1x16g8", 1024, 1024, 65, torch.bfloat16)
    with registry.allow(OPTION), registry.record() as ran:
        y = ops.linear(x, codes, codebooks, scales, bias)
        ops.linear(x[:2].float(), codes, codebooks.float(), scales.float(), None)
        ops.dequantize(codes, codebooks, scales)
        ops.linear_input_grad(y, codes, codebooks, scales)
    assert NAME not in {name for _, name in ran}
    assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < ERRORS[torch.bfloat16]


def test_compiled_products_follow_the_option() -> None:
    codes, codebooks, scales, bias, x = layer = random_layer("1x16g8", 8192, 2048, 3, torch.bfloat16)
    weight = AQLMTensor(codes, codebooks, scales)
    compiled = torch.compile(lambda x: F.linear(x, weight, bias).relu(), fullgraph=True)
    exact = compiled(x)
    with registry.allow(OPTION), registry.record() as ran:
        rounded = compiled(x)
    assert [name for _, name in ran] == [NAME], "the same graph runs the kernel that is allowed now"
    assert relative_error(rounded, _rounded(layer).relu()) < ERRORS[torch.bfloat16]
    assert_same_bits(compiled(x), exact)


def test_a_captured_graph_keeps_its_copy_which_is_renewed_in_place() -> None:
    codes, codebooks, scales, bias, x = layer = random_layer("1x16g8", 2048, 2048, 3, torch.bfloat16)
    with registry.force_kernel(NAME):
        ops.linear(x, codes, codebooks, scales, bias)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.linear(x, codes, codebooks, scales, bias)
        graph.replay()
        assert_same_bits(y, ops.linear(x, codes, codebooks, scales, bias))
        codebooks.mul_(-3).add_(0.5)
        ops.linear(x, codes, codebooks, scales, bias)
    graph.replay()
    assert relative_error(y, _rounded(layer)) < ERRORS[torch.bfloat16]


def test_a_capture_needs_the_copy() -> None:
    codes, codebooks, scales, bias, x = random_layer("1x16g8", 2048, 2048, 3, torch.bfloat16)
    cuda_int8_codebook.linear(x, codes, codebooks.clone(), scales, bias)  # the kernel is loaded
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)  # an empty graph would be warned of
        with pytest.raises(RuntimeError, match="run the layer once before the capture"):
            cuda_int8_codebook.linear(x, codes, codebooks, scales, bias)


def test_streams_share_a_copy() -> None:
    codes, codebooks, scales, bias, x = layer = random_layer("1x16g8", 4096, 2048, 3, torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outputs = []
    for stream in streams:
        with torch.cuda.stream(stream):
            outputs.append(cuda_int8_codebook.linear(x, codes, codebooks, scales, bias))
    torch.cuda.synchronize()
    reference = _rounded(layer)
    for y in outputs:
        assert relative_error(y, reference) < ERRORS[torch.bfloat16]
        assert_same_bits(y, outputs[0])


def test_entries_without_a_number_are_refused() -> None:
    codes, codebooks, scales, bias, x = random_layer("1x12g8", 1024, 256, 1, torch.float16)
    codebooks[0, 5, 0, 1] = float("inf")
    with registry.allow(OPTION), pytest.raises(ValueError, match="no int8 copy"):
        ops.linear(x, codes, codebooks, scales, bias)


def test_empty() -> None:
    assert_empty(cuda_int8_codebook.linear, random_layer("1x16g8", 64, 24, 3, torch.float16))
