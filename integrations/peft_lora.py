"""PEFT on AQLM layers: every adapter trains on the codes, merges without loss, and gives the codes back.

PEFT takes an `AQLMTensor` for one of torchao's weights and goes two ways with it: adapters that only add to a layer's
output train, but cannot merge; those that look at the weight (DoRA's norm, PiSSA's singular vectors) fail. One hook
serves all methods instead. While PEFT creates an adapter on a layer, the layer shows it the dense weight; afterwards
the codes are back, and the adapter handles them (`aqlm_tensor.integrations.peft_layers`).

The trade-off: a merged layer is dense. Merging into codes means quantizing again, with a new error, so that happens
only on demand, by `merge_and_requantize`.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torchao.quantization import FqnToConfig

from aqlm_tensor.api import quantize_
from aqlm_tensor.config import AQLMWeightConfig, SolverConfig
from aqlm_tensor.integrations.peft_layers import (
    adopt,
    aqlm_weight,
    forget_initial_adapter,
    keep_initial_adapter,
    put_weight,
)
from aqlm_tensor.integrations.wrapping import wrap_once
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["merge_and_requantize", "register"]

_REFUSED = {
    "GLORA": "multiplies the dense weight element by element in every forward pass",
    "HIRA": "multiplies the dense weight element by element in every forward pass",
    "OSF": "replaces the weight by the singular vectors of the dense weight, and trains those",
    "SUPERTUNING": "changes single elements of the dense weight",
}
_SUBTRACTED = ("pissa", "olora", "corda")  # initialisations that take the adapter out of the weight


def register() -> None:
    """Teach PEFT to handle AQLM weights; importing this module does it, and doing it again changes nothing.

    It applies to adapters created afterwards, by any of PEFT's functions, on any model. Layers whose weight is not an
    AQLMTensor are not touched. SHiRA makes one layer at a time dense in every forward pass, as PEFT adds to the
    weight there; the others run on the codes. Methods that cannot work raise an error when the adapter is created.
    """
    wrap_once(BaseTuner, "inject_adapter", _injecting)
    for module in (peft, peft.utils, peft.utils.other):
        wrap_once(module, "prepare_model_for_kbit_training", _preparing)


def merge_and_requantize(
    model: peft.PeftModel,
    calibrate: Callable[[nn.Module], object] | None = None,
    *,
    solver: SolverConfig | None = None,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """Merge adapters and quantize the merged layers again, each to the scheme and dtype that it had.

    The new codes have an error of their own: `model.merge_and_unload()` without this is lossless, but leaves those
    layers dense. Compare the model before and after.

    Args:
        model: with adapters on AQLM layers; it is taken apart.
        calibrate: runs your data through the model that it is given, so that the new codes fit the layers' inputs.
            None quantizes without data, which at 2 bits is only good enough for large layers.
        solver: the effort to spend on each layer; None for the defaults.
        adapter_names: which adapters to merge; None for the active ones.

    Returns:
        The base model, without PEFT's layers.

    Raises:
        ValueError: if no adapter sits on an AQLM layer, or the merged weights are not finite.
    """
    schemes = {
        id(layer.get_base_layer()): (str(weight.scheme), weight.dtype)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and (weight := aqlm_weight(layer)) is not None
    }
    base: Any = model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    configs = OrderedDict()
    for name, module in base.named_modules():
        if id(module) in schemes and aqlm_weight(module) is None:
            scheme, dtype = schemes[id(module)]
            configs[name] = AQLMWeightConfig(scheme, solver=solver or SolverConfig(), codebook_dtype=dtype)
    if not configs:
        raise ValueError("no adapter was merged into an AQLM layer: nothing to quantize again")
    if calibrate is None:
        quantize_(base, FqnToConfig(configs))
        return base
    for step in ("prepare", "convert"):
        quantize_(base, FqnToConfig(OrderedDict((name, replace(c, step=step)) for name, c in configs.items())))
        if step == "prepare":
            with torch.no_grad():
                calibrate(base)
    return base


def _injecting(inject: Callable) -> Callable:
    """BaseTuner.inject_adapter, in which each layer with an AQLM weight is handled by `_create`."""

    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_method(self.peft_config[adapter_name], model)
        create = self._create_and_replace
        self._create_and_replace = functools.partial(_create, create)
        try:
            inject(self, model, adapter_name, *args, **kwargs)
        finally:
            del self._create_and_replace

    return inject_adapter


def _create(
    create: Callable,
    config: Any,
    adapter: str,
    target: nn.Module,
    name: str,
    parent: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    """PEFT's creation of an adapter on one layer, which has a dense weight meanwhile.

    Raises:
        ValueError: if the adapter needs what codes cannot give; the layer is left as it was.
    """
    _check_parameter(target, kwargs.get("parameter_name"))
    weight = aqlm_weight(target)
    if weight is None:
        create(config, adapter, target, name, parent, *args, **kwargs)
        return
    base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    forget_initial_adapter(target, adapter)
    put_weight(base, weight.dequantize())
    try:
        create(config, adapter, target, name, parent, *args, **kwargs)
        layer: Any = getattr(parent, name)
        if not weight.is_meta and not torch.equal(base.weight, weight.dequantize()):
            _keep_change(layer, adapter, config)
    except BaseException:
        setattr(parent, name, target)
        raise
    finally:
        put_weight(base, weight)
    adopt(layer)


def _check_method(config: Any, model: nn.Module) -> None:
    """Raise ValueError for a method that cannot work on the AQLM layers of a model, before anything is changed."""
    if not any(isinstance(parameter, AQLMTensor) for parameter in model.parameters()):
        return
    method = getattr(config.peft_type, "value", config.peft_type)
    reason = _REFUSED.get(method)
    if getattr(config, "init_lora_weights", None) == "loftq":
        method, reason = "LoftQ", "quantizes a dense weight itself, and this one is quantized already"
    elif getattr(config, "kasa_config", None) is not None:
        method, reason = "KaSA", "takes singular vectors out of the dense weight, which codes cannot express"
    if reason is not None:
        raise ValueError(
            f"{method} cannot be used on a model with AQLM weights: it {reason}. Use LoRA or another method, or make "
            "the layers dense first: `layer.weight = nn.Parameter(layer.weight.dequantize())`"
        )


def _check_parameter(target: nn.Module, parameter_name: str | None) -> None:
    """Raise ValueError for LoRA's `target_parameters` on AQLM weights: it adds to the weight in every forward pass."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None and isinstance(base._parameters.get(parameter_name), AQLMTensor):
        raise ValueError(
            f"target_parameters names {parameter_name!r} of a {type(base).__name__}, an AQLM weight to which LoRA "
            "would have to add in every forward pass: for an nn.Linear use target_modules instead"
        )


