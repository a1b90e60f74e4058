"""The quantized layers of a model or block while `tune_pv` or fine-tuning trains it.

For its products each layer decodes its weight anew; the backward pass forms the gradient of the dense weight and from
it, in float32 sums, those of codebooks and scales. No dense copy of a weight outlives a step.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from aqlm_tensor.codes import codes_to_indices
from aqlm_tensor.fusion import FusedLinear
from aqlm_tensor.kernels import ops
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.pv.codes import LossModel, Parts
from aqlm_tensor.pv.rows import Rows
from aqlm_tensor.quantizer.parallel import one_thread_per_operation
from aqlm_tensor.quantizer.sums import CodeSums, code_sums
from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.training import trainable_in_float32

__all__ = ["TunedWeight", "check_layers", "in_turns", "local_aqlm", "multiplying", "tuned_weights"]


class _Product(torch.autograd.Function):
    """x [M, I] times the transposed weight, whose gradient [O, I] goes to codebooks, scales and the model of the loss.

    The sums of entries are multiplied by float32 gradients in a fixed order; the decoder's own backward pass, exact,
    would add in float64. A row whose scale is zero stays zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codebooks: Tensor, scales: Tensor, weight: "TunedWeight") -> Tensor:
        dense = ops.dequantize(weight.all_codes, codebooks, scales).to(x.dtype)
        ctx.save_for_backward(x, dense, scales)
        ctx.weight = weight
        return x @ dense.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, dense, scales = ctx.saved_tensors
        weight: TunedWeight = ctx.weight
        to_dense = (gradients[0].T @ x).float()
        if weight.model is not None:
            weight.model.learn(x, to_dense, gradients[0])
        factors = scales.view(-1, 1)
        rows = to_dense.view(len(factors), -1)
        to_scales = torch.linalg.vecdot(rows, dense.view_as(rows).float()).view_as(scales)
        to_scales = torch.where(scales != 0, to_scales / scales, torch.zeros_like(scales))
        return gradients[0] @ dense, weight.entry_sums(rows * factors), to_scales, None


def _by_partition(sums: Tensor, partitions: int) -> Tensor:
    """[K, P * S, E] as [P, K, S, E]."""
    return sums.unflatten(1, (partitions, -1)).transpose(0, 1).contiguous()


@dataclass(eq=False)
class TunedWeight:
    """One AQLM weight in training, which several layers may share.

    Attributes:
        fqn: name of the first layer that has it.
        codes: stored codes [O/H, I/G, K], of this rank's rows; replaced in place.
        codebooks: float32 parameter [K, 2^N, H, G] or [P, K, 2^N, H, G].
        scales: float32 parameter [O/H, 1, 1, 1].
        keep_order: keep the places of each code in memory, 8 bytes for each code, rather than sort in every pass.
        model: of the loss, learns from every pass if the weight's codes are chosen next.
        sharded_in: a layer that has the weight, if FSDP2 has sharded it; the layer has all codes during a pass.
        rows: that this rank has.
    """

    fqn: str
    codes: Tensor
    codebooks: nn.Parameter
    scales: nn.Parameter
    keep_order: bool = True
    model: LossModel | None = None
    sharded_in: nn.Linear | None = None
    rows: Rows = field(default_factory=Rows)
    _order: tuple[int, CodeSums] | None = None

    @property
    def all_codes(self) -> Tensor:
        """Those of all rows; of a sharded weight only during a pass."""
        if self.sharded_in is None:
            return self.codes
        gathered: Any = self.sharded_in.weight
        return gathered.codes

    @property
    def groups(self) -> int:
        """Groups of weights, each with K codes."""
        return self.codes[..., 0].numel() * self.rows.count

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the dense weight."""
        rows, inputs = ops.weight_shape(self.codes, self.codebooks)
        return rows * self.rows.count, inputs

    def watch(self) -> None:
        """From now on learn from every pass."""
        self.model = LossModel(*self.shape, self.codes.device)

    def watched(self) -> tuple[Parts, LossModel]:
        """What `choose_codes` takes; nothing is learned any more."""
        assert self.model is not None
        model, self.model = self.model, None
        scales = self.scales.detach()[self.rows.of(len(self.scales))]
        return Parts(self.codes, self.codebooks.detach(), scales, self.rows), model

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] times the transposed weight plus bias, in autocast's dtype if it is on."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        with torch.autocast(device, enabled=False):
            y: Tensor = cast("Any", _Product.apply)(flat, self.codebooks, self.scales, self)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y + bias.to(dtype)

    def entry_sums(self, rows: Tensor) -> Tensor:
        """The adjoint of looking entries up: rows [O/H, H * I] added by code, in the shape of the codebooks."""
        height, group = self.codebooks.shape[-2:]
        tiles = rows.view(len(rows), height, -1, group).transpose(1, 2).reshape(-1, height * group)
        with one_thread_per_operation():
            sums = self._by_code()(tiles)
        return _by_partition(sums, len(partitioned(self.codebooks))).view_as(self.codebooks)

    def _by_code(self) -> CodeSums:
        codes = self.all_codes
        version = codes._version  # changes with every change in place
        if self._order is not None and self._order[0] == version:
            return self._order[1]
        partitions, _, size = partitioned(self.codebooks).shape[:3]
        indices = codes_to_indices(codes, (size - 1).bit_length()).view(partitions, -1, *codes.shape[1:])
        indices += size * torch.arange(partitions, device=codes.device).view(-1, 1, 1, 1)
        sums = code_sums(indices.flatten(0, 1), partitions * size)
        if self.keep_order:
            self._order = version, sums
        return sums


def check_layers(model: nn.Module) -> None:
    """Raise unless every AQLM weight of a model can be tuned.

    Raises:
        ValueError: naming what stands in the way and the remedy.
    """
    found = False
    for fqn, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(f"{fqn}.{name} is on the meta device (offloaded?): load the model before tuning it")
            if local_aqlm(parameter) is None:
                continue
            found = True
            if isinstance(module, FusedLinear):
                raise ValueError(f"{fqn} runs together with other layers (fuse_): call unfuse_(model) before tuning it")
            if not _is_linear(module) or parameter.dim() != 2:
                raise ValueError(
                    f"{fqn}.{name} is an AQLM weight in a {type(module).__name__}: only nn.Linear can be tuned"
                )
            if "forward" in vars(module):
                raise ValueError(
                    f"{fqn} has a forward of its own (hooks of accelerate?): remove them with "
                    "accelerate.hooks.remove_hook_from_module(model, recurse=True) and put the model on one device"
                )
    if not found:
        raise ValueError("the model has no AQLM layer to tune: calibrate, quantize_ or load it first")


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear, or was one before fully_shard."""
    before = 2 if isinstance(module, FSDPModule) else 0
    return type(module).__mro__[before] is nn.Linear


