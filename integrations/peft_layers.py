"""What a PEFT layer around an AQLM weight does differently: merging, and initialisations that change the weight.

`adopt` changes the class of a PEFT layer to a subclass. A merge then writes to a dense copy of the
weight, made for the purpose, while the codes wait beside it; unmerging puts the very same codes back, where PEFT's own
arithmetic would leave rounding errors and could not produce codes at all.

PiSSA, OLoRA and CorDA start from an adapter B0 A0 taken out of the weight, and subtract it there. Codes cannot absorb
the difference, so the layer keeps a frozen copy of the initial adapter and computes W x + s (B A - B0 A0) x: the same
function and gradients, with the weight as it was.
"""

import functools
from typing import Any, cast

from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_tensor.integrations.peft_dora import AQLMDoraLayer
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["adopt", "aqlm_weight", "forget_initial_adapter", "keep_initial_adapter", "put_weight"]


def aqlm_weight(module: nn.Module) -> AQLMTensor | None:
    """The AQLM weight of an nn.Linear, wrapped by PEFT or not, or None."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = base._parameters.get("weight") if isinstance(base, nn.Linear) else None
    return weight if isinstance(weight, AQLMTensor) else None


def put_weight(layer: nn.Module, weight: Tensor) -> None:
    """Replace a layer's weight, past the hooks by which PEFT and accelerate send new parameters to the meta device."""
    layer._parameters["weight"] = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)


class _AQLMBackend(QuantizationBackend):
    """Access to the dense weight, for PEFT methods that need it in their forward pass or for merging."""

    supports_merge = True
    backend_name = "aqlm"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The dense weight [O, I]."""
        weight: Any = base_layer.weight
        return weight.dequantize() if isinstance(weight, AQLMTensor) else weight.data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Store a merged, dense weight."""
        put_weight(peft_layer.get_base_layer(), weight_data)


@functools.cache
def _adopted(cls: Any) -> Any:
    """A PEFT layer class that merges into a dense copy of an AQLM weight, and gives the codes back.

    It is a subclass made on the fly, and not a mixin: only then has it the memory layout that allows an existing layer
    to change to it.
    """

    class AQLMLayer(cls):
        _unmerged: tuple[AQLMTensor, Tensor | None] | None = None  # weight and bias as they were; set while merged
        _merging = False

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            nested, self._merging = self._merging, True
            _make_dense(self)
            try:
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            finally:
                self._merging = nested
                _restore(self)

        def unmerge(self) -> None:
            super().unmerge()
            _restore(self)

        def __reduce_ex__(self, protocol: Any) -> tuple:
            return _rebuild, (cls,), self.__dict__  # to copy and pickle by way of the class that has a name

    AQLMLayer.__name__ = AQLMLayer.__qualname__ = f"AQLM{cls.__name__}"
    return AQLMLayer


def _rebuild(cls: Any) -> Any:
    return _adopted(cls).__new__(_adopted(cls))


def _make_dense(layer: Any) -> None:
    """Replace an AQLM weight by a dense copy and keep it, with the bias, for `_restore`."""
    base = layer.get_base_layer()
    weight = aqlm_weight(base)
    if weight is not None:
        layer._unmerged = weight, None if base.bias is None else base.bias.detach().clone()
        put_weight(base, weight.dequantize())


def _restore(layer: Any) -> None:
    """Unless adapters are merged, put weight and bias back as they were, on the device and in the dtype of now.

    DoRA unmerges for a moment in the middle of merging: then the weight remains dense.
    """
    if layer._unmerged is None or layer.merged:
        return
    base = layer.get_base_layer()
    weight, bias = layer._unmerged
    if (weight.device, weight.dtype) != (base.weight.device, base.weight.dtype):
        weight = weight.to(base.weight.device, base.weight.dtype)
    if layer._merging:
        base.weight.data = weight.dequantize()  # into the same parameter, which DoRA goes on to use
    else:
        put_weight(base, weight)
        layer._unmerged = None
    if bias is not None:
        base.bias.data.copy_(bias)


def adopt(layer: Any) -> None:
    """Make a PEFT layer handle the AQLM weight of its base layer; again, after an adapter was added to it."""
    if not hasattr(layer, "_unmerged"):
        layer.__class__ = _adopted(type(layer))
        layer.quantization_backend = _AQLMBackend()
    weight = aqlm_weight(layer)
    norms: Any = getattr(layer, "lora_magnitude_vector", {})
    for norm in norms.values():
        if weight is not None and type(norm) is DoraLinearLayer:
            norm.__class__ = AQLMDoraLayer
            cast("AQLMDoraLayer", norm).prepare(weight)


class _InitialAdapter(nn.Module):
    """The adapter that an initialisation took out of the weight: A0 [r, I] and s B0 [O, r], frozen, not saved."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def delta(self) -> Tensor:
        """s B0 A0, [O, I], in float32."""
        return self.up.float() @ self.down.float()


class _DifferenceVariant(LoraVariant):
    """LoRA that adds s (B A - B0 A0), which is zero at the start."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight.float() + _difference(module, active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = _DifferenceVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight.data.float() - _difference(module, active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG004
        low_rank = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        added = module.lora_B[active_adapter](low_rank) * module.scaling[active_adapter]
        return result + added - module.aqlm_initial[active_adapter](x)  # no dropout: it stands for part of the weight


def _difference(module: Any, adapter: str) -> Tensor:
    return module.get_delta_weight(adapter).float() - module.aqlm_initial[adapter].delta()


def keep_initial_adapter(layer: Any, adapter: str) -> None:
    """Subtract a LoRA layer's adapter as it is now from what it will add, instead of from the weight.

    Raises:
        ValueError: if the adapter is of a LoRA variant of its own (DoRA, for example).
    """
    if adapter in layer.lora_variant:
        raise ValueError(
            f"an initialisation that takes the adapter out of the weight (PiSSA, OLoRA, CorDA) cannot be combined with "
            f"{type(layer.lora_variant[adapter]).__name__} on AQLM weights: use init_lora_weights=True"
        )
    if not hasattr(layer, "aqlm_initial"):
        layer.aqlm_initial = nn.ModuleDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, "aqlm_initial")  # moved and deleted with the others
    down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    layer.aqlm_initial[adapter] = _InitialAdapter(down.clone(), up * layer.scaling[adapter])
    layer.lora_variant[adapter] = _DifferenceVariant()


def forget_initial_adapter(layer: Any, adapter: str) -> None:
    """Undo `keep_initial_adapter`, for an adapter of the same name that takes its place."""
    if isinstance(getattr(layer, "lora_variant", {}).get(adapter), _DifferenceVariant):
        del layer.lora_variant[adapter], layer.aqlm_initial[adapter]
