"""What `aqlm_tensor.integrations.hf` registers, and the methods of Transformers that it wraps.

Transformers offers no hook for models that were quantized after loading, nor for the size of packed parameters, so
three methods of PreTrainedModel are wrapped. Models without AQLM weights are not affected.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from aqlm_tensor.integrations import hf_accelerate, hf_moe, torchao_serde
from aqlm_tensor.integrations.hf_config import AqlmConfig
from aqlm_tensor.integrations.hf_quantizer import AqlmQuantizer, attach, memory_footprint
from aqlm_tensor.integrations.wrapping import wrap_once
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["register"]


def register() -> None:
    """Register with Transformers, accelerate and (if it is installed) PEFT; importing this module does it."""
    AUTO_QUANTIZER_MAPPING["aqlm"] = AqlmQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["aqlm"] = AqlmConfig
    hf_accelerate.register()
    hf_moe.register()
    torchao_serde.register()
    wrap_once(PreTrainedModel, "save_pretrained", _saving)
    wrap_once(PreTrainedModel, "dequantize", _attaching)
    wrap_once(PreTrainedModel, "get_memory_footprint", _real_size)
    if importlib.util.find_spec("peft") is not None:
        from aqlm_tensor.integrations import peft_lora

        peft_lora.register()


def _attaching(method: Callable) -> Callable:
    def call(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        attach(self)
        return method(self, *args, **kwargs)

    return call


def _saving(save: Callable) -> Callable:
    """save_pretrained, which fetches offloaded weights only if a device map says that there are any."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        attach(self)
        offloaded = any(isinstance(parameter, AQLMTensor) and parameter.is_meta for parameter in self.parameters())
        if not offloaded or hasattr(self, "hf_device_map"):
            return save(self, *args, **kwargs)
        self.hf_device_map = {"": "cpu"}  # as from_pretrained notes it
        try:
            return save(self, *args, **kwargs)
        finally:
            del self.hf_device_map

    return save_pretrained


def _real_size(method: Callable) -> Callable:
    def get_memory_footprint(self: PreTrainedModel, return_buffers: bool = True) -> int:
        if any(isinstance(parameter, AQLMTensor) for parameter in self.parameters()):
            return memory_footprint(self, return_buffers)
        return method(self, return_buffers)

    return get_memory_footprint
