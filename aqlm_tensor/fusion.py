"""fuse_: layers that are given the same input, such as q, k and v, run as one product.

At one token a product takes a few microseconds, and starting it is a good part of them; one launch for three layers
also fills the GPU better. The fused weight is the siblings' rows one after another, in partitions that keep their
codebooks (their greatest common divisor where the siblings differ in size, with codebooks repeated in memory), so
nothing is approximated. Each layer stays an `nn.Linear` at its place, and its weight becomes a view of the fused one:
names, `state_dict`, saving and adapters see no difference.

The first sibling that is called computes the product of all and keeps the others' outputs until they are asked for with
the very same input tensor. A sibling called with another input, or whose weight was replaced since, is computed
correctly, though not for free. This is for inference: `unfuse_` before training codebooks or sharding.
"""

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.tensor_ops import linear_of_parts

__all__ = ["SIBLINGS", "FusionReport", "fuse_", "unfuse_"]

# What attention and MLP blocks of language models call the layers that share an input.
SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
_CROSS_ATTENTION = ("cross", "encoder_attn")  # there k and v have another input than q
_MAX_REPEATED = 16  # repeated codebooks may take one part in so many of the codes' memory


@dataclass
class FusionReport:
    """What `fuse_` did.

    Attributes:
        fused: names of the fused layers, one tuple for each product.
        skipped: for each block whose siblings stay apart, the reason.
    """

    fused: list[tuple[str, ...]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def fuse_(model: nn.Module, siblings: Sequence[Sequence[str]] = SIBLINGS) -> FusionReport:
    """Run layers that share an input as one product, in place; for inference.

    Siblings are fused if their weights are AQLMTensors of one scheme, dtype and device. Fusing again changes nothing
    but renews what `copy.deepcopy` or a move of a single layer has undone. Results obey the same numerics contract as
    those of the separate layers; where a kernel forms a row's sum independently of the number of rows, they are equal.

    Args:
        model: a model with AQLM weights in nn.Linear layers.
        siblings: names, within one parent module, of layers that are always given the same input tensor. If they are
            given different ones the results are right but everything is computed several times.

    Raises:
        ValueError: if there is nothing to fuse, with the reasons.
    """
    report = FusionReport()
    for fqn, parent in list(model.named_modules()):
        if any(mark in fqn for mark in _CROSS_ATTENTION):
            continue
        for names in siblings:
            layers = {name: getattr(parent, name, None) for name in names}
            if sum(isinstance(layer, nn.Linear) for layer in layers.values()) < 2:
                continue
            prefix = f"{fqn}." if fqn else ""
            sets, reason = _fusable(layers)
            for together in sets:
                _fuse(parent, together)
                report.fused.append(tuple(prefix + name for name in together))
            if reason:
                report.skipped[f"{prefix}{'/'.join(names)}"] = reason
    if not report.fused:
        reasons = "; ".join(f"{place}: {reason}" for place, reason in list(report.skipped.items())[:3])
        raise ValueError(
            "no layers of this model can be fused: "
            + (reasons or f"no module has two linear layers named together in {[list(names) for names in siblings]}")
        )
    return report


@torch.no_grad()
def unfuse_(model: nn.Module) -> nn.Module:
    """Undo `fuse_`, in place: each layer is a plain nn.Linear with a weight of its own again; returns the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedGroup):
                child.release()
                delattr(parent, name)
    return model


def _fuse(parent: nn.Module, names: Sequence[str]) -> None:
    """Fuse some children of a module, or renew their group."""
    place = f"fused_{'_'.join(names)}"
    layers = [getattr(parent, name) for name in names]
    group = getattr(parent, place, None)
    if group is None or list(group.layers) != layers:
        group = FusedGroup(names, layers)
        parent.add_module(place, group)
    if not group.tied:
        group.tie()
    for index, layer in enumerate(layers):
        layer.__class__ = FusedLinear
        layer.__dict__.update(group=group, place=index)  # not as a submodule: that would be a cycle


class FusedGroup(nn.Module):
    """The fused weight of some siblings and, between their calls, outputs that were not asked for yet.

    Its buffers `codes`, `codebooks` [P, K, 2^N, H, G] and `scales` are not part of any state dict: the siblings'
    weights, which are views of them, are.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    layers: tuple[nn.Linear, ...]

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.__dict__["layers"] = tuple(layers)  # not as submodules: they belong to the parent
        self.views: list[tuple[AQLMTensor, Tensor, Tensor, Tensor]] = []  # each sibling's weight and its parts
        self.version = 0  # what `_written` was when codebooks were last repeated
        self.books: list[Tensor] = []  # for each sibling its codebooks in the buffer, [its partitions, repeats, ...]
        self.pending = _Pending()
        for name in ("codes", "codebooks", "scales"):
            self.register_buffer(name, None, persistent=False)

    @property
    def tied(self) -> bool:
        """Whether the siblings' weights are the views of the buffers that they were made, and none was replaced."""
        return len(self.views) == len(self.layers) and all(map(self._is_view, range(len(self.views))))

    def _is_view(self, place: int) -> bool:
        # the parameter first: torch.compile takes a weight for what it sees first, and sizes of parameters are fixed
        weight = self.layers[place]._parameters.get("weight")
        if not self.views or weight is not self.views[place][0]:
            return False
        parts = self.views[place][1:]
        return torch.compiler.is_compiling() or all(map(operator.is_, self.views[place][0].parts(), parts))

    def tie(self) -> None:
        """Join the siblings' weights as they are now and make those views of the joined one."""
        weights = [_weight(layer) for layer in self.layers]
        self.codes = torch.cat([weight.codes for weight in weights])
        self.scales = torch.cat([weight.scales for weight in weights])
        repeats = _repeats(weights)
        books = [partitioned(w.codebooks).repeat_interleave(n, 0) for w, n in zip(weights, repeats, strict=True)]
        self.codebooks = torch.cat(books)
        self._expose(weights)

    def _expose(self, weights: Sequence[AQLMTensor]) -> None:
        """Make the siblings' weights, of the shapes given, views of the buffers."""
        self.pending.forget()
        repeats = _repeats(weights)
        sizes = [weight.partitions * repeat for weight, repeat in zip(weights, repeats, strict=True)]
        books = zip(self.codebooks.split(sizes), repeats, strict=True)
        self.books = [part.unflatten(0, (-1, repeat)) for part, repeat in books]
        row = 0
        for layer, old, part in zip(self.layers, weights, self.books, strict=True):
            rows = slice(row, row + old.codes.shape[0])
            own = part[:, 0] if old.codebooks.dim() == 5 else part[0, 0]
            # a new tensor of views and not a view of a tensor: one may copy into it as into any weight
            set_quantized([layer], AQLMTensor(self.codes[rows], own, self.scales[rows]))
            row = rows.stop
        self.views = [(weight, *weight.parts()) for weight in map(_weight, self.layers)]
        self.version = self._written()

    @torch.no_grad()
    def refresh(self) -> None:
        """Repeat the siblings' codebooks in the buffer as they are now."""
        for books in self.books:
            books[:, 1:] = books[:, :1]
        self.version = self._written()

    def _written(self) -> int:
        """How often the siblings' codebooks were written to."""
        return sum(_version(codebooks) for _, _, codebooks, _ in self.views)

    def release(self) -> None:
        """Give every sibling a weight of its own and its plain class back."""
        for layer in self.layers:
            weight = layer.weight
            layer.__class__ = nn.Linear
            del layer.__dict__["group"], layer.__dict__["place"]
            if isinstance(weight, AQLMTensor):
                codes, codebooks, scales = (part.clone() for part in weight.parts())
                set_quantized([layer], AQLMTensor(codes, codebooks, scales, weight.orientation))

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of one sibling for x [..., I], from the product of all if that can be."""
        out = self.pending.take(place, x) if self._is_view(place) else None
        if out is not None:
            return out
        if not self.tied:
            layer = self.layers[place]
            return F.linear(x, layer.weight, layer.bias)
        if not torch.compiler.is_compiling() and self.version != self._written():
            self.refresh()
        outputs = dict(enumerate(self._product(x)))
        out = outputs.pop(place)
        self.pending.keep(x, outputs)
        return out

    def _product(self, x: Tensor) -> list[Tensor]:
        """Outputs of all siblings."""
        y = linear_of_parts(x, self.codes, self.codebooks, self.scales, self._bias())
        outputs, start = [], 0
        for layer in self.layers:
            # not split(): its outputs must not be changed in place
            outputs.append(y[..., start : start + layer.out_features])
            start += layer.out_features
        return outputs

    def _bias(self) -> Tensor | None:
        """The siblings' biases in a row, zero for those without, or None; gathered anew, since they may be trained."""
        biases = [layer.bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        return torch.cat(
            [
                self.scales.new_zeros(layer.out_features) if layer.bias is None else layer.bias.to(self.scales.dtype)
                for layer in self.layers
            ]
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the buffers; the siblings, which were moved before, are views again afterwards."""
        super()._apply(fn, recurse)
        if self.codes is not None:
            self._expose([_weight(layer) for layer in self.layers])
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedGroup":
        """A group of the copied siblings, which are not views of anything: `fuse_` the copy again."""
        group = FusedGroup(self.names, ())
        memo[id(self)] = group
        group.__dict__["layers"] = copy.deepcopy(self.layers, memo)
        return group

    def extra_repr(self) -> str:
        """The siblings' names."""
        return ", ".join(self.names)


class _Pending:
    """Outputs for one input that siblings have not asked for yet, by their place.

    An object that is changed and not an attribute of the group that is replaced: a module's take 4 us to set.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Hold nothing."""
        self.x: Tensor | None = None
        self.version = -1
        self.outputs: dict[int, Tensor] = {}

    def keep(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        """Hold some outputs for x."""
        self.x, self.version, self.outputs = x, _version(x), outputs

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """A sibling's output if it is there and x is the input, unchanged; forgets the input with the last of them."""
        if self.x is not x or self.version != _version(x):
            return None
        out = self.outputs.pop(place, None)
        if not self.outputs:
            self.forget()
        return out


def _version(x: Tensor) -> int:
    """How often x was changed in place; inference tensors do not count, and tracing replaces changes by new tensors."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


class FusedLinear(nn.Linear):
    """An nn.Linear whose product is computed together with its siblings'; see `fuse_`."""

    group: FusedGroup
    place: int

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Its own output, [..., out_features]."""
        return self.group.output(self.place, input)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.group.tied:
            self.group.refresh()


def _weight(layer: nn.Linear) -> AQLMTensor:
    weight = layer.weight
    assert isinstance(weight, AQLMTensor)
    return weight


def _repeats(weights: Sequence[AQLMTensor]) -> list[int]:
    """How often each partition of each weight is repeated so that all partitions of the fused weight are equal."""
    sizes = [weight.codes.shape[0] // weight.partitions for weight in weights]
    common = math.gcd(*sizes)
    return [size // common for size in sizes]


def _why_not(layer: nn.Module | None) -> str | None:
    """Why a layer cannot be fused with any other, or None."""
    if layer is None:
        return "is missing"
    if isinstance(layer, FusedLinear):
        return None
    if type(layer) is not nn.Linear:
        return f"is a {type(layer).__name__}, not an nn.Linear"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has forward hooks"
    weight = layer.weight
    if not isinstance(weight, AQLMTensor) or weight.orientation != "matrix" or weight.dim() != 2:
        return "has no AQLM weight"
    return None if weight.numel() else "is empty"


def _fusable(layers: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Which of some siblings to fuse with each other, and why some stay apart."""
    reasons = {name: reason for name, layer in layers.items() if (reason := _why_not(layer)) is not None}
    alike: dict[object, list[str]] = {}
    for name, layer in layers.items():
        if name not in reasons:
            weight = _weight(layer)
            key = (str(weight.scheme), weight.dtype, weight.device, weight.shape[1])
            alike.setdefault(key, []).append(name)
    if len(alike) > 1:
        reasons[", ".join(name for names in alike.values() for name in names)] = f"differ: {list(alike)}"
    sets = []
    for names in alike.values():
        if _repeats_fit([_weight(layers[name]) for name in names]):
            sets.append(names)
            continue
        reasons[", ".join(names)] = "differ in size, and repeating their codebooks would take too much memory"
        by_size: dict[int, list[str]] = {}
        for name in names:
            by_size.setdefault(layers[name].weight.shape[0], []).append(name)
        sets += by_size.values()
    sets = [names for names in sets if len(names) > 1]
    return sets, "; ".join(f"{name} {reason}" for name, reason in reasons.items())


def _repeats_fit(weights: Sequence[AQLMTensor]) -> bool:
    """Whether the memory for repeated codebooks is small beside that of the codes."""
    repeated = sum((n - 1) * w.codebooks.nbytes for w, n in zip(weights, _repeats(weights), strict=True))
    return _MAX_REPEATED * repeated <= sum(weight.codes.nbytes for weight in weights)
