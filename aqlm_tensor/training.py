"""trainable: codebooks and scales as ordinary parameters, for as long as a block of code needs them.

A tensor subclass in an `nn.Parameter` hides its inner tensors from optimizers, DDP and FSDP2, and a compiled F.linear
loses their gradients. So inside the block each quantized nn.Linear holds plain parameters `codebooks` and `scales` and
a buffer `codes`, and its forward calls the op on them. A stack of experts, whose module computes with it in its own
way, is made anew from its parameters each time it is asked for. The parameters share memory with the AQLMTensor, which
is put back as it was, updated in place, at the end.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aqlm_tensor.linear import set_quantized
from aqlm_tensor.tensor import AQLMTensor, Orientation
from aqlm_tensor.tensor_ops import linear_of_parts

__all__ = ["Precision", "held_out", "inside_trainable", "products_in", "trainable", "trainable_in_float32"]

Precision = Literal["auto", "float32", "bfloat16"]

_inside: ContextVar[bool] = ContextVar("aqlm_tensor_inside_trainable", default=False)


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
    `<layer>.codes`: the names of an AQLM checkpoint. For experts, `<module>.<weight>.codebooks` and so on.

    Args:
        model: a model with AQLM weights in nn.Linear layers, or as stacks [E, O, I] of experts in other modules; layers
            that share a weight share the parameters.

    Yields:
        The same model.

    Raises:
        ValueError: if the model has no AQLM layer, or holds another AQLM weight outside of an nn.Linear of its own.
    """
    weights, stacks = _linear_weights(model), _stacks(model)
    if not weights and not stacks:
        raise ValueError("the model has no AQLM layer to train: quantize_ or load it first")
    token = _inside.set(True)
    try:
        for weight, layers in weights:
            _spread(layers, weight)
        for stack in stacks:
            _spread_stack(*stack)
        yield model
    finally:
        for weight, layers in weights:
            _gather(layers, weight)
        for stack in stacks:
            _gather_stack(*stack)
        _inside.reset(token)


def inside_trainable() -> bool:
    """Whether the caller runs inside a `trainable` block."""
    return _inside.get()


def _linear_weights(model: nn.Module) -> list[tuple[AQLMTensor, list[nn.Linear]]]:
    """Each AQLM weight of the model's linear layers with the layers that share it."""
    weights: dict[int, tuple[AQLMTensor, list[nn.Linear]]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(module) is nn.Linear and isinstance(weight, AQLMTensor):
            weights.setdefault(id(weight), (weight, []))[1].append(module)
    return list(weights.values())


def _stacks(model: nn.Module) -> list[tuple[AQLMTensor, nn.Module, str]]:
    """Each stack of experts with the module that holds it, and its name there.

    Raises:
        ValueError: for an AQLM weight that is neither a stack nor that of an nn.Linear.
    """
    stacks = []
    for fqn, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, AQLMTensor) or (type(module) is nn.Linear and name == "weight"):
                continue
            if parameter.dim() != 3:
                raise ValueError(
                    f"{fqn}.{name} is an AQLM weight in a {type(module).__name__}: trainable handles those of "
                    "nn.Linear and stacks of experts"
                )
            stacks.append((parameter, module, name))
    return stacks


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
        parts = layer.codes, layer.codebooks.detach(), layer.scales.detach()
        del layer.codes, layer.codebooks, layer.scales
        layer.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue] - what it was before
        layer.register_parameter("weight", None)
        layer.register_parameter("bias", layer._parameters.pop("bias"))  # behind the weight again, as it was
        weight = _renewed(weight, *parts)
    set_quantized(layers, weight)


def _renewed(weight: AQLMTensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> AQLMTensor:
    """The weight with new parts; another one if they were cast or moved, since a tensor cannot change its own dtype."""
    if (codebooks.dtype, codes.device) != (weight.dtype, weight.device):
        return AQLMTensor(codes, codebooks, scales, weight.orientation)
    weight.codes, weight.codebooks, weight.scales = codes, codebooks, scales
    return weight


class _TrainableStack(nn.Module):
    """A stack of experts spread out: a submodule in the place and with the name of the parameter."""

    codes: Tensor
    orientation: Orientation

    def __init__(self, weight: AQLMTensor) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.codebooks, self.scales = nn.Parameter(weight.codebooks), nn.Parameter(weight.scales)
        self.orientation = weight.orientation

    def weight(self) -> AQLMTensor:
        """The stack, whose products bring gradients to codebooks and scales."""
        return AQLMTensor(self.codes, self.codebooks, self.scales, self.orientation)


@functools.cache
def _with_stacks(cls: Any) -> Any:
    """A subclass of a module's class to which a spread stack looks like the weight."""

    class TrainableExperts(cls):
        def __getattr__(self, name: str) -> Any:
            stack = self.__dict__["_modules"].get(name)
            return stack.weight() if isinstance(stack, _TrainableStack) else super().__getattr__(name)

    TrainableExperts.__name__ = TrainableExperts.__qualname__ = f"Trainable{cls.__name__}"
    return TrainableExperts


def _spread_stack(weight: AQLMTensor, module: nn.Module, name: str) -> None:
    if "_with_stacks_of" not in module.__dict__:
        module.__dict__["_with_stacks_of"] = type(module)
        module.__class__ = _with_stacks(type(module))
    module._parameters[name] = None  # which keeps its place
    module._modules[name] = _TrainableStack(weight)


def _gather_stack(weight: AQLMTensor, module: nn.Module, name: str) -> None:
    stack = module._modules.pop(name, None)
    if isinstance(stack, _TrainableStack):
        renewed: Any = _renewed(weight, stack.codes, stack.codebooks.detach(), stack.scales.detach())
        parameter = renewed if renewed is weight else nn.Parameter(renewed, requires_grad=False)
        module._parameters[name] = parameter
        module.__class__ = module.__dict__.pop("_with_stacks_of", type(module))


@contextlib.contextmanager
def trainable_in_float32(module: nn.Module) -> Iterator[dict[int, torch.dtype]]:
    """`trainable`, with every floating-point parameter and buffer in float32 and none of them requiring gradients.

    Yields the dtype that each had, by its id. Afterwards dtypes and requires_grad are as before and gradients are gone.
    """
    with trainable(module):
        tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
        before = [(tensor, tensor.dtype, tensor.requires_grad) for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.float()
                tensor.requires_grad_(False)
            yield {id(tensor): dtype for tensor, dtype, _ in before}
        finally:
            for tensor, dtype, requires_grad in before:
                tensor.grad = None
                tensor.requires_grad_(requires_grad)
                tensor.data = tensor.data.to(dtype)


def products_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which products are computed in a precision; "auto" is bfloat16 on GPUs that have it."""
    half = precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def held_out(batches: int, share: float, what: str) -> range:
    """Which of so many batches validate `what`: the last ones, about such a share, at least one and never all.

    Raises:
        ValueError: for fewer than two batches.
    """
    if batches < 2:
        raise ValueError(
            f"{what} needs at least 2 batches, one of them to validate on, got {batches}: pass smaller batches"
        )
    return range(batches - max(1, min(batches - 1, round(share * batches))), batches)
