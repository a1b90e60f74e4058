"""The torch reference beyond the common contract: blocks, gradients to codebooks and scales, determinism."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqlm_tensor.kernels import reference
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_dequantize, assert_input_grad, assert_linear, assert_same_bits, threads
from tests.strategies import Case, Operands, build, cases


@pytest.mark.parametrize("elements", [300, 4096])
@given(case=cases(max_weights=1 << 11))
def test_any_block_size(elements: int, case: Case) -> None:
    operands = build(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_BLOCK_ELEMENTS", elements)
        assert_linear(reference.linear, operands)
        assert_input_grad(reference.linear_input_grad, operands)
        assert_dequantize(reference.dequantize, operands)


def _expected_param_grad(operands: Operands, grad_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients to codebooks and scales by looping over every group, and the magnitude of the former's sums."""
    case, scheme = operands.case, operands.case.scheme
    codes = operands.codes.numpy().astype(np.int64) % scheme.codebook_size
    books = operands.codebooks.double().numpy().reshape(-1, *scheme.codebooks_shape)
    scales = operands.scales.double().numpy().ravel()
    tiles = grad_weight.reshape(case.out_groups, scheme.out_group_size, case.in_groups, scheme.in_group_size)
    grad_books, magnitude, grad_scales = np.zeros_like(books), np.zeros_like(books), np.zeros_like(scales)
    for o in range(case.out_groups):
        partition = o * len(books) // case.out_groups
        for i in range(case.in_groups):
            tile = tiles[o, :, i, :]
            for k in range(scheme.num_codebooks):
                grad_books[partition, k, codes[o, i, k]] += scales[o] * tile
                magnitude[partition, k, codes[o, i, k]] += np.abs(scales[o] * tile)
                grad_scales[o] += (books[partition, k, codes[o, i, k]] * tile).sum()
    shape = tuple(operands.codebooks.shape)
    return grad_books.reshape(shape), grad_scales.reshape(-1, 1, 1, 1), magnitude.reshape(shape)


PARAM_CASES = cases(values=st.sampled_from(["normal", "exact", "zero"]), max_weights=1 << 11)


def _assert_param_grads(got: tuple[torch.Tensor, torch.Tensor], operands: Operands, grad_weight: np.ndarray) -> None:
    books, scales, magnitude = _expected_param_grad(operands, grad_weight)
    info = torch.finfo(operands.case.dtype)
    u, half_step = info.eps / 2, info.smallest_normal * info.eps / 2
    for actual, expected, size in zip(got, (books, scales), (magnitude, np.abs(scales).max(initial=0)), strict=True):
        assert actual.dtype == operands.case.dtype
        assert tuple(actual.shape) == expected.shape
        error = np.abs(actual.double().numpy() - expected)
        assert (error <= 1.01 * u * np.abs(expected) + 1e-6 * size + half_step).all()


@given(case=PARAM_CASES)
def test_linear_param_grad(case: Case) -> None:
    operands = build(case)
    x, grad = (tensor.double().numpy() for tensor in (operands.x, operands.grad))
    got = reference.linear_param_grad(operands.x, operands.grad, *operands.parts)
    _assert_param_grads(got, operands, grad.T @ x)


@given(case=PARAM_CASES)
def test_dequantize_param_grad(case: Case) -> None:
    operands = build(case)
    grad_weight = torch.randn(case.out_features, case.in_features).to(case.dtype)
    got = reference.dequantize_param_grad(grad_weight, *operands.parts)
    _assert_param_grads(got, operands, grad_weight.double().numpy())


def test_param_grads_do_not_depend_on_threads_or_runs() -> None:
    operands = build(Case(AQLMScheme(2, 8), 96, 24, 40, partitions=2))
    runs = []
    for count in (1, 2, 2):
        with threads(count):
            runs.append(reference.linear_param_grad(operands.x, operands.grad, *operands.parts))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert_same_bits(a, b)


def test_float32_matmul_precision_does_not_reach_it() -> None:
    operands = build(Case(AQLMScheme(2, 8), 64, 24, 40))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert_linear(reference.linear, operands)
    finally:
        torch.set_float32_matmul_precision(precision)
