"""The registered ops: torch.library's own checks, gradients, double backward, and operands that do not fit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aqlm_tensor.kernels import ops, registry
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import dense_weight
from tests.strategies import Case, Operands, build

CASES = {
    "plain": Case(AQLMScheme(2, 8), 16, 4, 3, bias=True),
    "half, partitions": Case(AQLMScheme(1, 4, 4), 12, 6, 5, torch.bfloat16, partitions=3),
    "tiles, int16 codes": Case(AQLMScheme(3, 9, 8, 2), 6, 5, 2, torch.float16, bias=True),
    "odd layout": Case(AQLMScheme(2, 3), 8, 4, 4, x_layout="sliced", codes_layout="sliced", bias=True),
    "no rows": Case(AQLMScheme(2, 4), 8, 4, 0),
    "no outputs": Case(AQLMScheme(2, 4), 0, 4, 3),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _arguments(operands: Operands, *, grad: bool) -> dict[str, tuple]:
    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().requires_grad_(grad)

    x, upstream, books, scales = (leaf(t) for t in (operands.x, operands.grad, operands.codebooks, operands.scales))
    dense = torch.randn(operands.case.out_features, operands.case.in_features).to(operands.case.dtype)
    return {
        "linear": (x, operands.codes, books, scales, leaf(operands.bias)),
        "linear_input_grad": (upstream, operands.codes, books, scales),
        "dequantize": (operands.codes, books, scales),
        "linear_param_grad": (operands.x, operands.grad, *operands.parts),
        "dequantize_param_grad": (dense, *operands.parts),
    }


@every_case
@pytest.mark.parametrize(
    "op", ["linear", "linear_input_grad", "dequantize", "linear_param_grad", "dequantize_param_grad"]
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(op: str, case: Case, grad: bool) -> None:
    arguments = _arguments(build(case), grad=grad)[op]
    with registry.force_kernel("torch"):
        torch.library.opcheck(getattr(torch.ops.aqlm_tensor, op).default, arguments)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (3, 1, 2), (0,), (2, 0), (0, 5)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    operands = build(Case(AQLMScheme(2, 8), 16, 8, 6, bias=True))
    x = torch.randn(*shape, 64)
    y = ops.linear(x, *operands.parts, operands.bias)
    assert y.shape == (*shape, 16)
    assert operands.bias is not None
    expected = x.double() @ torch.from_numpy(dense_weight(*operands.parts)).T + operands.bias
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert ops.linear_input_grad(y, *operands.parts).shape == x.shape


def _dense(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The weight [O, I] as plain differentiable torch."""
    books = codebooks if codebooks.dim() == 5 else codebooks[None]
    groups, _, num_codebooks = codes.shape
    partition = (torch.arange(groups) * books.shape[0] // max(1, groups))[:, None]
    indices = codes.long() % books.shape[2]
    tiles = torch.stack([books[partition, k, indices[..., k]] for k in range(num_codebooks)]).sum(0) * scales
    return tiles.transpose(1, 2).reshape(groups * books.shape[3], -1)


GRADIENT_CASES = {
    "plain": Case(AQLMScheme(2, 8), 16, 4, 3, bias=True),
    "partitions": Case(AQLMScheme(1, 4, 4), 12, 6, 5, partitions=3),
    "tiles": Case(AQLMScheme(3, 5, 8, 2), 6, 5, 2, bias=True, partitions=2),
    "one codebook set of one partition": Case(AQLMScheme(2, 2), 5, 3, 4, partitions=1),
    "no rows": Case(AQLMScheme(2, 4), 8, 4, 0, bias=True),
}
every_gradient_case = pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES)


