"""Which layers a config quantizes, and why not the others; everything is checked before anything is changed."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.quantizer.observers import observer_of
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["FilterFn", "Target", "check_layer", "find_targets", "why_incompatible"]

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Target:
    """A linear layer to quantize.

    Attributes:
        fqn: its fully qualified name in the model.
        module: the layer.
        config: what to do with it.
    """

    fqn: str
    module: nn.Linear
    config: AQLMWeightConfig


def find_targets(
    model: nn.Module, config: AOBaseConfig, filter_fn: FilterFn | None
) -> tuple[list[Target], dict[str, str]]:
    """The layers that a config applies to, in model order, and the reason for each that it passes over.

    Without a filter every `nn.Linear` is taken but for the output embedding of a Transformers model. A layer whose
    weight is shared with a module that is not linear (a tied embedding) is always passed over.

    Raises:
        ValueError: if a layer cannot be quantized (and its config does not say "skip"), or no layer matches.
        TypeError: if the config or a filtered module is of a wrong type.
    """
    targets: list[Target] = []
    skipped: dict[str, str] = {}
    tied = _tied_to_others(model)
    for fqn, module, layer_config in _candidates(model, config, filter_fn, skipped):
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"{fqn or 'the model'} is a {type(module).__name__}: only nn.Linear can be quantized to AQLM; leave it "
                "out of filter_fn or FqnToConfig"
            )
        if layer_config.step == "convert" and isinstance(module.weight, AQLMTensor):
            skipped[fqn] = f"it is already quantized ({module.weight.scheme})"
            continue
        if id(module.weight) in tied:
            skipped[fqn] = f"its weight is shared with {tied[id(module.weight)]}, which is not a linear layer"
            continue
        check_layer(module, layer_config, fqn)
        reason = why_incompatible(module, layer_config)
        if reason is None:
            targets.append(Target(fqn, module, layer_config))
        elif layer_config.on_incompatible == "skip":
            skipped[fqn] = reason
        else:
            raise ValueError(
                f"{fqn or 'the layer'} cannot be quantized to {layer_config.scheme}: {reason}; choose another scheme, "
                'leave it out with filter_fn, or pass on_incompatible="skip"'
            )
    if not targets:
        raise ValueError(_no_layer(model, skipped))
    return targets, skipped


def check_layer(module: nn.Linear, config: AQLMWeightConfig, fqn: str = "the layer") -> None:
    """Raise if a layer's state does not allow the config's step, whatever its shape.

    Raises:
        ValueError: for a layer that is already quantized, on the meta device, not finite, or at the wrong step.
        TypeError: for a weight that is not an ordinary floating-point tensor.
    """
    weight = module.weight
    if isinstance(weight, AQLMTensor):
        raise ValueError(f"{fqn} is already quantized ({weight.scheme}): load the dense model to quantize it again")
    _check_step(module, config, fqn)
    if isinstance(weight, DTensor):
        raise TypeError(f"{fqn} has a distributed weight (DTensor): quantize before distributing the model")
    if is_parametrized(module, "weight"):
        raise ValueError(
            f"{fqn} has a parametrized weight: make it permanent first with "
            'torch.nn.utils.parametrize.remove_parametrizations(module, "weight")'
        )
    if type(weight) not in (nn.Parameter, torch.Tensor):
        raise TypeError(f"{fqn} has a weight of type {type(weight).__name__}: only dense weights can be quantized")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"{fqn} has a {weight.dtype} weight: only float16, bfloat16, float32 or float64 can be quantized"
        )
    if weight.dtype == torch.float64 and config.codebook_dtype is None:
        raise TypeError(f"{fqn} is float64, which AQLM does not store: pass codebook_dtype=torch.float32")
    if weight.is_meta:
        raise ValueError(f"{fqn} is on the meta device and has no values: load the model before quantizing it")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{fqn} has NaN or infinite weights: repair or leave it out with filter_fn")


def _check_step(module: nn.Linear, config: AQLMWeightConfig, fqn: str) -> None:
    observer = observer_of(module)
    if config.step == "convert":
        if observer is None:
            raise ValueError(
                f'{fqn} has no observer: quantize_ with step="prepare" and run your data before step="convert"'
            )
        if str(observer.scheme) != config.scheme:
            raise ValueError(f"{fqn} was prepared for {observer.scheme} but is to be converted to {config.scheme}")
    elif observer is not None:
        raise ValueError(f'{fqn} is already prepared: run your data, then quantize_ with step="convert"')


def why_incompatible(module: nn.Linear, config: AQLMWeightConfig) -> str | None:
    """The reason why a scheme makes no sense for a layer of this size, or None."""
    scheme = AQLMScheme.parse(config.scheme)
    reason = scheme.why_not(module.out_features, module.in_features)
    if reason is not None:
        return reason
    weight = module.weight
    stored = scheme.stored_bits(
        module.out_features, module.in_features, float_bits=8 * (config.codebook_dtype or weight.dtype).itemsize
    )
    dense = 8 * weight.numel() * weight.element_size()
    if stored >= dense:
        return (
            f"it would take {stored // 8} bytes, no less than the dense {dense // 8} bytes of its "
            f"{module.out_features}x{module.in_features} weight (codebooks included)"
        )
    return None


def _candidates(
    model: nn.Module, config: AOBaseConfig, filter_fn: FilterFn | None, skipped: dict[str, str]
) -> Iterator[tuple[str, nn.Module, AQLMWeightConfig]]:
    """(name, module, config) of every module that filter and config ask for."""
    if isinstance(config, FqnToConfig):
        if filter_fn is not None:
            raise ValueError("filter_fn and FqnToConfig were both given: FqnToConfig names its layers itself")
    elif not isinstance(config, AQLMWeightConfig):
        raise TypeError(f"config must be an AQLMWeightConfig or a FqnToConfig of them, got {type(config).__name__}")
    output = _output_embedding(model)
    for fqn, module in model.named_modules():
        if isinstance(config, FqnToConfig):
            layer_config, named = _config_for(fqn, config, isinstance(module, nn.Linear))
        elif filter_fn is not None:
            layer_config, named = config if _may_be_meant(module) and filter_fn(module, fqn) else None, True
        else:
            layer_config, named = config if _is_default(module, config) else None, False
        if not isinstance(layer_config, AQLMWeightConfig):
            continue
        if module is output and not named:
            skipped[fqn] = "it is the model's output embedding, which stays dense unless a filter_fn accepts it"
            continue
        yield fqn, module, layer_config


def _is_default(module: nn.Module, config: AQLMWeightConfig) -> bool:
    """What is quantized without a filter: every linear layer, or at "convert" every one with an observer."""
    # MultiheadAttention reads the weight of this class without calling it, so no observer sees its input
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return config.step != "convert" or isinstance(module.weight, AQLMTensor) or observer_of(module) is not None


def _may_be_meant(module: nn.Module) -> bool:
    """Whether a filter that accepts a module means itself; "mlp" is also in the name of what holds the layers.

    A container, norm or activation has no matrix to quantize; a Conv1D has one, and is not passed over in silence.
    """
    return isinstance(module, nn.Linear) or any(part.dim() > 1 for part in module.parameters(recurse=False))


def _config_for(fqn: str, config: FqnToConfig, is_linear: bool) -> tuple[AOBaseConfig | None, bool]:
    """The config of a module's weight by torchao's precedence, and whether it was named rather than "_default"."""
    table = config.fqn_to_config
    weight = f"{fqn}.weight" if fqn else "weight"
    for key in (weight, fqn):
        if key in table and (key == fqn or is_linear):
            return table[key], True
    for key in (weight, fqn):
        for pattern, layer_config in table.items():
            if is_linear and pattern.startswith("re:") and re.fullmatch(pattern[3:], key):
                return layer_config, True
    return (table.get("_default"), False) if is_linear else (None, False)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The lm_head of a Transformers model, wherever it sits; None for other models."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    return output if isinstance(output, nn.Module) else None


def _tied_to_others(model: nn.Module) -> dict[int, str]:
    """id of each weight that belongs to a module that is not linear, with that module's name."""
    tied: dict[int, str] = {}
    for fqn, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            tied.update({id(parameter): fqn for parameter in module.parameters(recurse=False)})
    return tied


def _no_layer(model: nn.Module, skipped: dict[str, str]) -> str:
    types = Counter(type(module).__name__ for _, module in model.named_modules())
    seen = ", ".join(f"{name} ({count})" for name, count in types.most_common(12))
    reasons = "".join(f"\n  {fqn}: {reason}" for fqn, reason in skipped.items())
    return (
        "no nn.Linear layer matched (or was prepared), so nothing was quantized. Module types seen: "
        f"{seen}. Check filter_fn, or replace other layer types (such as GPT-2's Conv1D) by nn.Linear first."
        f"{' Passed over:' + reasons if reasons else ''}"
    )
