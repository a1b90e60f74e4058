"""The Numba kernels, each path called directly, against the numerics contract."""

import torch
from hypothesis import given

from aqlm_tensor.kernels import numba_linear
from aqlm_tensor.kernels.numba_decode import Weight
from aqlm_tensor.kernels.numba_gather import gather_linear
from aqlm_tensor.kernels.numba_lookup import lookup_linear
from aqlm_tensor.kernels.numba_product import product, product_input_grad
from aqlm_tensor.kernels.numba_scatter import scatter_input_grad
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


def by_scatter(grad, codes, codebooks, scales):
    return scatter_input_grad(grad, codes, partitioned(codebooks), scales).to(grad.dtype)


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


@given(case=cases(schemes=narrow).filter(runnable).filter(lambda case: case.values != "bad_entry"))
def test_scatter(case: Case) -> None:
    assert_input_grad(by_scatter, build(case))


def by_product_grad(grad, codes, codebooks, scales):
    return product_input_grad(grad, Weight.of(codes, codebooks, scales)).to(grad.dtype)


@given(case=cases().filter(runnable))
def test_product_input_grad(case: Case) -> None:
    assert_input_grad(by_product_grad, build(case))


def test_infinite_entries_that_no_code_chooses_do_not_reach_the_gradient() -> None:
    codes = torch.zeros(4096, 4, 2, dtype=torch.int8)
    codebooks = torch.ones(2, 256, 1, 8)
    codebooks[:, 1] = float("inf")
    scales = torch.ones(4096, 1, 1, 1)
    assert numba_linear.grad_method(1, codes.shape, codebooks.shape) == "scatter"
    grad = numba_linear.linear_input_grad(torch.ones(1, 4096), codes, codebooks, scales)
    assert torch.equal(grad, torch.full((1, 32), 8192.0))


@given(case=cases())
def test_input_grad(case: Case) -> None:
    assert_input_grad(numba_linear.linear_input_grad, build(case))


@given(case=cases())
def test_dequantize(case: Case) -> None:
    assert_dequantize(numba_linear.dequantize, build(case))
