"""The Numba kernels, each path called directly, against the numerics contract."""

from hypothesis import given

from aqlm_tensor.kernels import numba_linear
from aqlm_tensor.kernels.numba_decode import Weight
from aqlm_tensor.kernels.numba_gather import gather_linear
from aqlm_tensor.kernels.numba_lookup import lookup_linear
from aqlm_tensor.kernels.numba_product import product
from aqlm_tensor.kernels.reference import partitioned
from tests.conformance import assert_dequantize, assert_input_grad, assert_linear
from tests.strategies import Case, build, cases, schemes

narrow = schemes().filter(lambda scheme: scheme.nbits_per_codebook <= 8)
runnable = lambda case: case.rows and case.out_features and case.in_features  # noqa: E731


def by_lookup(x, codes, codebooks, scales, bias):
    books = partitioned(codebooks)
    bias = None if bias is None else bias.float()
    return lookup_linear(x, codes, books, scales, bias).to(x.dtype)


def by_product(x, codes, codebooks, scales, bias):
    bias = None if bias is None else bias.float()
    return product(x, Weight.of(codes, codebooks, scales), bias).to(x.dtype)


def by_gather(x, codes, codebooks, scales, bias):
    bias = None if bias is None else bias.float()
    return gather_linear(x, Weight.of(codes, codebooks, scales), bias).to(x.dtype)


@given(case=cases(schemes=narrow).filter(runnable))
def test_lookup(case: Case) -> None:
    assert_linear(by_lookup, build(case))


@given(case=cases().filter(runnable))
def test_product(case: Case) -> None:
    assert_linear(by_product, build(case))


@given(case=cases().filter(runnable))
def test_gather(case: Case) -> None:
    assert_linear(by_gather, build(case))


@given(case=cases())
def test_linear(case: Case) -> None:
    assert_linear(numba_linear.linear, build(case))


@given(case=cases())
def test_input_grad(case: Case) -> None:
    assert_input_grad(numba_linear.linear_input_grad, build(case))


@given(case=cases())
def test_dequantize(case: Case) -> None:
    assert_dequantize(numba_linear.dequantize, build(case))
