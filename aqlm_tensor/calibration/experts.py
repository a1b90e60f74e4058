"""Mixtures of experts whose weights are one stack [E, O, I]: finding them, watching them, quantizing each expert.

Transformers 5 keeps experts so; they are no nn.Linear. Each expert is calibrated with the tokens that the router sends
to it. One that sees fewer tokens than it has inputs would fit them and nothing else, so its X^T X is completed to that
many tokens: with the average token that any expert got, for the weights that read the experts' input; with
uncorrelated inputs of the average size for those that read what an expert computed itself, which other experts say
nothing about. An expert that saw nothing is thereby quantized for the average token.

The trade-off: experts run one after another while they are watched, whatever faster implementation the model uses.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from aqlm_tensor.blocks import linears_of
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.handler import LayerReport
from aqlm_tensor.quantizer.hessian import HessianAccumulator
from aqlm_tensor.quantizer.layer import quantize_layer
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import why_incompatible
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["ExpertObserver", "ExpertStack", "completed", "find_stacks", "one_by_one", "quantize_expert"]

_TRANSPOSED = "its experts are stored as [E, in, out], which codes cannot express"


@dataclass(frozen=True)
class ExpertStack:
    """The weights [E, O, I] of one projection of all experts.

    Attributes:
        fqn: name of the parameter in the model.
        module: holds the parameter.
        config: what to do with it.
    """

    fqn: str
    module: nn.Module
    config: AQLMWeightConfig

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        return self.module.get_parameter(self.fqn.rpartition(".")[2])

    @property
    def partitions(self) -> int:
        """Parts of each expert's rows with codebooks of their own: gate and up are separate in checkpoints."""
        return 2 if "gate_up" in self.fqn.rpartition(".")[2] else 1

    def expert(self, index: int) -> str:
        """Name of one expert's weight, in reports."""
        return f"{self.fqn}.{index}"

    def replace(self, weight: AQLMTensor) -> None:
        """Put the quantized stack in the parameter's place."""
        setattr(self.module, self.fqn.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))


def find_stacks(
    model: nn.Module, config: AOBaseConfig, blocks: Sequence[nn.Module]
) -> tuple[list[ExpertStack], dict[str, str]]:
    """The stacks of experts in some blocks that a config applies to, and why not to the others.

    Args:
        model: holds the blocks.
        config: an AQLMWeightConfig, or an FqnToConfig that names the parameters.
        blocks: where to look.

    Raises:
        ValueError: if a stack cannot be quantized and its config does not say "skip".
    """
    widths = {id(module): width for block in blocks for width in [_width(block)] for module in block.modules()}
    stacks: list[ExpertStack] = []
    skipped: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if id(module) not in widths:
            continue
        transposed = _is_transposed(module, widths[id(module)])
        for name, parameter in module.named_parameters(prefix=fqn, recurse=False):
            own = config.fqn_to_config.get(name) if isinstance(config, FqnToConfig) else config
            named = "expert" in f"{name} {type(module).__name__}".lower()
            if not named or parameter.dim() != 3 or not isinstance(own, AQLMWeightConfig):
                continue
            stack = ExpertStack(name, module, own)
            reason = _TRANSPOSED if transposed else _why_not(stack, parameter)
            if reason is None:
                stacks.append(stack)
            elif own.on_incompatible == "skip" or transposed:
                skipped[name] = reason
            else:
                raise ValueError(f'{name} cannot be quantized to {own.scheme}: {reason}; pass on_incompatible="skip"')
    return stacks, skipped


def _width(block: nn.Module) -> int | None:
    """Of the hidden state: what the block's first linear layer reads."""
    return next((layer.in_features for layer in linears_of([block])), None)


def _is_transposed(module: nn.Module, width: int | None) -> bool:
    """Whether experts that read vectors of such a width are stored as [E, in, out]."""
    first = next((one for one in module.parameters(recurse=False) if one.dim() == 3), None)
    marked = getattr(module, "is_transposed", False)
    return marked or (first is not None and first.shape[1] == width != first.shape[2])


