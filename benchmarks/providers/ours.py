"""This library's CPU kernel, through the same op that F.linear on an AQLMTensor calls."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aqlm_tensor.kernels import ops, registry

__all__ = ["ours"]

Parts = tuple[Tensor, Tensor, Tensor]


def ours(parts: Sequence[Parts], x: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """`aqlm_tensor::linear` by the Numba kernel for (codes, codebooks, scales) cast to a dtype."""
    x = x.to(dtype)
    cast = [(codes, codebooks.to(dtype), scales.to(dtype)) for codes, codebooks, scales in parts]

    def call(index: int) -> Tensor:
        with registry.force_kernel("numba"):
            return ops.linear(x, *cast[index % len(cast)], None)

    return call