def _keep_change(layer: nn.Module, adapter: str, config: Any) -> None:
    """Make up for a change that an initialisation made to the weight.

    Raises:
        ValueError: if that is not possible.
    """
    init = getattr(config, "init_lora_weights", None)
    if not (isinstance(layer, lora.Linear) and isinstance(init, str) and init.lower().startswith(_SUBTRACTED)):
        raise ValueError(
            f"{type(config).__name__} changes the weight of the layer when the adapter is created, which codes cannot "
            "express: use another initialisation or method"
        )
    keep_initial_adapter(layer, adapter)


def _preparing(prepare: Callable) -> Callable:
    """prepare_model_for_kbit_training, which otherwise would not know models that `quantize_` quantized.

    It would cast their weights to float32 and leave gradient checkpointing off.
    """

    def prepare_model_for_kbit_training(model: Any, *args: Any, **kwargs: Any) -> Any:
        unmarked = getattr(model, "quantization_method", None) is None
        if not unmarked or not any(isinstance(parameter, AQLMTensor) for parameter in model.parameters()):
            return prepare(model, *args, **kwargs)
        model.quantization_method = "aqlm"
        try:
            return prepare(model, *args, **kwargs)
        finally:
            del model.quantization_method

    return prepare_model_for_kbit_training


register()