def _why_not(stack: ExpertStack, weight: Tensor) -> str | None:
    if isinstance(weight, AQLMTensor):
        raise ValueError(f"{stack.fqn} is already quantized: load the dense model to quantize it again")
    rows, inputs = weight.shape[1:]
    one = nn.Linear(inputs, rows // stack.partitions, device="meta", dtype=weight.dtype)
    return why_incompatible(one, stack.config)


@contextlib.contextmanager
def one_by_one(stacks: Sequence[ExpertStack]) -> Iterator[None]:
    """Inside the block of code, Transformers runs experts one after another, each with F.linear."""
    configs = {id(found): found for stack in stacks if (found := getattr(stack.module, "config", None)) is not None}
    before = [(found, found._experts_implementation) for found in configs.values()]
    try:
        for found, _ in before:
            found._experts_implementation = "eager"
        yield
    finally:
        for found, implementation in before:
            found._experts_implementation = implementation


class ExpertObserver(TorchFunctionMode):
    """While active, collects X^T X of each expert, by the slice of a stack that F.linear multiplies with.

    Args:
        stacks: to watch; dense.

    Attributes:
        seen: for each stack's fqn an accumulator per expert.
        first: fqn of the stacks that read the input of the experts, not what these computed.
    """

    def __init__(self, stacks: Sequence[ExpertStack]) -> None:
        super().__init__()
        self.first: set[str] = set()
        self.seen: dict[str, list[HessianAccumulator]] = {}
        self._stacks: dict[int, tuple[str, Tensor]] = {}
        modules: set[int] = set()
        for stack in stacks:
            weight = stack.weight
            self._stacks[weight.untyped_storage().data_ptr()] = (stack.fqn, weight)
            self.seen[stack.fqn] = [
                HessianAccumulator(weight.shape[2], device=weight.device) for _ in range(len(weight))
            ]
            # an experts module declares its projections in the order in which it applies them
            self.first |= set() if id(stack.module) in modules else {stack.fqn}
            modules.add(id(stack.module))

    def add_up(self, ranks: Ranks) -> None:
        """Take in what the same observer has seen on the other ranks; all have to call this."""
        for accumulators in self.seen.values():
            for accumulator in accumulators:
                accumulator.add_up(ranks)

    def __exit__(self, *failure: Any) -> None:
        """Stop watching, and let go of the weights: a stack that is replaced is to be freed."""
        super().__exit__(*failure)
        self._stacks.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Watch F.linear, change nothing."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"]
            found = self._stacks.get(weight.untyped_storage().data_ptr()) if type(weight) is Tensor else None
            if found is not None:
                fqn, stack = found
                expert = (weight.storage_offset() - stack.storage_offset()) // stack.stride(0)
                self.seen[fqn][expert].add(x)
        return func(*args, **kwargs)


def completed(seen: Sequence[HessianAccumulator], expert: int, *, reads_input: bool) -> tuple[Tensor | None, int]:
    """X^T X [I, I] of an expert, completed as this module says, and the tokens that it saw itself.

    Args:
        seen: an accumulator per expert.
        expert: which one.
        reads_input: whether this projection reads the input that all experts share.

    Returns:
        (None, 0) if no expert saw anything.
    """
    own = seen[expert]
    total = sum(one.tokens for one in seen)
    missing = own.in_features - own.tokens
    if total == 0 or missing <= 0:
        return (own.value(), own.tokens) if total else (None, 0)
    hessian = own.value()
    if reads_input:
        for one in seen:
            if one.tokens:
                hessian += one.value() * (missing / total)
    else:
        power = sum(float(one.value().diagonal().sum()) for one in seen) / (total * own.in_features)
        hessian.diagonal().add_(missing * power)
    return hessian, own.tokens


def quantize_expert(stack: ExpertStack, expert: int, observer: ExpertObserver) -> tuple[AQLMTensor, LayerReport]:
    """Quantize one expert of a stack with what was seen.

    Raises:
        ValueError: if no expert of the stack saw any data, unless its config says "data_free".
    """
    start = time.perf_counter()
    config, dense = stack.config, stack.weight[expert]
    hessian, tokens = completed(observer.seen[stack.fqn], expert, reads_input=stack.fqn in observer.first)
    if hessian is None and config.on_unobserved != "data_free":
        raise ValueError(
            f"{stack.fqn} saw no data: its module does not multiply one expert after another with F.linear; pass "
            'on_unobserved="data_free", or leave it dense with an FqnToConfig that does not name it'
        )
    scheme, dtype = AQLMScheme.parse(config.scheme), config.codebook_dtype or dense.dtype
    parts = []
    for rows in dense.detach().chunk(stack.partitions):
        result = quantize_layer(rows, scheme, hessian=hessian, solver=config.solver, seed=config.seed, dtype=dtype)
        parts.append(AQLMTensor(result.codes, result.codebooks.to(dtype), result.scales.to(dtype)))
    weight = torch.cat(parts) if len(parts) > 1 else parts[0]
    assert isinstance(weight, AQLMTensor)
    report = LayerReport(
        stack.expert(expert),
        config.scheme,
        (weight.shape[0], weight.shape[1]),
        weight.bits_per_weight,
        tokens,
        _relative_error(dense, weight, hessian),
        time.perf_counter() - start,
    )
    return weight, report


def _relative_error(dense: Tensor, weight: AQLMTensor, hessian: Tensor | None) -> float:
    """tr(dW H dW^T) / tr(W H W^T), H the identity if it is None."""

    def power(matrix: Tensor) -> float:
        return float(((matrix if hessian is None else matrix @ hessian) * matrix).sum())

    total = power(dense.float())
    error = power(dense.float() - weight.dequantize().float())
    return error / total if total > 0 else error
