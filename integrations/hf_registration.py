"""What `aqlm_tensor.integrations.hf` registers, and the methods of Transformers and accelerate that it wraps.

Transformers offers no hook for models that were quantized after loading, nor for the size of packed parameters, so
three methods of PreTrainedModel are wrapped, and accelerate's search for tied weights. Models without AQLM weights are
not affected.
"""

import importlib.util
from collections.abc import Callable
from functools import wraps
from typing import Any

import accelerate.big_modeling
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from aqlm_tensor.integrations import hf_moe, torchao_serde
from aqlm_tensor.integrations.hf_config import AqlmConfig
from aqlm_tensor.integrations.hf_quantizer import AqlmQuantizer, attach, memory_footprint
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["register"]


def register() -> None:
    """Register with Transformers, accelerate and (if it is installed) PEFT; importing this module does it."""
    AUTO_QUANTIZER_MAPPING["aqlm"] = AqlmQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["aqlm"] = AqlmConfig
    hf_moe.register()
    torchao_serde.register()
    for name in ("save_pretrained", "dequantize"):
        _wrap(PreTrainedModel, name, _attaching)
    _wrap(PreTrainedModel, "get_memory_footprint", _real_size)
    _wrap(accelerate.big_modeling, "find_tied_parameters", _only_dense)
    if importlib.util.find_spec("peft") is not None:
        from aqlm_tensor.integrations import peft_lora

        peft_lora.register()


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "_aqlm_tensor"):
        wrapped: Any = wraps(original)(wrapper(original))
        wrapped._aqlm_tensor = True
        setattr(owner, name, wrapped)


def _attaching(method: Callable) -> Callable:
    def call(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        attach(self)
        return method(self, *args, **kwargs)

    return call


def _real_size(method: Callable) -> Callable:
    def get_memory_footprint(self: PreTrainedModel, return_buffers: bool = True) -> int:
        if any(isinstance(parameter, AQLMTensor) for parameter in self.parameters()):
            return memory_footprint(self, return_buffers)
        return method(self, return_buffers)

    return get_memory_footprint


def _only_dense(find: Callable) -> Callable:
    """accelerate tells tied weights apart by their address, which is 0 for all that wrap other tensors."""

    def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        groups = find(model, **kwargs)
        return [group for group in groups if not isinstance(parameters[group[0]], AQLMTensor)]

    return find_tied_parameters
