"""An nn.Linear with an AQLM weight: still an nn.Linear."""

import types

from torch import nn

from aqlm_tensor.tensor import AQLMTensor

__all__ = ["set_quantized"]


def set_quantized(module: nn.Linear, weight: AQLMTensor) -> None:
    """Make an AQLMTensor the weight of a linear layer, which prints its scheme from then on."""
    module.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    module.extra_repr = types.MethodType(_linear_extra_repr, module)


def _linear_extra_repr(module: nn.Linear) -> str:
    weight = module.weight
    detail = f", weight=AQLMTensor({weight.extra_repr()})" if isinstance(weight, AQLMTensor) else ""
    bias = module.bias is not None
    return f"in_features={module.in_features}, out_features={module.out_features}, bias={bias}{detail}"
