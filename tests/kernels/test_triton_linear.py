"""The Triton kernels against the numerics contract: on a GPU, or under Triton's interpreter (see conftest.py)."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqlm_tensor.kernels import pieces
from aqlm_tensor.kernels.registry import Problem
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_dequantize, assert_input_grad, assert_linear
from tests.strategies import Case, Operands, build, cases, schemes

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from aqlm_tensor.kernels import triton_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = st.sampled_from((1, 2, 3, 4, 17))
LAYERS = {
    "two tokens": Case(AQLMScheme(8, 8, 32), 19, 9, 2, torch.float16),
    "one group of two chunks": Case(AQLMScheme(3, 8, 16), 2, 1, 1, torch.float16),
    "out groups": Case(AQLMScheme(2, 6, 12, 2), 18, 17, 3, torch.float32, 2, bias=True),
    "out groups, one token": Case(AQLMScheme(1, 4, 8, 3), 18, 33, 1, torch.bfloat16, 2, bias=True),
    "one token": Case(AQLMScheme(3, 8), 33, 40, 1, torch.float16),
    "one token, 12 bits": Case(AQLMScheme(2, 12), 33, 70, 1, torch.float32, 3),
    "tokens": Case(AQLMScheme(3, 8, 16), 130, 20, 16, torch.bfloat16, bias=True),
    "tokens, 16 bits": Case(AQLMScheme(1, 16), 64, 20, 7, torch.float16),
    "many tokens": Case(AQLMScheme(2, 8), 64, 12, 65, torch.bfloat16, 2, bias=True),
    "three tokens, 16 bits": Case(AQLMScheme(1, 16), 20, 20, 3, torch.bfloat16),
}


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.7) cuts bfloat16 off where a GPU rounds."""
    if DEVICE == "cuda":
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, src, target):
        if src.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, src, target)
        rounded = torch.tensor(src.data).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def ready(case: Case) -> Operands:
    return build(case).to(DEVICE)


@settings(max_examples=12 if DEVICE == "cpu" else 100)
@given(case=cases(schemes=schemes().filter(lambda scheme: scheme.nbits_per_codebook >= 4), rows=ROWS, max_weights=2048))
def test_linear(case: Case) -> None:
    assert_linear(triton_linear.linear, ready(case))


@pytest.mark.parametrize("name", LAYERS)
def test_linear_of_each_kind(name: str) -> None:
    assert_linear(triton_linear.linear, ready(LAYERS[name]))


@settings(max_examples=8 if DEVICE == "cpu" else 50)
@given(case=cases(max_weights=2048))
def test_dequantize(case: Case) -> None:
    assert_dequantize(triton_linear.dequantize, ready(case))


@settings(max_examples=5 if DEVICE == "cpu" else 50)
@given(case=cases(max_weights=2048))
def test_input_grad(case: Case) -> None:
    assert_input_grad(triton_linear.linear_input_grad, ready(case))


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "WORKSPACE_BYTES", 20_000)
    case = Case(AQLMScheme(2, 8, 8, 2), 60, 24, 70, torch.bfloat16, 2, bias=True)
    assert_linear(triton_linear.linear, ready(case))
    assert_input_grad(triton_linear.linear_input_grad, ready(case))


def test_split_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "_splits", lambda blocks, steps, device: min(3, steps))
    for case in (LAYERS["out groups"], LAYERS["one token"], LAYERS["two tokens"]):
        assert_linear(triton_linear.linear, ready(case))


def test_sums_beyond_float16() -> None:
    """Sums of entries may leave float16's range although the weight, scaled, does not."""
    operands = ready(Case(AQLMScheme(4, 8), 40, 16, 2, torch.float16, values="positive"))
    operands.codebooks.mul_(30_000)
    operands.scales.mul_(1e-5)
    assert_linear(triton_linear.linear, operands)


def test_unsupported_schemes_are_refused_with_a_reason() -> None:
    def reason(scheme: str) -> str | None:
        parsed = AQLMScheme.parse(scheme)
        return triton_linear.supports(Problem("linear", parsed, 1, 1024, 64, 1, torch.float32, torch.device("cpu")))

    assert reason("1x12g64") is None
    assert "at most 16 codebooks" in (reason("17x8") or "")
    assert "64 inputs" in (reason("1x8g128") or "")
