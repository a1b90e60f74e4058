"""torch.func over the ops: grad, vjp, jvp, vmap and what is made of them (jacrev, hessian, gradients per sample).

A gradient registered with torch.library serves plain reverse-mode autograd alone: torch.func refuses such an op, vmap
runs it row by row, and forward mode silently drops its tangents. So each op is also an autograd.Function that knows
its tangents and what a batch of calls is; torch.func's dispatch key of the op leads there, also in compiled graphs, and
`FUNCTIONS` are for forward-mode AD without torch.func. A batch of x becomes more rows of one product. Over anything
else, such as codebooks, vmap calls the op one by one.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import FunctionalizeInterpreter, retrieve_current_functorch_interpreter
from torch._ops import OpOverload
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

from aqlm_tensor.kernels import ops

__all__ = ["FUNCTIONS"]

Function = type[torch.autograd.Function]


def _one_by_one(op: OpOverload, batch: int, dims: tuple[int | None, ...], operands: tuple[Any, ...]) -> tuple[Any, Any]:
    """Outputs of a batch of calls, stacked, and the dimensions along which they are."""
    calls = [
        op(*(operand if dim is None else operand.select(dim, i) for operand, dim in zip(operands, dims, strict=True)))
        for i in range(batch)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    outputs = tuple(torch.stack(output) for output in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)


def _product_tangent(op: OpOverload) -> Callable[..., Tensor]:
    """The tangent of a product of x and the weight, which is linear in x, in the codebooks and in the scales."""

    def jvp(ctx: Any, x_tangent: Any, _: Any, books_tangent: Any, scales_tangent: Any, bias_tangent: Any = None) -> Any:
        x, codes, codebooks, scales = ctx.saved_tensors
        rest = (None,) * (len(op._schema.arguments) - 4)
        terms: list[Tensor] = [] if bias_tangent is None else [bias_tangent]
        if x_tangent is not None:
            terms.append(op(x_tangent, codes, codebooks, scales, *rest))
        if books_tangent is not None:
            terms.append(op(x, codes, books_tangent, scales, *rest))
        if scales_tangent is not None:
            terms.append(op(x, codes, codebooks, scales_tangent, *rest))
        out_features = ops.weight_shape(codes, codebooks)[op is not ops.linear]
        return functools.reduce(torch.add, terms).expand(*x.shape[:-1], out_features)

    return jvp


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:  # noqa: ARG001 - autograd's signature
    raise RuntimeError("second derivatives to codebooks and scales are not defined: take them of `.dequantize()`")


def _function(op: OpOverload) -> Function:
    """An op as an autograd.Function."""
    product = op in (ops.linear, ops.linear_input_grad)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - its signature
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])

    def vmap(info: Any, dims: tuple[int | None, ...], *operands: Any) -> tuple[Any, Any]:
        if product and all(dim is None for dim in dims[1:]):
            return op(operands[0].movedim(dims[0], 0), *operands[1:]), 0
        return _one_by_one(op, info.batch_size, dims, operands)

    functions = {
        "forward": op,
        "setup_context": setup_context,
        "backward": ops.BACKWARDS.get(op, _no_second_derivative),
        "vmap": vmap,
    }
    if product:
        functions["jvp"] = _product_tangent(op)
    return type(op._opname, (torch.autograd.Function,), {name: staticmethod(f) for name, f in functions.items()})


def _transformed(function: Function, op: OpOverload) -> Callable[..., Any]:
    """What the op does while torch.func transforms it."""

    def call(*operands: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        if not isinstance(interpreter, FunctionalizeInterpreter):
            return function.apply(*operands)
        mode = FunctorchFunctionalizeAPI(interpreter)  # for which a Function has no rule; the op changes no operand
        unwrapped = mode.unwrap_tensors(operands)
        with mode.redispatch_to_next():
            return mode.wrap_tensors(op(*unwrapped))

    return call


FUNCTIONS: dict[OpOverload, Function] = {op: _function(op) for op in ops.IMPLEMENTATIONS}
for _op, _each in FUNCTIONS.items():
    torch.library.impl(_op._schema.name, "FuncTorchDynamicLayerFrontMode", _transformed(_each, _op))
