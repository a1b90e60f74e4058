"""The CUDA kernel for one large codebook, called directly on a GPU, against the numerics contract."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aqlm_tensor.kernels import cuda_runtime, cuda_sliced_codebook
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_kernel
from tests.kernels.gpu_layers import assert_empty, product, random_layer, relative_error, runs
from tests.strategies import LARGE_CASES, Case, build, cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SCHEMES = st.sampled_from(("1x16g8", "1x16g16", "1x12g8", "1x9g16")).map(AQLMScheme.parse)
HALF = st.sampled_from((torch.float16, torch.bfloat16))
ROWS = st.sampled_from((1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 63, 64))


@given(case=cases(schemes=SCHEMES, dtypes=HALF, rows=ROWS))
def test_contract(case: Case) -> None:
    assume(runs(cuda_sliced_codebook, "linear", case))
    assert_kernel("cuda_sliced_codebook", "linear", build(case).to("cuda"))


@pytest.mark.parametrize("name", ["one token 1x16", "1x16g16, wide input"])
def test_large_cases(name: str) -> None:
    assert_kernel("cuda_sliced_codebook", "linear", build(LARGE_CASES[name]).to("cuda"))


@pytest.mark.parametrize("limit", [166_912, 101_376, 65_536])
@pytest.mark.parametrize("scheme", ["1x16g8", "1x16g16"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_less_shared_memory(scheme: str, rows: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices that A100, RTX and Turing GPUs would take give the same product."""
    processors, _ = cuda_runtime.device_limits(torch.cuda.current_device())
    monkeypatch.setattr(cuda_runtime, "device_limits", lambda _: (processors, limit))
    codes, codebooks, scales, bias, x = random_layer(scheme, 2048, 1030, rows, torch.float16)
    y = cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias)
    assert relative_error(y, product(x, codes, codebooks, scales) + bias.double()) < 1e-3


@pytest.mark.parametrize("rows", [8, 16, 64])
def test_many_runs_agree(rows: int) -> None:
    """Inputs too wide to stay in shared memory go through a ring: a race would show now and then."""
    codes, codebooks, scales, bias, x = random_layer("1x16g8", 28672, 4100, rows, torch.bfloat16)
    first = cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias)
    assert relative_error(first, product(x, codes, codebooks, scales) + bias.double()) < 4e-3
    for _ in range(50):
        assert torch.equal(first, cuda_sliced_codebook.linear(x, codes, codebooks, scales, bias))


def test_empty() -> None:
    assert_empty(cuda_sliced_codebook.linear, random_layer("1x16g8", 64, 24, 3, torch.float16))
