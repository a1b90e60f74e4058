"""Quantizing a dense model while Transformers loads it, one weight at a time.

Each weight is read, brought to its device, quantized there and dropped, so the dense model never has to fit. No data is
seen: `quantize_` says what that means for quality.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.integrations.hf_config import AqlmConfig
from aqlm_tensor.integrations.hf_conversion import Problems
from aqlm_tensor.targets import why_incompatible
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["QuantizeWeight", "targets_of"]


def targets_of(model: Any, config: AqlmConfig) -> dict[str, AQLMWeightConfig]:
    """The weights to quantize, by name, each with its config.

    Every `nn.Linear` but the output embedding, tied weights and those that the config leaves dense.

    Raises:
        ValueError: for a layer that the scheme does not fit (unless it is to be skipped), or if none is left.
    """
    dense = config.parsed().dense
    output = model.get_output_embeddings()
    ties = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    targets = {}
    for layer, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            continue
        if module is output or layer in dense or f"{layer}.weight" in ties:
            continue
        layer_config = config.weight_config(layer)
        reason = why_incompatible(module, layer_config)
        if reason is None:
            targets[f"{layer}.weight"] = layer_config
        elif layer_config.on_incompatible == "raise":
            raise ValueError(
                f"{layer} cannot be quantized to {layer_config.scheme}: {reason}; choose another scheme, list it in "
                'linear_weights_not_to_quantize, or pass on_incompatible="skip"'
            )
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    return targets


class QuantizeWeight(ConversionOps):
    """A dense weight to a parameter with an AQLMTensor."""

    def __init__(self, targets: dict[str, AQLMWeightConfig], problems: Problems) -> None:
        self.targets = targets
        self.problems = problems

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride] - the keywords that the loader passes
        self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Called by Transformers; records a weight that cannot be quantized."""
        return {name: self._quantized(name, value) for name, value in input_dict.items()}

    def _quantized(self, name: str, value: Any) -> nn.Parameter:
        weight: Tensor = value[0] if isinstance(value, list) else value
        config = self.targets.get(name)
        if config is not None:
            try:
                weight = AQLMTensor.from_hp(weight, config.scheme, solver=config.solver, seed=config.seed)
            except ValueError as error:
                self.problems.found[name] = str(error)
        return nn.Parameter(weight, requires_grad=False)
