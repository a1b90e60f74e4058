"""This library's CPU kernel, through the same ops that F.linear on an AQLMTensor and its backward call."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aqlm_tensor.kernels import ops, registry

__all__ = ["ours", "ours_input_grad"]

Parts = tuple[Tensor, Tensor, Tensor]


def ours(parts: Sequence[Parts], x: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """`aqlm_tensor::linear` by the Numba kernel for (codes, codebooks, scales) cast to a dtype."""
    x, weights = x.to(dtype), _cast(parts, dtype)

    def call(index: int) -> Tensor:
        with registry.force_kernel("numba"):
            return ops.linear(x, *weights[index % len(weights)], None)

    return call


def ours_input_grad(parts: Sequence[Parts], grad: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """The same for `aqlm_tensor::linear_input_grad`."""
    grad, weights = grad.to(dtype), _cast(parts, dtype)

    def call(index: int) -> Tensor:
        with registry.force_kernel("numba"):
            return ops.linear_input_grad(grad, *weights[index % len(weights)])

    return call


def _cast(parts: Sequence[Parts], dtype: torch.dtype) -> list[Parts]:
    return [(codes, codebooks.to(dtype), scales.to(dtype)) for codes, codebooks, scales in parts]
