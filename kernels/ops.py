"""The ops `aqlm_tensor::linear`, `linear_input_grad`, `linear_param_grad`, `dequantize`, `dequantize_param_grad`.

They are opaque to torch.compile (a compiled graph holds the op, and the registry chooses the kernel when it runs), have
shape-only fakes and gradients to x, codebooks, scales and bias. All take plain tensors:

    x          [..., I]                               float32, float16 or bfloat16
    codes      [O/H, I/G, K]                          int8 (up to 8 bits) or int16
    codebooks  [K, 2^N, H, G] or [P, K, 2^N, H, G]    x's dtype; P equal row partitions
    scales     [O/H, 1, 1, 1]                         x's dtype
    bias       [O] or None                            x's dtype
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor

from aqlm_tensor.kernels import reference
from aqlm_tensor.kernels.registry import Op, Problem, implementation
from aqlm_tensor.scheme import AQLMScheme

__all__ = [
    "BACKWARDS",
    "IMPLEMENTATIONS",
    "dequantize",
    "dequantize_param_grad",
    "linear",
    "linear_input_grad",
    "linear_param_grad",
    "scheme_of",
    "weight_shape",
]


def scheme_of(codebooks: Tensor) -> AQLMScheme:
    """The scheme that codebooks [..., K, 2^N, H, G] belong to."""
    # int: a symbolic size of a traced tensor is specialised here, since a scheme is part of what is compiled
    return _scheme(*(int(n) for n in codebooks.shape[-4:]))


@functools.lru_cache(maxsize=1024)
def _scheme(num_codebooks: int, size: int, out_group: int, in_group: int) -> AQLMScheme:
    return AQLMScheme(num_codebooks, (size - 1).bit_length(), in_group, out_group)


def weight_shape(codes: Tensor, codebooks: Tensor) -> tuple[int, int]:
    """(out_features, in_features) of the weight that codes and codebooks stand for."""
    return codes.shape[-3] * codebooks.shape[-2], codes.shape[-2] * codebooks.shape[-1]


_MOST_PROBLEMS = 4096
_problems: dict[tuple[Any, ...], Problem] = {}


def _problem(
    op: Op, dense: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Problem:
    """The problem that operands pose, after `_check`; found again by their shapes, since both take as long as a launch.

    Args:
        op: "linear" or "linear_input_grad".
        dense: x or the gradient, [..., in_features] or [..., out_features].
        codes: as above.
        codebooks: as above.
        scales: as above.
        bias: as above.
    """
    key = (
        *(op, dense.shape, dense.dtype, dense.device, codes.shape, codebooks.shape, codebooks.dtype, codebooks.device),
        *(scales.shape, scales.dtype, scales.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )
    problem = _problems.get(key)
    if problem is None:
        _check(dense, weight_shape(codes, codebooks)[op == "linear"], codes, codebooks, scales, bias)
        problem = _new_problem(op, dense.shape[:-1].numel(), codes, codebooks)
        if len(_problems) >= _MOST_PROBLEMS:
            _problems.clear()
        _problems[key] = problem
    return problem


def _new_problem(op: Op, rows: int, codes: Tensor, codebooks: Tensor) -> Problem:
    out_features, in_features = weight_shape(codes, codebooks)
    partitions = codebooks.shape[0] if codebooks.dim() == 5 else 1
    scheme = scheme_of(codebooks)
    return Problem(op, scheme, rows, in_features, out_features, partitions, codebooks.dtype, codebooks.device)


def _check(
    x: Tensor, features: int, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None
) -> None:
    """Raise unless the operands fit: kernels compute addresses from their shapes and read values by one dtype.

    Raises:
        ValueError: naming the first operand that does not fit.
    """
    if scales.numel() != codes.shape[0] or codes.shape[-1] != codebooks.shape[-4]:
        raise ValueError(
            f"codes {tuple(codes.shape)}, codebooks {tuple(codebooks.shape)} and scales {tuple(scales.shape)} do not "
            "belong together"
        )
    weight = weight_shape(codes, codebooks)
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"cannot multiply: x has shape {tuple(x.shape)}, the AQLM weight {weight}")
    if bias is not None and bias.shape != weight[:1]:
        raise ValueError(f"bias must have shape {weight[:1]}, got {tuple(bias.shape)}")
    dtype, device = codebooks.dtype, codebooks.device
    for name, operand in (("x", x), ("scales", scales), ("bias", bias)):
        if operand is not None and operand.device != device:
            raise ValueError(
                f"{name} is on {operand.device} but the AQLM weight is on {device}: move one with `.to(...)`"
            )
        if operand is not None and operand.dtype != dtype:
            raise ValueError(f"{name} is {operand.dtype} but the AQLM weight is {dtype}: cast one with `.to(...)`")


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _like(flat: Tensor, x: Tensor) -> Tensor:
    """Rows [rows, n] in the leading dimensions of x; no view, which autograd would forbid to change in place."""
    return flat if x.dim() == 2 else flat.contiguous().resize_(*x.shape[:-1], flat.shape[-1])


def _linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    problem = _problem("linear", x, codes, codebooks, scales, bias)
    linear = implementation(problem)
    if x.dim() == 2:
        return linear(x, codes, codebooks, scales, bias)
    return _like(linear(x.reshape(problem.rows, problem.in_features), codes, codebooks, scales, bias), x)


def _linear_input_grad(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    problem = _problem("linear_input_grad", grad, codes, codebooks, scales)
    return _like(implementation(problem)(_flat(grad), codes, codebooks, scales), grad)


def _linear_param_grad(
    x: Tensor, grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.linear_param_grad(_flat(x), _flat(grad), codes, codebooks, scales)


def _dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    return implementation(_new_problem("dequantize", 0, codes, codebooks))(codes, codebooks, scales)


_SIGNATURES = {
    "linear": ("(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias) -> Tensor", _linear),
    "linear_input_grad": ("(Tensor grad, Tensor codes, Tensor codebooks, Tensor scales) -> Tensor", _linear_input_grad),
    "linear_param_grad": (
        "(Tensor x, Tensor grad, Tensor codes, Tensor codebooks, Tensor scales) -> (Tensor, Tensor)",
        _linear_param_grad,
    ),
    "dequantize": ("(Tensor codes, Tensor codebooks, Tensor scales) -> Tensor", _dequantize),
    "dequantize_param_grad": (
        "(Tensor grad_weight, Tensor codes, Tensor codebooks, Tensor scales) -> (Tensor, Tensor)",
        reference.dequantize_param_grad,
    ),
}
for _name, (_signature, _function) in _SIGNATURES.items():
    torch.library.define(f"aqlm_tensor::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"aqlm_tensor::{_name}", "default", _function)

IMPLEMENTATIONS = {
    getattr(torch.ops.aqlm_tensor, name).default: function for name, (_, function) in _SIGNATURES.items()
}

linear = torch.ops.aqlm_tensor.linear.default
linear_input_grad = torch.ops.aqlm_tensor.linear_input_grad.default
linear_param_grad = torch.ops.aqlm_tensor.linear_param_grad.default
dequantize = torch.ops.aqlm_tensor.dequantize.default
dequantize_param_grad = torch.ops.aqlm_tensor.dequantize_param_grad.default


@torch.library.register_fake("aqlm_tensor::linear")
def _(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight_shape(codes, codebooks)[1], codes, codebooks, scales, bias)
    return x.new_empty(*x.shape[:-1], weight_shape(codes, codebooks)[0])


@torch.library.register_fake("aqlm_tensor::linear_input_grad")
def _(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    _check(grad, weight_shape(codes, codebooks)[0], codes, codebooks, scales)
    return grad.new_empty(*grad.shape[:-1], weight_shape(codes, codebooks)[1])


@torch.library.register_fake("aqlm_tensor::linear_param_grad")
def _(x: Tensor, grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codebooks.new_empty(codebooks.shape), scales.new_empty(scales.shape)


@torch.library.register_fake("aqlm_tensor::dequantize")
def _(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    return codebooks.new_empty(weight_shape(codes, codebooks))


@torch.library.register_fake("aqlm_tensor::dequantize_param_grad")
def _(grad_weight: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codebooks.new_empty(codebooks.shape), scales.new_empty(scales.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebooks, scales = ctx.saved_tensors
    grad_x = linear_input_grad(grad, codes, codebooks, scales) if ctx.needs_input_grad[0] else None
    grad_books = grad_scales = None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        grad_books, grad_scales = linear_param_grad(x, grad, codes, codebooks, scales)
    grad_bias = _flat(grad).sum(0) if ctx.needs_input_grad[4] else None
    return grad_x, None, grad_books, grad_scales, grad_bias


def _linear_input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # out = dense @ W, so the incoming gradient plays the part of x and `dense` that of the output's gradient
    dense, codes, codebooks, scales = ctx.saved_tensors
    grad_dense = linear(grad, codes, codebooks, scales, None) if ctx.needs_input_grad[0] else None
    grad_books = grad_scales = None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        grad_books, grad_scales = linear_param_grad(grad, dense, codes, codebooks, scales)
    return grad_dense, None, grad_books, grad_scales


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebooks, scales = ctx.saved_tensors
    grad_books, grad_scales = dequantize_param_grad(grad, codes, codebooks, scales)
    return None, grad_books, grad_scales


BACKWARDS = {
    linear: _linear_backward,
    linear_input_grad: _linear_input_grad_backward,
    dequantize: _dequantize_backward,
}
for _op, _backward in BACKWARDS.items():
    torch.library.register_autograd(_op, cast("Any", _backward), setup_context=_save)
