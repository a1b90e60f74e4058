"""An nn.Linear with an AQLM weight: still an nn.Linear."""

import functools
from collections.abc import Sequence

from torch import nn

from aqlm_tensor.tensor import AQLMTensor

__all__ = ["set_quantized"]


def set_quantized(layers: Sequence[nn.Linear], weight: AQLMTensor) -> None:
    """Make an AQLMTensor the weight of linear layers, one parameter for all, which print its scheme from then on."""
    parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    for layer in layers:
        layer.weight = parameter
        layer.extra_repr = functools.partial(_linear_extra_repr, layer)  # which, unlike a method, can be pickled


def _linear_extra_repr(module: nn.Linear) -> str:
    weight = module.weight
    detail = f", weight=AQLMTensor({weight.extra_repr()})" if isinstance(weight, AQLMTensor) else ""
    bias = module.bias is not None
    return f"in_features={module.in_features}, out_features={module.out_features}, bias={bias}{detail}"