def local_aqlm(parameter: Any) -> AQLMTensor | None:
    """The AQLM weight that a parameter is, or this rank's shard of it; None for a dense one."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local if isinstance(local, AQLMTensor) else None


@contextlib.contextmanager
def tuned_weights(
    model: nn.Module, *, keep_order: bool = True
) -> Iterator[tuple[list[TunedWeight], dict[int, torch.dtype]]]:
    """Inside the block of code, layers multiply with weights that can be tuned, and everything is float32.

    Yields each distinct AQLM weight once, and the dtype that each parameter had, by its id. Nothing requires gradients
    but what the caller marks. Afterwards layers hold their AQLMTensors again, with dtypes and requires_grad as before.
    """
    with trainable_in_float32(model) as dtypes:
        weights: dict[int, TunedWeight] = {}
        layers: list[tuple[nn.Linear, TunedWeight]] = []
        for fqn, layer in model.named_modules():
            codebooks = layer._parameters.get("codebooks")
            if not isinstance(layer, nn.Linear) or codebooks is None:
                continue
            tuned = TunedWeight(fqn, layer.get_buffer("codes"), codebooks, layer.get_parameter("scales"), keep_order)
            layers.append((layer, weights.setdefault(id(codebooks), tuned)))
        with multiplying(layers):
            yield list(weights.values()), dtypes


@contextlib.contextmanager
def multiplying(layers: Sequence[tuple[nn.Linear, TunedWeight]]) -> Iterator[None]:
    """Inside the block of code, each layer multiplies with a weight that can be tuned."""
    before = [(layer, vars(layer).get("forward")) for layer, _ in layers]
    try:
        for layer, weight in layers:
            layer.forward = functools.partial(_forward, layer, weight)
        yield
    finally:
        for layer, own in before:
            del layer.forward
            if own is not None:
                layer.forward = own


def _forward(layer: nn.Linear, weight: TunedWeight, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
    return weight.product(input, layer.bias)


def in_turns(weights: Sequence[TunedWeight], memory: int | None) -> list[list[TunedWeight]]:
    """Weights in turns whose models of the loss take at most so many bytes together; a larger one has its own turn."""
    turns: list[list[TunedWeight]] = [[]]
    taken = 0
    for weight in weights:
        needed = LossModel.bytes_for(*weight.shape)
        if memory is not None and turns[-1] and taken + needed > memory:
            turns.append([])
            taken = 0
        turns[-1].append(weight)
        taken += needed
    return turns
