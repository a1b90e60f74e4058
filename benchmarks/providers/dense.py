"""torch.nn.functional.linear with the dequantized weight, and its gradient to the input."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["dense", "dense_input_grad"]


def dense(weights: Sequence[Tensor], x: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """x @ W.T in a dtype; `weights` [O, I] are used in that dtype already."""
    x = x.to(dtype)
    return lambda index: F.linear(x, weights[index % len(weights)])


def dense_input_grad(weights: Sequence[Tensor], grad: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """Grad @ W in a dtype; `weights` as for `dense`."""
    grad = grad.to(dtype)
    return lambda index: grad @ weights[index % len(weights)]
