"""Grouped products with a stack of AQLM expert weights: rows sorted by expert, each run of them times its own weight.

This is `torch.nn.functional.grouped_mm` for a weight [E, I, O] (the transposed view of a stack [E, O, I]), the product
that mixtures of experts are made of. One opaque op loops over the experts that have rows, so a compiled graph holds one
node however the rows fall, and no expert is made dense. The trade-off: the op reads the offsets on the host.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from aqlm_tensor.kernels import ops
from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.tensor_ops import REMEDY, bind, seen_inside

__all__ = ["grouped_mm"]

implements_torch_function = AQLMTensor.implements_torch_function


def grouped_mm(x: Tensor, weight: AQLMTensor, offsets: Tensor) -> Tensor:
    """x [S, I], sorted by expert, times the transposed stack [E, I, O]; [S, O].

    Args:
        x: the rows, in the weight's dtype.
        weight: with orientation "transposed".
        offsets: [E] int32 or int64, the end of each expert's rows in x. Rows beyond the last give zero.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if not isinstance(weight, AQLMTensor) or weight.dim() != 3 or weight.orientation != "transposed" or x.dim() != 2:
        raise ValueError(
            "grouped_mm needs rows [S, I] and a transposed stack of AQLM weights [E, I, O], got shapes "
            f"{tuple(x.shape)} and {tuple(weight.shape)}: {REMEDY}"
        )
    if offsets.shape != weight.shape[:1] or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"grouped_mm of {tuple(x.shape)} with {tuple(weight.shape)}: {tuple(offsets.shape)} offsets do not fit"
        )
    return _experts_linear(x, *weight.parts(), offsets)


def _runs(parts: tuple[Tensor, Tensor, Tensor], offsets: Tensor) -> Iterator[tuple[int, slice, tuple[Tensor, ...]]]:
    """(expert, rows, parts of its weight) of each expert that has rows."""
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            yield expert, slice(start, stop), tuple(part[expert] for part in parts)
            start = stop


@torch.library.custom_op("aqlm_tensor::experts_linear", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op_forward(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], ops.weight_shape(codes, codebooks)[0])
    for _, rows, parts in _runs((codes, codebooks, scales), offsets):
        y[rows] = ops.linear(x[rows], *parts, None)
    return y


@torch.library.custom_op("aqlm_tensor::experts_linear_input_grad", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op_backward(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    x = grad.new_zeros(grad.shape[0], ops.weight_shape(codes, codebooks)[1])
    for _, rows, parts in _runs((codes, codebooks, scales), offsets):
        x[rows] = ops.linear_input_grad(grad[rows].contiguous(), *parts)
    return x


@torch.library.custom_op("aqlm_tensor::experts_linear_param_grad", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op_param_grad(
    x: Tensor, grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    grad_books, grad_scales = torch.zeros_like(codebooks), torch.zeros_like(scales)
    for expert, rows, parts in _runs((codes, codebooks, scales), offsets):
        grad_books[expert], grad_scales[expert] = ops.linear_param_grad(x[rows], grad[rows].contiguous(), *parts)
    return grad_books, grad_scales


@_op_forward.register_fake
def _(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], ops.weight_shape(codes, codebooks)[0])


@_op_backward.register_fake
def _(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], ops.weight_shape(codes, codebooks)[1])


@_op_param_grad.register_fake
def _(
    x: Tensor, grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codebooks), torch.empty_like(scales)


_experts_linear = torch.ops.aqlm_tensor.experts_linear.default
_experts_linear_input_grad = torch.ops.aqlm_tensor.experts_linear_input_grad.default
_experts_linear_param_grad = torch.ops.aqlm_tensor.experts_linear_param_grad.default


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, *weight = inputs
    trains = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if trains else None, *weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *weight = ctx.saved_tensors
    grad_x = _experts_linear_input_grad(grad, *weight) if ctx.needs_input_grad[0] else None
    grad_books, grad_scales = (None, None) if x is None else _experts_linear_param_grad(x, grad, *weight)
    return grad_x, None, grad_books, grad_scales, None


_op_forward.register_autograd(cast("Any", _backward), setup_context=_save)


@implements_torch_function(vars(torch)["_grouped_mm"])  # what F.grouped_mm calls
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight, offsets, bias, out_dtype = bind(("self", "mat2", "offs", "bias", "out_dtype"), args, kwargs)
    if bias is not None or out_dtype is not None or offsets is None:
        raise ValueError(f"grouped_mm with an AQLMTensor takes offs, no bias and no out_dtype: {REMEDY}")
    return grouped_mm(x, weight, offsets)


@implements_torch_function(Tensor.__getitem__)
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    w, index = args
    one = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
    if one and isinstance(w, AQLMTensor) and w.codes.dim() == 4 and seen_inside(w):
        return AQLMTensor(*(part[index] for part in w.parts()), orientation=w.orientation)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args)
