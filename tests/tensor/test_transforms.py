"""torch.func over products with AQLM weights: the same as over the dense weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from aqlm_tensor import training
from aqlm_tensor.kernels import ops
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.tensor import AQLMTensor
from tests.tensor.weights import random_weight

pytestmark = [
    pytest.mark.filterwarnings("error:There is a performance drop"),  # vmap without a rule of ours
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # in torch's own formulas of tangents
]

X, V, BIAS = torch.randn(3, 64), torch.randn(3, 64), torch.randn(32)
Product = Callable[[Tensor, Tensor], Tensor]  # of x and w

PRODUCTS: dict[str, Product] = {
    "F.linear": lambda x, w: F.linear(x, w, BIAS),
    "@": lambda x, w: x @ w.t(),
    "left": lambda x, w: (w @ x.mT).mT if x.dim() > 1 else w @ x,
    "transposed": lambda x, w: F.linear(x[..., :32], w.t()),
    "addmm": lambda x, w: torch.addmm(BIAS, x if x.dim() > 1 else x[None], w.t()),
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: grad(lambda x: f(x).square().sum())(X),
    "grad of grad": lambda f: grad(lambda x: grad(lambda x: f(x).pow(3).sum())(x).square().sum())(X),
    "vjp": lambda f: vjp(f, X)[1](torch.ones_like(f(X))),
    "jvp": lambda f: jvp(f, (X,), (V,)),
    "jacrev": lambda f: jacrev(f)(X[0]),
    "jacfwd": lambda f: jacfwd(f)(X[0]),
    "hessian": lambda f: hessian(lambda x: f(x).square().sum())(X[0]),
    "reverse over forward": lambda f: jacrev(jacfwd(lambda x: f(x).square().sum()))(X[0]),
    "vmap": lambda f: vmap(f)(X),
    "vmap of columns": lambda f: vmap(f, in_dims=1)(X.t().contiguous()),
    "vmap of vmap": lambda f: vmap(vmap(f))(X[None]),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).square().sum()))(X),
    "functionalize": lambda f: torch.func.functionalize(lambda x: f(x).add_(1))(X),
    "batched gradients": lambda f: torch.autograd.functional.jacobian(f, X[0], vectorize=True),
    "batched tangents": lambda f: torch.autograd.functional.jacobian(f, X[0], vectorize=True, strategy="forward-mode"),
}


def _close(actual: Any, expected: Any) -> None:
    """Raise unless tensors, or those in tuples and dictionaries, are equal to float32's accuracy by their norms."""
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_products(name: str) -> None:
    w = random_weight(partitions=2)
    for product in PRODUCTS.values():
        _close(*(TRANSFORMS[name](lambda x, v=v, product=product: product(x, v)) for v in (w, w.dequantize())))


@pytest.mark.parametrize("name", ["grad", "vmap", "jvp", "vmap of grad"])
def test_compiled(name: str) -> None:
    w = random_weight()
    compiled = torch.compile(lambda: TRANSFORMS[name](lambda x: F.linear(x, w, BIAS)), backend="aot_eager")
    _close(compiled(), TRANSFORMS[name](lambda x: F.linear(x, w.dequantize(), BIAS)))


def test_vmap_over_biases() -> None:
    w, biases = random_weight(), torch.randn(3, 32)
    for dims in ((0, 0), (None, 0)):
        _close(*(vmap(lambda x, b, w=v: F.linear(x, w, b), dims)(X, biases) for v in (w, w.dequantize())))


def _parameter_gradients(f: Callable[..., Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
    inputs = [parameter.clone().requires_grad_() for parameter in parameters]
    return torch.autograd.grad(f(*inputs), inputs)


def test_gradients_and_tangents_to_codebooks_and_scales() -> None:
    w = random_weight()

    def loss(codebooks: Tensor, scales: Tensor, x: Tensor = X) -> Tensor:
        weight = AQLMTensor(w.codes, codebooks, scales)
        return ((x @ weight.t()).tanh() @ weight).square().mean()

    parameters, tangents = (w.codebooks, w.scales), (torch.randn_like(w.codebooks), torch.randn_like(w.scales))
    expected = _parameter_gradients(loss, *parameters)
    _close(grad(loss, argnums=(0, 1))(*parameters), expected)
    slope = sum((a * b).sum() for a, b in zip(expected, tangents, strict=True))
    torch.testing.assert_close(jvp(loss, parameters, tangents)[1], slope, rtol=1e-3, atol=1e-3)
    each = vmap(grad(loss, argnums=(0, 1)), (None, None, 0))(*parameters, X[:, None])
    _close(each[0].mean(0), expected[0])
    _close(each[1].mean(0), expected[1])
    dense = grad(lambda books: ops.dequantize(w.codes, books, w.scales).square().sum())(w.codebooks)
    _close(dense, _parameter_gradients(lambda b: ops.dequantize(w.codes, b, w.scales).square().sum(), w.codebooks)[0])


def test_second_derivatives_to_codebooks_are_refused() -> None:
    w = random_weight()

    def loss(codebooks: Tensor) -> Tensor:
        return F.linear(X, AQLMTensor(w.codes, codebooks, w.scales)).square().sum()

    with pytest.raises(RuntimeError, match="second derivatives to codebooks and scales are not defined"):
        grad(lambda books: grad(loss)(books).sum())(w.codebooks)


def _adapted() -> tuple[nn.Module, nn.Module]:
    """Two AQLM layers with an adapter in front of them, and the same dense."""
    models = []
    for dense in (False, True):
        layers = [nn.Linear(64, 32).requires_grad_(False), nn.Linear(32, 64).requires_grad_(False)]
        for layer in layers:
            nn.init.ones_(layer.bias)
            w = random_weight(out_features=layer.out_features, in_features=layer.in_features)
            if dense:
                layer.weight = nn.Parameter(w.dequantize(), requires_grad=False)
            else:
                set_quantized([layer], w)
        adapter = nn.Linear(64, 64)
        nn.init.eye_(adapter.weight)
        nn.init.zeros_(adapter.bias)
        models.append(nn.Sequential(adapter, layers[0], nn.Tanh(), layers[1]))
    return models[0], models[1]


def test_gradients_per_sample_of_an_adapter() -> None:
    results = []
    for model in _adapted():
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(trained: Any, x: Tensor, model: nn.Module = model, frozen: Any = frozen) -> Tensor:
            return functional_call(model, {**frozen, **trained}, (x,)).square().sum()

        results.append(vmap(grad(loss), (None, 0))(trained, X))
    _close(*results)


def test_trainable_layers() -> None:
    model, _ = _adapted()
    with training.trainable(model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        got = grad(lambda p: functional_call(model, p, (X,)).square().sum())(
            {n: p.detach() for n, p in trained.items()}
        )
        model(X).square().sum().backward()
        _close(got, {name: p.grad for name, p in trained.items()})


def test_forward_mode_tangents() -> None:
    w, results = random_weight(), []
    for weight in (w, w.dequantize()):
        with forward_ad.dual_level():
            y = F.linear(forward_ad.make_dual(X, V), weight, BIAS) @ weight
            results.append(forward_ad.unpack_dual(y))
    _close(*results)
