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
    originals = _aqlm_layers(model)
    spread: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    try:
        for layer, weight in originals:
            if id(weight) not in spread:
                spread[id(weight)] = (nn.Parameter(weight.codebooks), nn.Parameter(weight.scales))
            _spread(layer, weight, *spread[id(weight)])
        yield model
    finally:
        for layer, weight in originals:
            _gather(layer, weight)


def _aqlm_layers(model: nn.Module) -> list[tuple[nn.Linear, AQLMTensor]]:
    layers: list[tuple[nn.Linear, AQLMTensor]] = []
    for fqn, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, AQLMTensor):
                continue
            if type(module) is not nn.Linear or name != "weight":
                raise ValueError(
                    f"{fqn}.{name} is an AQLM weight in a {type(module).__name__}: trainable handles nn.Linear only"
                )
            layers.append((module, parameter))
    if not layers:
        raise ValueError("the model has no AQLM layer to train: quantize_ or load it first")
    return layers


def _spread(layer: nn.Linear, weight: AQLMTensor, codebooks: nn.Parameter, scales: nn.Parameter) -> None:
    del layer.weight
    layer.register_buffer("codes", weight.codes)
    layer.register_parameter("codebooks", codebooks)
    layer.register_parameter("scales", scales)
    layer.__class__ = _TrainableLinear


@torch.no_grad()
def _gather(layer: nn.Linear, weight: AQLMTensor) -> None:
    """Put the AQLM weight back, with whatever values, dtype and device its parts have by now."""
    if not isinstance(layer, _TrainableLinear):
        return
    codes, codebooks, scales = layer.codes, layer.codebooks, layer.scales
    del layer.codes, layer.codebooks, layer.scales
    layer.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue] - what it was before
    weight.codes, weight.codebooks, weight.scales = codes, codebooks.detach(), scales.detach()
    set_quantized([layer], weight)
