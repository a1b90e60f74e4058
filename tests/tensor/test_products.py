"""Products with an AQLMTensor on either side, against float64 products with the weight it stands for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aqlm_tensor.tensor import AQLMTensor
from tests.conformance import assert_close_to, dense_weight, magnitude_weight
from tests.strategies import Case, build, cases
from tests.tensor.weights import random_weight

# name -> (function of x [M, I], w and bias, whether it adds the bias); all compute x @ w.T (+ bias)
FORWARD: dict[str, tuple[Callable[[Tensor, AQLMTensor, Tensor], Tensor], bool]] = {
    "F.linear": (lambda x, w, b: F.linear(x, w), False),
    "F.linear bias": (lambda x, w, b: F.linear(x, w, b), True),
    "F.linear by name": (lambda x, w, b: F.linear(bias=b, weight=w, input=x), True),
    "F.linear 3-D": (lambda x, w, b: F.linear(x[None], w, b)[0], True),
    "F.linear one by one": (lambda x, w, b: _rows(x, w, lambda row: F.linear(row, w, b)), True),
    "aten.linear": (lambda x, w, b: torch.ops.aten.linear(x, w, b), True),
    "@": (lambda x, w, b: x @ w.t(), False),
    "@ left": (lambda x, w, b: (w @ x.t()).t(), False),
    "@ left 3-D": (lambda x, w, b: (w @ x.t()[None])[0].t(), False),
    "matmul by name": (lambda x, w, b: torch.matmul(other=w.mT, input=x), False),
    "Tensor.matmul": (lambda x, w, b: x.matmul(w.T), False),
    "mm": (lambda x, w, b: torch.mm(x, w.transpose(0, 1)), False),
    "mm by name": (lambda x, w, b: torch.mm(input=x, mat2=w.t()), False),
    "Tensor.mm left": (lambda x, w, b: w.mm(mat2=x.t()).t(), False),
    "mv": (lambda x, w, b: _rows(x, w, lambda row: torch.mv(w, row)), False),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.t()), True),
    "addmm by name": (lambda x, w, b: b.addmm(mat2=w.t(), mat1=x), True),
    "aten.addmm": (lambda x, w, b: torch.ops.aten.addmm(b, x, w.t()), True),
    "addmm 2-D base": (lambda x, w, b: torch.addmm(b.expand(len(x), -1).contiguous(), x, w.t()), True),
    "addmm left": (lambda x, w, b: torch.addmm(b[:, None], w, x.t()).t(), True),
    "bmm": (lambda x, w, b: torch.bmm(x[None], w[None].mT)[0], False),
    "bmm left": (lambda x, w, b: torch.bmm(w[None], x.t()[None])[0].t(), False),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b.expand(1, 1, -1), x[None], w[None].mT)[0], True),
    "functional_call": (lambda x, w, b: _functional_call(x, w, b), True),
    "einsum": (lambda x, w, b: torch.einsum("...i, oi -> ...o", x, w), False),
    "einsum left": (lambda x, w, b: torch.einsum("io,tsi->ots", w.t(), x[None])[:, 0].t(), False),
    "einsum implicit": (lambda x, w, b: torch.einsum("bi,oi", [x, w]), False),
}


# the others add the bias to a product that was rounded already, as torch does for them
ROUNDED_ONCE = (
    "F.linear bias",
    "F.linear by name",
    "F.linear 3-D",
    "F.linear one by one",
    "aten.linear",
    "addmm",
    "addmm by name",
    "aten.addmm",
)


def _rows(x: Tensor, w: AQLMTensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([function(row) for row in x]) if len(x) else x.new_empty(0, w.shape[0])


def _functional_call(x: Tensor, w: AQLMTensor, b: Tensor) -> Tensor:
    linear = nn.Linear(w.shape[1], w.shape[0], device="meta")
    return torch.func.functional_call(linear, {"weight": w, "bias": b}, (x,))


@given(case=cases(), form=st.sampled_from(sorted(FORWARD)))
def test_forward(case: Case, form: str) -> None:
    operands = build(case)
    function, adds_bias = FORWARD[form]
    bias = operands.bias
    if bias is None or (case.values == "exact" and form not in ROUNDED_ONCE):
        bias = torch.zeros(case.out_features, dtype=case.dtype)
    y = function(operands.x, AQLMTensor(*operands.parts), bias)
    x = operands.x.double().numpy()
    added = bias.double().numpy() if adds_bias else np.zeros(case.out_features)
    with np.errstate(invalid="ignore", over="ignore"):
        reference = x @ dense_weight(*operands.parts).T + added
        magnitude = np.abs(x) @ magnitude_weight(*operands.parts).T + np.abs(added)
    assert_close_to(y, reference, magnitude, operands)


# functions of grad [M, O] and w, all of which compute grad @ w
TRANSPOSED: dict[str, Callable[[Tensor, AQLMTensor], Tensor]] = {
    "F.linear": lambda g, w: F.linear(g, w.t()),
    "@": lambda g, w: g @ w,
    "@ left": lambda g, w: (w.t() @ g.t()).t(),
    "mm": lambda g, w: torch.mm(g, w),
    "addmm": lambda g, w: torch.addmm(g.new_zeros(w.shape[1]), g, w),
    "bmm": lambda g, w: torch.bmm(g[None], w[None])[0],
    "gradient of F.linear": lambda g, w: _gradient(lambda x: F.linear(x, w), g, w.shape[1]),
    "gradient of @": lambda g, w: _gradient(lambda x: x @ w.t(), g, w.shape[1]),
    "gradient of addmm": lambda g, w: _gradient(lambda x: torch.addmm(x.new_zeros(1), x, w.t()), g, w.shape[1]),
    "gradient of bmm": lambda g, w: _gradient(lambda x: torch.bmm(x[None], w[None].mT)[0], g, w.shape[1]),
    "gradient under checkpoint": lambda g, w: _gradient(lambda x: _checkpointed(x, w), g, w.shape[1]),
}


def _gradient(function: Callable[[Tensor], Tensor], grad: Tensor, in_features: int) -> Tensor:
    x = torch.zeros(grad.shape[0], in_features, dtype=grad.dtype, requires_grad=True)
    (result,) = torch.autograd.grad(function(x), x, grad)
    return result


def _checkpointed(x: Tensor, w: AQLMTensor) -> Tensor:
    y = checkpoint(lambda x: F.linear(x, w), x, use_reentrant=False)
    assert isinstance(y, Tensor)
    return y


@given(case=cases(), form=st.sampled_from(sorted(TRANSPOSED)))
def test_transposed_and_gradient(case: Case, form: str) -> None:
    operands = build(case)
    y = TRANSPOSED[form](operands.grad, AQLMTensor(*operands.parts))
    grad = operands.grad.double().numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        reference = grad @ dense_weight(*operands.parts)
        magnitude = np.abs(grad) @ magnitude_weight(*operands.parts)
    assert_close_to(y, reference, magnitude, operands)


def _close(actual: Tensor, expected: Tensor) -> None:
    assert type(actual) is Tensor
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("partitions", [0, 2])
def test_experts_have_their_own_weights(partitions: int) -> None:
    w, x = random_weight(experts=3, partitions=partitions), torch.randn(3, 5, 64, requires_grad=True)
    y = torch.bmm(x, w.mT)
    _close(y, torch.bmm(x, w.dequantize().mT))
    grad = torch.randn_like(y)
    _close(torch.autograd.grad(y, x, grad)[0], torch.bmm(grad, w.dequantize()))
    _close(x @ w.mT, y)
    _close(w @ x.mT, y.mT)
    _close(torch.cat([F.linear(one, expert)[None] for one, expert in zip(x, w, strict=True)]), y)
    assert torch.bmm(x[:0], w[:0].mT).shape == (0, 5, 32)


def test_second_derivative() -> None:
    w, x = random_weight(), torch.randn(3, 64, requires_grad=True)
    (first,) = torch.autograd.grad(F.linear(x, w).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    dense = w.dequantize()
    expected = (6 * (x @ dense.t()) * dense.sum(1)) @ dense
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_a_dense_linear(dtype: torch.dtype) -> None:
    w, x, bias = random_weight(), torch.randn(3, 64), torch.randn(32)
    with torch.autocast("cpu", dtype=dtype):
        for y in (F.linear(x, w, bias), x @ w.t(), torch.mm(x, w.t())):
            assert y.dtype == dtype
        y = F.linear(x, w, bias)
    torch.testing.assert_close(y.float(), F.linear(x, w.dequantize(), bias), rtol=0.05, atol=0.3)


def test_inference_mode() -> None:
    w, x = random_weight(), torch.randn(3, 64)
    with torch.inference_mode():
        made_inside = random_weight()
        assert made_inside.is_inference()
        _close(F.linear(x, made_inside), F.linear(x, w.dequantize()))
        _close(F.linear(x, w), F.linear(x, w.dequantize()))
    _close(F.linear(x, made_inside), F.linear(x, w.dequantize()))


def test_views_whose_values_are_not_in_memory() -> None:
    w, bias = random_weight(), torch.randn(32)
    dense = w.dequantize()
    # the dispatcher resolves a negation that is only noted, as here; a kernel that reads the memory would not
    for x in (X, torch.complex(X, X).conj().imag):
        for b in (bias, torch.complex(bias, bias).conj().imag):
            assert x is X or x.is_neg()
            _close(F.linear(x, w, b), F.linear(x, dense, b))
        _close(x[:, :32] @ w, x[:, :32] @ dense)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_jagged_tensors() -> None:
    w, results = random_weight(), []
    for weight in (w, w.dequantize()):
        x = _nested(torch.jagged).requires_grad_()
        y = F.linear(x, weight, torch.ones(32))
        y.values().square().sum().backward()
        assert x.grad is not None
        results.append((y.values(), x.grad.values()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2)


def test_inside_functions_that_torch_overrides_as_a_whole() -> None:
    """There linear arrives as an aten op: as itself in inference mode, else as what autograd makes of it."""
    layer = nn.TransformerEncoderLayer(64, 4, 32, batch_first=True).requires_grad_(False).eval()
    x, results = torch.randn(2, 3, 64), []
    out, first = random_weight(out_features=64), random_weight()
    for weights in ((out, first), (out.dequantize(), first.dequantize())):
        layer.self_attn.out_proj.weight, layer.linear1.weight = (nn.Parameter(w, requires_grad=False) for w in weights)
        results.append(layer(x))
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), results[-1])
    _close(*results)


def test_meta_tensors_give_shapes() -> None:
    w = random_weight().to("meta")
    assert F.linear(torch.empty(2, 3, 64, device="meta"), w).shape == (2, 3, 32)
    assert (torch.empty(3, 32, device="meta") @ w).shape == (3, 64)
    assert w.dequantize().is_meta


def test_nan_codebook_reaches_the_output() -> None:
    w = random_weight()
    w.codebooks[0, int(w.codes[5, 0, 0]) % 256] = float("nan")
    assert F.linear(torch.randn(2, 64), w)[:, 5].isnan().all()


X, W = torch.randn(3, 64), random_weight()


def _nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([X, X[:2]], layout=layout)


WRONG: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "inner size": (ValueError, r"cannot multiply: x has shape \(3, 63\)", lambda: F.linear(X[:, :63], W)),
    "inner size @": (ValueError, "cannot multiply", lambda: X @ W),
    "scalar": (ValueError, r"cannot multiply: x has shape \(\)", lambda: F.linear(torch.tensor(1.0), W)),
    "dtype": (ValueError, "x is torch.bfloat16 but the AQLM weight is", lambda: F.linear(X.bfloat16(), W)),
    "dtype @": (ValueError, "x is torch.float64 but", lambda: X.double() @ W.t()),
    "integers": (ValueError, "x is torch.int32 but", lambda: F.linear(X.int(), W)),
    "device": (ValueError, "x is on meta but the AQLM weight is on cpu: move", lambda: F.linear(X.to("meta"), W)),
    "two of them": (ValueError, "product of two AQLMTensors", lambda: W @ W.t()),
    "sparse": (ValueError, "layout torch.sparse_coo, but an AQLM weight", lambda: F.linear(X.to_sparse(), W)),
    "nested": (ValueError, "make it one with `layout=torch.jagged`", lambda: F.linear(_nested(torch.strided), W)),
    "dtype of the base": (
        ValueError,
        "input is torch.float16 but",
        lambda: torch.addmm(torch.zeros(3, 1).half(), X, W.t()),
    ),
    "quantized bias": (TypeError, "an AQLMTensor cannot be a bias", lambda: F.linear(X, W, W[0])),
    "bias too short": (ValueError, r"bias must have shape \(32,\), got \(31,", lambda: F.linear(X, W, torch.zeros(31))),
    "bias of one": (ValueError, r"bias must have shape \(32,\), got \(1,\)", lambda: F.linear(X, W, torch.zeros(1))),
    "bias dtype": (ValueError, "bias is torch.float16 but", lambda: F.linear(X, W, torch.zeros(32).half())),
    "bias device": (ValueError, "bias is on meta but", lambda: F.linear(X, W, torch.zeros(32, device="meta"))),
    "bias of transposed": (
        ValueError,
        r"bias must have shape \(64,\)",
        lambda: F.linear(X[:, :32], W.t(), torch.zeros(32)),
    ),
    "3-D weight": (ValueError, "linear needs a 2-D weight", lambda: F.linear(X, random_weight(experts=2))),
    "einsum": (ValueError, "no product of a dense tensor with an AQLM matrix", lambda: torch.einsum("bi,oi->", X, W)),
    "row": (ValueError, r"unsqueeze\(0\) it", lambda: X @ W[0]),
    "bmm sizes": (ValueError, "as batches of matrices", lambda: torch.bmm(X[None], random_weight(experts=2).mT)),
    "out": (ValueError, "no options, got", lambda: torch.mm(X, W.t(), out=torch.empty(3, 32))),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(("error", "message", "call"), WRONG.values(), ids=WRONG)
def test_refuses(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_products_that_torch_makes_of_others() -> None:
    w, x = random_weight(), torch.randn(3, 64)
    _close(torch.inner(x, w), x @ w.dequantize().t())
    _close(torch.tensordot(x, w.t(), dims=1), x @ w.dequantize().t())
    _close(torch.linalg.multi_dot([x, w.t(), torch.eye(32)]), x @ w.dequantize().t())
    attention = F.multi_head_attention_forward
    qkv, out = random_weight(out_features=192), torch.eye(64)
    q = torch.randn(5, 1, 64)
    results = [
        attention(q, q, q, 64, 4, weight, None, None, None, False, 0.0, out, None)[0]
        for weight in (qkv, qkv.dequantize())
    ]
    _close(*results)
