"""Quantizing a dense model while Transformers loads it, one weight at a time.

Each weight is read, brought to its device, quantized there and dropped, so the dense model never has to fit. No data is
seen: `quantize_` says what that means for quality.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)

from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.integrations.hf_config import AqlmConfig
from aqlm_tensor.integrations.hf_conversion import Problems
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import why_incompatible
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["QuantizeWeight", "WeightTarget", "targets_of"]


@dataclass(frozen=True)
class WeightTarget:
    """A weight to quantize.

    Attributes:
        config: how.
        partitions: parts of its rows with codebooks of their own, since they are separate in the checkpoint.
    """

    config: AQLMWeightConfig
    partitions: int = 1

    def bytes_per_weight(self, weight: Tensor) -> float:
        """Stored bytes per element of a weight [O, I] or [E, O, I]."""
        scheme, float_bits = AQLMScheme.parse(self.config.scheme), 8 * weight.element_size()
        return scheme.bits_per_weight(*weight.shape[-2:], float_bits=float_bits, partitions=self.partitions) / 8


def targets_of(model: Any, config: AqlmConfig, transforms: list[WeightTransform]) -> dict[str, WeightTarget]:
    """The weights to quantize, by name.

    Every `nn.Linear` but the output embedding, and the experts that Transformers merges; without tied weights and
    those that the config leaves dense.

    Args:
        model: on the meta device.
        config: what to do.
        transforms: with which Transformers will load the model.

    Raises:
        ValueError: for a layer that the scheme does not fit, or experts in a layout that codes cannot express (unless
            they are to be skipped), or if none is left.
    """
    dense = config.parsed().dense
    ties = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    targets = {}
    for layer, weight, partitions in (*_linear_layers(model), *_experts(model, transforms)):
        if layer in dense or weight in ties:
            continue
        layer_config = config.weight_config(layer)
        rows, inputs = model.get_parameter(weight).shape[-2:]
        dtype = model.get_parameter(weight).dtype
        one = nn.Linear(inputs, rows // partitions, device="meta", dtype=dtype)
        reason = why_incompatible(one, layer_config)
        if reason is None:
            targets[weight] = WeightTarget(layer_config, partitions)
        elif layer_config.on_incompatible == "raise":
            raise ValueError(
                f"{layer} cannot be quantized to {layer_config.scheme}: {reason}; choose another scheme, list it in "
                'linear_weights_not_to_quantize, or pass on_incompatible="skip"'
            )
    _check_other_experts(model, config, dense, targets)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    return targets


def _check_other_experts(
    model: Any, config: AqlmConfig, dense: frozenset[str], targets: dict[str, WeightTarget]
) -> None:
    """Raise ValueError for experts that would stay dense unasked, in most models the greater part of the weights."""
    if config.weight_config("").on_incompatible == "skip":
        return
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "experts" in name and name not in targets and name not in dense:
            raise ValueError(
                f"{name} {tuple(parameter.shape)} holds experts in a layout that the checkpoint of a "
                f"{type(model).__name__} does not split into weights [out_features, in_features]: list such weights in "
                'linear_weights_not_to_quantize, or pass on_incompatible="skip", to leave them dense'
            )


def _linear_layers(model: Any) -> Iterator[tuple[str, str, int]]:
    """(layer, weight, partitions)."""
    output = model.get_output_embeddings()
    uncalled = nn.modules.linear.NonDynamicallyQuantizableLinear  # MultiheadAttention reads the weight of this class
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, uncalled) and module is not output:
            yield layer, f"{layer}.weight", 1


def _experts(model: Any, transforms: Iterable[WeightTransform]) -> Iterator[tuple[str, str, int]]:
    """(parameter, parameter, partitions) of the stacks of experts [E, O, I] that are separate in the checkpoint."""
    for transform in transforms:
        if not isinstance(transform, WeightConverter) or len(transform.target_patterns) > 1:
            continue
        kinds = [(type(operation), getattr(operation, "dim", None)) for operation in transform.operations]
        if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            continue  # another layout, which codes may not be able to express
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 and name.endswith(transform.target_patterns[0]):
                yield name, name, len(transform.source_patterns)


class QuantizeWeight(ConversionOps):
    """A dense weight to a parameter with an AQLMTensor."""

    def __init__(self, targets: dict[str, WeightTarget], problems: Problems) -> None:
        self.targets = targets
        self.problems = problems

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride] - the keywords that the loader passes
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        """Called by Transformers; records a weight that cannot be quantized."""
        return {name: self._quantized(name, value) for name, value in input_dict.items()}

    def _quantized(self, name: str, value: Any) -> nn.Parameter:
        weight: Tensor = value[0] if isinstance(value, list) else value
        target = self.targets.get(name)
        if target is not None:
            try:
                weight = _quantize(weight, target)
            except ValueError as error:
                self.problems.found[name] = str(error)
        return nn.Parameter(weight, requires_grad=False)


def _quantize(weight: Tensor, target: WeightTarget) -> Tensor:
    """An AQLMTensor of a weight [O, I], or of a stack [E, O, I] whose experts and partitions are weights each."""
    if weight.dim() == 2:
        config = target.config
        return AQLMTensor.from_hp(weight, config.scheme, solver=config.solver, seed=config.seed)
    parts = weight.chunk(target.partitions, dim=1)
    return torch.cat([torch.stack([_quantize(expert, target) for expert in part]) for part in parts], dim=1)