def _leaves(operands: Operands, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {"x": operands.x, "codebooks": operands.codebooks, "scales": operands.scales, "bias": operands.bias}
    return {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items() if t is not None}


def _both(case: Case, through_op: Callable[..., Tensor], through_dense: Callable[..., Tensor]) -> None:
    """Assert equal outputs, gradients and gradients of a function of the gradients."""
    operands = build(case)
    results = []
    for function, dtype in ((through_op, torch.float32), (through_dense, torch.float64)):
        leaves = _leaves(operands, dtype)
        y = function(operands.codes, **leaves)
        loss = y.pow(2).sum()
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        of_x = first[0]
        second = torch.autograd.grad(of_x.pow(2).sum(), list(leaves.values()), allow_unused=True)
        results.append([y, *first, *second])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            scale = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 1.0)
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 * scale)


@every_gradient_case
def test_linear_gradients_once_and_twice(case: Case) -> None:
    def through_op(codes: Tensor, x: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear(x, codes, codebooks, scales, bias)

    def through_dense(
        codes: Tensor, x: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return torch.nn.functional.linear(x, _dense(codes, codebooks, scales), bias)

    _both(case, through_op, through_dense)


@every_gradient_case
def test_input_grad_gradients_once_and_twice(case: Case) -> None:
    def through_op(codes: Tensor, x: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear_input_grad(x[:, : codes.shape[0] * codebooks.shape[-2]], codes, codebooks, scales)

    def through_dense(
        codes: Tensor, x: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return x[:, : codes.shape[0] * codebooks.shape[-2]] @ _dense(codes, codebooks, scales)

    _both(case, through_op, through_dense)


@every_gradient_case
def test_dequantize_gradients(case: Case) -> None:
    operands = build(case)
    grad = torch.randn(case.out_features, case.in_features)
    results = []
    for function, dtype in ((ops.dequantize, torch.float32), (_dense, torch.float64)):
        leaves = _leaves(operands, dtype)
        weight = function(operands.codes, leaves["codebooks"], leaves["scales"])
        results.append(torch.autograd.grad(weight, [leaves["codebooks"], leaves["scales"]], grad.to(dtype)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_only_the_wanted_gradients_are_computed() -> None:
    operands = build(Case(AQLMScheme(2, 8), 16, 4, 3))
    x = operands.x.requires_grad_()
    with registry.record() as ran:
        ops.linear(x, *operands.parts, None).sum().backward()
    assert [op for op, _ in ran] == ["linear", "linear_input_grad"]
    books = operands.codebooks.requires_grad_()
    with registry.record() as ran:
        ops.linear(x.detach(), operands.codes, books, operands.scales, None).sum().backward()
    assert [op for op, _ in ran] == ["linear"]
    assert operands.scales.grad is None


OPERANDS = build(Case(AQLMScheme(2, 8), 16, 8, 3, bias=True))
X, BIAS = OPERANDS.x, torch.zeros(16)
CODES, BOOKS, SCALES = OPERANDS.parts

WRONG = {
    "inner size": (r"cannot multiply: x has shape \(\d+, 56\)", (X[:, :56], CODES, BOOKS, SCALES, None)),
    "scalar": (r"cannot multiply: x has shape \(\)", (torch.tensor(1.0), CODES, BOOKS, SCALES, None)),
    "scales of other rows": ("do not belong together", (X, CODES, BOOKS, SCALES[:8], None)),
    "codebooks missing": ("do not belong together", (X, CODES, BOOKS[:1], SCALES, None)),
    "short bias": (r"bias must have shape \(16,\), got \(15,\)", (X, CODES, BOOKS, SCALES, BIAS[:15])),
    "x dtype": (
        "x is torch.bfloat16 but the AQLM weight is torch.float32: cast",
        (X.bfloat16(), CODES, BOOKS, SCALES, None),
    ),
    "scales dtype": ("scales is torch.float16", (X, CODES, BOOKS, SCALES.half(), None)),
    "bias dtype": ("bias is torch.float64", (X, CODES, BOOKS, SCALES, BIAS.double())),
}


@pytest.mark.parametrize(("message", "arguments"), WRONG.values(), ids=WRONG)
def test_operands_that_do_not_fit_reach_no_kernel(message: str, arguments: tuple) -> None:
    with registry.record() as ran, pytest.raises(ValueError, match=message):
        ops.linear(*arguments)
    assert not ran
