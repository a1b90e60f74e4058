"""Products with an AQLMTensor.

They run on the codes through `aqlm_tensor::linear` and `linear_input_grad`, whichever side the quantized matrix is on;
nothing is silently made dense. `aqlm_tensor.tensor_views` holds slicing, concatenation and copies.

There are two layers, as torch has them: `F.linear` and `matmul` are taken at the function level, where the ops record
their own gradients; the aten ops below autograd serve `mm`, `addmm` and friends and code that runs without it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.nn import functional as F

from aqlm_tensor.kernels import ops
from aqlm_tensor.kernels.transforms import FUNCTIONS
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["REMEDY", "bind", "linear_of_parts", "seen_inside", "transposed"]

aten = torch.ops.aten
implements = AQLMTensor.implements
implements_torch_function = AQLMTensor.implements_torch_function

_PLAIN = (Tensor, nn.Parameter)
_linear_implementation = ops.IMPLEMENTATIONS[ops.linear]

REMEDY = "call `.dequantize()` first to work on the dense weight"


def _linear(x: Tensor, w: AQLMTensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times w [O, I] transposed, plus bias [O]; the op checks that they fit."""
    # the parts and not w: on a subclass every attribute, such as a shape, is a trip through __torch_function__
    codes, codebooks, scales = w.codes, w.codebooks, w.scales
    if w.orientation == "matrix" and codes.dim() == 3:
        return linear_of_parts(x, codes, codebooks, scales, bias)
    if codes.dim() != 3 or w.orientation in ("row", "flat"):
        raise ValueError(f"linear needs a 2-D weight, got an AQLMTensor of shape {tuple(w.shape)}")
    _refuse_unusual(x)
    x, codebooks, scales, bias = _autocast(x, codebooks, scales, bias)
    y = _call(ops.linear_input_grad, x, codes, codebooks, scales)
    if bias is None:
        return y
    if bias.shape != y.shape[-1:]:
        raise ValueError(f"bias must have shape {tuple(y.shape[-1:])}, got {tuple(bias.shape)}")
    return y + bias


def linear_of_parts(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with the weight that the three tensors stand for; see `aqlm_tensor.kernels.ops` for shapes."""
    if _directly(x, codes, codebooks, scales, bias):
        return _linear_implementation(x, codes, codebooks, scales, bias)
    _refuse_unusual(x)
    x, codebooks, scales, bias = _autocast(x, codebooks, scales, bias)
    return _call(ops.linear, x, codes, codebooks, scales, bias)


def _refuse_unusual(x: Tensor) -> None:
    """Raise ValueError unless x is a dense tensor, whose values lie in memory as its strides say."""
    if isinstance(x, AQLMTensor):
        raise ValueError("the product of two AQLMTensors is not defined on codes: call `.dequantize()` on one of them")
    if x.is_nested:
        raise ValueError("x is a nested tensor: make it one with `layout=torch.jagged`, or multiply its `.values()`")
    if x.layout is not torch.strided:
        raise ValueError(f"x has the layout {x.layout}, but an AQLM weight multiplies dense tensors: `x.to_dense()`")


def _autocast(
    x: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The operands in autocast's dtype if it is on: the ops are opaque to it."""
    if not _autocast_enabled(x.device.type):
        return x, codebooks, scales, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), codebooks.to(dtype), scales.to(dtype), None if bias is None else bias.to(dtype)


def _directly(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing could tell a call of the op `linear` from one of its implementation.

    A small product takes as long as the op's autograd layer (18 us) or the dispatcher (10 us). They are left out if no
    gradient can flow and no autocast, forward-mode AD, mode, transform, tracer, profiler or other subclass looks on.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or _observed()
        or not _ordinary(x)
        or type(codes) not in _PLAIN
        or type(codebooks) not in _PLAIN
        or type(scales) not in _PLAIN
        or not (bias is None or _ordinary(bias))
        or (torch.is_grad_enabled() and _any_requires_grad(x, codebooks, scales, bias))
    )


