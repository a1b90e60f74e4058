"""trainable: codebooks and scales as ordinary parameters, for as long as a block of code needs them.

A tensor subclass in an `nn.Parameter` hides its inner tensors from optimizers, DDP and FSDP2, and a compiled F.linear
loses their gradients. So inside the block each quantized nn.Linear holds plain parameters `codebooks` and `scales` and
a buffer `codes`, and its forward calls the op on them. The parameters share memory with the AQLMTensor, which is put
back as it was, updated in place, at the end.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_tensor.linear import set_quantized
from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.tensor_ops import linear_of_parts

__all__ = ["trainable"]


class _TrainableLinear(nn.Linear):
    """An nn.Linear whose AQLM weight is spread out as `codes`, `codebooks` and `scales`."""

    codes: Tensor
    codebooks: nn.Parameter
    scales: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        return linear_of_parts(input, self.codes, self.codebooks, self.scales, self.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return AQLMTensor(self.codes, self.codebooks.detach(), self.scales.detach())
        return super().__getattr__(name)


@contextlib.contextmanager
def trainable(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block, codebooks and scales of every AQLM layer are `nn.Parameter`s that require gradients.

    Create the optimizer (or wrap in DDP or FSDP2, or compile) inside the block. Other parameters keep their
    requires_grad. Parameter names inside are `<layer>.codebooks` and `<layer>.scales`, with the codes in the buffer
    `<layer>.codes`: the names of an AQLM checkpoint.

    Args:
        model: a model with AQLM weights in nn.Linear layers; layers that share a weight share the parameters.

    Yields:
        The same model.

    Raises:
        ValueError: if the model has no AQLM layer, or holds an AQLM weight outside of an nn.Linear of its own.
    """
    weights = _aqlm_weights(model)
    try:
        for weight, layers in weights:
            _spread(layers, weight)
        yield model
    finally:
        for weight, layers in weights:
            _gather(layers, weight)


def _aqlm_weights(model: nn.Module) -> list[tuple[AQLMTensor, list[nn.Linear]]]:
    """Each AQLM weight of the model with the layers that share it."""
    weights: dict[int, tuple[AQLMTensor, list[nn.Linear]]] = {}
    for fqn, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, AQLMTensor):
                continue
            if type(module) is not nn.Linear or name != "weight":
                raise ValueError(
                    f"{fqn}.{name} is an AQLM weight in a {type(module).__name__}: trainable handles nn.Linear only"
                )
            weights.setdefault(id(parameter), (parameter, []))[1].append(module)
    if not weights:
        raise ValueError("the model has no AQLM layer to train: quantize_ or load it first")
    return list(weights.values())


def _spread(layers: list[nn.Linear], weight: AQLMTensor) -> None:
    codebooks, scales = nn.Parameter(weight.codebooks), nn.Parameter(weight.scales)
    for layer in layers:
        del layer.weight
        layer.register_buffer("codes", weight.codes)
        layer.register_parameter("codebooks", codebooks)
        layer.register_parameter("scales", scales)
        layer.__class__ = _TrainableLinear


@torch.no_grad()
def _gather(layers: list[nn.Linear], weight: AQLMTensor) -> None:
    """Put the AQLM weight back, with whatever values, dtype and device its parts have by now."""
    for layer in layers:
        if not isinstance(layer, _TrainableLinear):  # an exception came before this one was spread
            continue
        codes, codebooks, scales = layer.codes, layer.codebooks.detach(), layer.scales.detach()
        del layer.codes, layer.codebooks, layer.scales
        layer.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue] - what it was before
        layer.register_parameter("weight", None)
        layer.register_parameter("bias", layer._parameters.pop("bias"))  # behind the weight again, as it was
        if (codebooks.dtype, codes.device) == (weight.dtype, weight.device):
            weight.codes, weight.codebooks, weight.scales = codes, codebooks, scales
        else:  # cast or moved inside the block: a tensor cannot change its own dtype or device
            weight = AQLMTensor(codes, codebooks, scales)
    set_quantized(layers, weight)
