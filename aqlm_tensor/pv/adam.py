"""Adam (Kingma and Ba 2015, arXiv 1412.6980) for parameters of very different sizes.

`torch.optim.Adam` would need a group for each parameter, and start a dozen kernels for each of some hundred groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RelativeAdam"]

_BETAS = (0.9, 0.95)
_EPSILON = 1e-12  # gradients of one entry of a codebook are small
_fused: Any = torch  # whose operations on lists of tensors have private names


class RelativeAdam:
    """Adam whose steps are relative to the size that each parameter has at the beginning.

    Args:
        parameters: to train, float32.
        sizes: of each, what its steps are relative to.

    Attributes:
        first: running means of the gradients, in the order of the parameters.
        second: running means of their squares.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sizes: Sequence[float]) -> None:
        self.parameters = list(parameters)
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]
        self.sizes = list(sizes)

    @torch.no_grad()
    def step(self, number: int, lr: float) -> None:
        """Step `number`, counted from 1, with the parameters' gradients, which are set to zero."""
        gradients = self.gradients()
        beta1, beta2 = _BETAS
        _fused._foreach_lerp_(self.first, gradients, 1 - beta1)
        _fused._foreach_mul_(self.second, beta2)
        _fused._foreach_addcmul_(self.second, gradients, gradients, 1 - beta2)
        scale = _fused._foreach_div(self.second, 1 - beta2**number)
        _fused._foreach_sqrt_(scale)
        _fused._foreach_add_(scale, _EPSILON)
        lengths = [-lr * size / (1 - beta1**number) for size in self.sizes]
        _fused._foreach_addcdiv_(self.parameters, self.first, scale, lengths)
        _fused._foreach_zero_(gradients)

    def gradients(self) -> list[Tensor]:
        """The parameters' gradients, zero where there was none; always the same tensors, as CUDA graphs want them."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]