def _ordinary(x: Tensor) -> bool:
    """Whether x is what its memory holds: no other subclass, and nothing that the dispatcher would make real first."""
    return type(x) in _PLAIN and not (x.is_meta or x.is_neg() or x.is_nested or x.layout is not torch.strided)


def _call(op: OpOverload, *operands: Tensor | None) -> Tensor:
    """Call an op, without its autograd layer and without the dispatcher where those can be left out."""
    if torch.compiler.is_compiling():
        return op(*operands)
    if forward_ad._current_level >= 0:
        return FUNCTIONS[op].apply(*operands)  # pyright: ignore[reportReturnType] - torch does not say what it returns
    if peek_interpreter_stack() is not None or (torch.is_grad_enabled() and _any_requires_grad(*operands)):
        return op(*operands)
    if _observed() or not all(operand is None or _ordinary(operand) for operand in operands):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*operands)
    return ops.IMPLEMENTATIONS[op](*operands)


def _any_requires_grad(*operands: Tensor | None) -> bool:
    return any(operand is not None and operand.requires_grad for operand in operands)


def _observed() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _profiler_enabled()
        or torch._C._is_tracing()
    )


def _autocast_enabled(device_type: str) -> bool:
    # torch.amp.is_autocast_available would break the graph of torch.compile (2.11); only meta tensors lack autocast
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """torch.matmul with an AQLMTensor on either side."""
    w, dense = (b, a) if isinstance(b, AQLMTensor) else (a, b)
    assert isinstance(w, AQLMTensor)
    if w.dim() == 3:
        return _bmm(a, b)
    if w.dim() == 1:
        raise ValueError(f"matmul needs a 2-D AQLM weight, got shape {tuple(w.shape)}; unsqueeze(0) it or {REMEDY}")
    if w is b:
        return _linear(dense, transposed(w))
    return _linear(dense, w) if dense.dim() == 1 else _linear(dense.mT, w).mT


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with a stack of expert weights [E, O, I] (or transposed) on either side, one expert at a time."""
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(
            f"cannot multiply shapes {tuple(a.shape)} and {tuple(b.shape)} as batches of matrices: both must be 3-D "
            "with the same first size and matching inner sizes"
        )
    w, dense = (b, a) if isinstance(b, AQLMTensor) else (a, b)
    assert isinstance(w, AQLMTensor)
    if a.shape[0] == 0:
        return dense.new_empty(0, a.shape[1], b.shape[2])
    pairs = zip(dense.unbind(0), w.experts(), strict=True)
    experts = ((x, AQLMTensor(*parts, w.orientation)) for x, parts in pairs)
    if w is b:
        return torch.stack([_linear(x, transposed(expert)) for x, expert in experts])
    return torch.stack([_linear(x.mT, expert).mT for x, expert in experts])


def transposed(w: AQLMTensor) -> AQLMTensor:
    """The transposed view, on the same three tensors; a row is its own."""
    if w.orientation == "row":
        return w
    return AQLMTensor(*w.parts(), "matrix" if w.orientation == "transposed" else "transposed")


def seen_inside(w: AQLMTensor) -> bool:
    """Whether views of w must not be aten ops, which autograd and torch.func apply to it as a whole."""
    return peek_interpreter_stack() is not None or w.codebooks.requires_grad or w.scales.requires_grad


_REVERSED, _SWAPPED = (vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT"))


@implements_torch_function([torch.t, Tensor.t, torch.transpose, Tensor.transpose, _REVERSED, _SWAPPED])
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    w, *dims = (*args, *kwargs.values())
    if isinstance(w, AQLMTensor) and seen_inside(w):
        order = w.codes.dim() - 1
        if (not dims and (order == 2 or func == _SWAPPED)) or {dim % order for dim in dims} == {order - 2, order - 1}:
            return transposed(w)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


_PLACES = {"input": 0, "other": 1, "mat1": 1, "mat": 1, "batch1": 1, "mat2": 2, "vec": 2, "batch2": 2}  # with a base


def _operands(func: Callable, args: tuple, kwargs: dict, count: int) -> list[Tensor]:
    """The base, if there are three, and the two factors of a product, by position or by name.

    Raises:
        ValueError: for options such as `out`, which must not be ignored.
    """
    named = {min(_PLACES[name], count - 1): value for name, value in kwargs.items() if name in _PLACES}
    operands = dict(enumerate(args)) | named
    options = {name for name, value in kwargs.items() if name not in _PLACES and value is not None}
    if options or len(operands) != count:
        raise ValueError(
            f"{func.__name__} with an AQLMTensor takes {count} tensors and no options, got {kwargs.keys()}"
        )
    return [operands[place] for place in range(count)]


@implements(aten.linear.default)
@implements_torch_function(F.linear)
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight, bias = args if len(args) == 3 else bind(("input", "weight", "bias"), args, kwargs)
    if isinstance(bias, AQLMTensor) or not isinstance(weight, AQLMTensor):
        if isinstance(bias, AQLMTensor):
            raise TypeError(f"an AQLMTensor cannot be a bias: {REMEDY}")
        y = _matmul(x, weight.mT)
        return y if bias is None else y + bias
    return _linear(x, weight, bias)


@implements_torch_function(
    [torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.mv, torch.Tensor.mv]
)
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    return _matmul(*_operands(func, args, kwargs, 2))


@implements_torch_function(torch.Tensor.__rmatmul__)
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    return _matmul(args[1], args[0])


@implements_torch_function([torch.bmm, torch.Tensor.bmm])
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    return _bmm(*_operands(func, args, kwargs, 2))


@implements([aten.mm.default, aten.mv.default, aten.matmul.default])
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    return _matmul(args[0], args[1])


@implements(aten.bmm.default)
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    return _bmm(args[0], args[1])


@implements([aten.addmm.default, aten.addmv.default, aten.baddbmm.default])
@implements_torch_function(
    [torch.addmm, Tensor.addmm, torch.addmv, Tensor.addmv, torch.baddbmm, Tensor.baddbmm]  # which vmap cannot see into
)
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    others = {name: value for name, value in kwargs.items() if name not in ("beta", "alpha")}
    base, a, b = _operands(func, args, others, 3)
    if beta == 1 and alpha == 1 and isinstance(b, AQLMTensor) and b.dim() == 2 and base.shape == b.shape[1:]:
        return _linear(a, transposed(b), base)
    product = _matmul(a, b)
    if _autocast_enabled(product.device.type):
        base = base.to(product.dtype)
    if base.dtype != product.dtype:
        raise ValueError(f"input is {base.dtype} but the product is {product.dtype}: cast one with `.to(...)`")
    if alpha != 1:
        product = product * alpha
    # as in torch, beta = 0 ignores the base, NaN included
    return product.expand(torch.broadcast_shapes(product.shape, base.shape)) if beta == 0 else product + beta * base


@implements_torch_function(torch.einsum)
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    equation, *operands = args
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(letters) == len(operands) == 2 and isinstance(operands[0], AQLMTensor) != isinstance(
        operands[1], AQLMTensor
    ):
        w, x = operands if isinstance(operands[0], AQLMTensor) else operands[::-1]
        of_w, of_x = letters if w is operands[0] else letters[::-1]
        if not arrow:  # all letters that occur once, in alphabetical order
            once = sorted(letter for letter in set(inputs) if letter.isalpha() and inputs.count(letter) == 1)
            output = "..." * ("..." in of_x) + "".join(once)
        summed, kept = set(of_w) & set(of_x) - set(output), set(of_w) & set(output) - set(of_x)
        if w.dim() == 2 and len(summed) == len(kept) == 1 and of_x.count(*summed) == 1:
            (i,), (o,) = summed, kept
            rest = of_x.replace(i, "")
            y = _linear(torch.einsum(f"{of_x}->{rest}{i}", x), w if of_w == o + i else transposed(w))
            return torch.einsum(f"{rest}{o}->{output}", y)
    raise ValueError(
        f"einsum {equation!r} is no product of a dense tensor with an AQLM matrix over one of its dimensions: {REMEDY}"
    )


def bind(names: tuple[str, ...], args: tuple, kwargs: dict) -> list[Any]:
    """The arguments of a call in the order of `names`, None where absent."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
