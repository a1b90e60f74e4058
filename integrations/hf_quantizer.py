"""AqlmQuantizer: how Transformers loads, quantizes on the fly, saves and dequantizes AQLM models.

It replaces Transformers' own AQLM quantizer, which looks for modules under the names of weights, so that `lm_head`
becomes a quantized layer without values and experts stay random. Modules keep their class here; only parameters change
type, and the checkpoint's tensors decide which.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from aqlm_tensor.checkpoint import PARTS, whole_state
from aqlm_tensor.integrations.hf_checkpoint import check_checkpoint
from aqlm_tensor.integrations.hf_config import AqlmConfig
from aqlm_tensor.integrations.hf_conversion import (
    Problems,
    checkpoint_names,
    checkpoint_weights,
    is_ours,
    linear_converter,
    original_of,
    stack_converter,
    with_parts,
)
from aqlm_tensor.integrations.hf_on_the_fly import QuantizeWeight, WeightTarget, targets_of
from aqlm_tensor.integrations.hf_tensor_parallel import KeepPart, TensorParallel
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.training import inside_trainable

__all__ = ["AqlmQuantizer", "attach", "memory_footprint"]


class AqlmQuantizer(HfQuantizer):
    """Transformers' hooks for `quant_method: aqlm`.

    Args:
        quantization_config: an AqlmConfig, or what `AqlmConfig.of` makes one of.
        kwargs: of HfQuantizer; `pre_quantized` says whether the checkpoint is quantized already.
    """

    requires_calibration = False
    quantization_config: AqlmConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(AqlmConfig.of(quantization_config), **kwargs)
        self.serialized_names = {"weight": list(PARTS)}
        self._problems = Problems()
        self._files: Sequence[str] | None = None
        self._loading = True  # until the conversions are known: PEFT asks for them again later
        self._sizes: dict[str, int] = {}
        self._model_transforms: list[WeightTransform] = []
        self._targets: dict[str, WeightTarget] = {}
        self._parallel = TensorParallel()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to offload to disk, which would write tensors one by one as plain arrays.

        Raises:
            ValueError: if a device map places a part on the disk.
        """
        if isinstance(device_map, dict) and "disk" in {str(device) for device in device_map.values()}:
            on_disk = [name for name, device in device_map.items() if str(device) == "disk"]
            raise ValueError(
                f"AQLM weights cannot be offloaded to disk, where the device map puts {', '.join(on_disk[:5])}: "
                'offload to "cpu", or pass max_memory with more room'
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Only the first look at the model's config, which must not hold another kind of quantization config."""
        config.quantization_config = self.quantization_config
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        self._files = checkpoint_files
        if self.pre_quantized and checkpoint_files is None:
            raise ValueError("an AQLM model is loaded from its files: pass a folder and no state_dict")

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], model: Any) -> list[WeightTransform]:
        """Add converters for quantized weights, and check the checkpoint against the model; or choose what to quantize.

        Raises:
            ValueError: if they do not fit (see `check_checkpoint` and `targets_of`).
        """
        first, self._loading = self._loading, False
        if first:
            self._model_transforms = weight_conversions
        if not self.pre_quantized:
            if first:
                self._targets = targets_of(model, self.quantization_config, weight_conversions)
            return weight_conversions
        parts = [
            with_parts(entry, self._problems) for entry in weight_conversions if isinstance(entry, WeightConverter)
        ]
        parts.append(stack_converter(model, self._problems))
        alone = linear_converter(self._problems, KeepPart(self._parallel))
        transforms = [*weight_conversions, *(entry for entry in parts if entry is not None), alone]
        if first and self._files is not None:
            self._sizes = check_checkpoint(model, self._files, transforms, self.quantization_config.parsed())
            self._parallel.prepare(model, self._files, transforms)
        return transforms

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a dense weight is quantized as it arrives."""
        return param_name in self._targets

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Stored bytes per weight, so that device maps are planned with the real size."""
        if param_name in self._targets:
            return self._targets[param_name].bytes_per_weight(param)
        if param_name in self._sizes and param.numel():
            return self._sizes[param_name] / param.numel()
        return param.element_size()

    def get_quantize_ops(self) -> QuantizeWeight:
        """The operation that quantizes one dense weight."""
        return QuantizeWeight(self._targets, self._problems)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._problems.raise_any()
        self._parallel.finish(model)
        used = [entry for entry in model._weight_conversions if not is_ours(entry)]
        merged = [entry for entry in model._weight_conversions if is_ours(entry)]
        originals = [original_of(entry, self._model_transforms) for entry in merged]
        model._weight_conversions = [
            entry for entry in self._model_transforms if entry in used or entry in originals
        ] or used
        for module in model.modules():
            if isinstance(module, nn.Linear) and isinstance(module.weight, AQLMTensor):
                set_quantized([module], module.weight)
        if not self.pre_quantized:
            self._describe(model)
        return model

    def get_state_dict_and_metadata(  # pyright: ignore[reportIncompatibleMethodOverride] - the base class has none
        self, model: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save, with quantized weights taken apart; brings config.quantization_config up to date."""
        return self._describe(model), {}

    def _describe(self, model: Any) -> dict[str, Tensor]:
        """The state dict to save, after making the config say what it holds."""
        state = whole_state(model)
        weights = {name: self._parallel.whole(name, weight) for name, weight in _quantized(model, state).items()}
        for name, weight in weights.items():
            if weight.orientation != "matrix":
                raise ValueError(f"{name} is a {weight.orientation} view of an AQLM weight, which no checkpoint holds")
        pieces = checkpoint_weights(model, weights)
        schemes = {stored: piece.scheme for stored, piece in pieces.values()}
        if schemes:
            self.quantization_config = _updated(self.quantization_config, model, schemes)
            model.config.quantization_config = self.quantization_config
        elif hasattr(model.config, "quantization_config"):  # all dense by now, as after a merge of adapters
            del model.config.quantization_config
        plain = {
            name: value
            for name, value in state.items()
            if not isinstance(value, AQLMTensor) and not _is_offloaded_twin(model, name, value)
        }
        written: set[int] = set()
        for name, (_, piece) in pieces.items():
            for part, tensor in zip(PARTS, piece.parts(), strict=True):
                plain[f"{name.removesuffix('.weight')}.{part}"] = _alone(tensor, written)
        return plain

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained makes the config's a name
        dense: dict[int, nn.Parameter] = {}  # weights that modules share stay shared
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                if isinstance(weight, AQLMTensor):
                    if weight.is_meta:
                        raise ValueError("offloaded weights cannot be made dense: load the model without offloading")
                    if id(weight) not in dense:
                        dense[id(weight)] = nn.Parameter(weight.dequantize().to(dtype))
                    module._parameters[name] = dense[id(weight)]
        return model

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - an abstract property
        """Trainer may train adapters on the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Trainer may train codebooks and scales, where they are parameters."""
        return inside_trainable()

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the model."""
        return True

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - abstract, unannotated
        """save_pretrained works."""
        return True


def attach(model: Any) -> bool:
    """Give a Transformers model that was quantized in place (by `quantize_`) what one loaded from a checkpoint has.

    `save_pretrained` and `dequantize` do it by themselves.

    Returns:
        Whether the model has AQLM weights and had no quantizer.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    schemes = {name: weight.scheme for name, weight in _quantized(model, whole_state(model)).items()}
    if not schemes:
        return False
    quantizer = AqlmQuantizer(AqlmConfig.describing(schemes, ()), pre_quantized=True)
    quantizer.quantization_config.linear_weights_not_to_quantize = []
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QuantizationMethod.AQLM
    quantizer._describe(model)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._is_quantized = True
    return True


def memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """Bytes of a model's parameters (and buffers), codes at their real size."""
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    parts = [part for tensor in tensors for part in (tensor.parts() if isinstance(tensor, AQLMTensor) else (tensor,))]
    return sum(part.numel() * part.element_size() for part in parts)


def _quantized(model: Any, state: dict[str, Any]) -> dict[str, AQLMTensor]:
    """The model's quantized weights by name, without those that its class ties to another, offloaded ones included."""
    ties = getattr(model, "all_tied_weights_keys", {})
    weights = {}
    for name, value in state.items():
        if not isinstance(value, AQLMTensor):
            continue
        source = ties.get(name)
        if source in state and model.get_parameter(source) is model.get_parameter(name):
            continue
        weights[name] = load_offloaded_parameter(model, name) if value.is_meta else value
    return weights


def _is_offloaded_twin(model: Any, name: str, value: Tensor) -> bool:
    """Whether a weight lies where the one lies that its class ties it to; on the meta device nothing else can tell."""
    source = getattr(model, "all_tied_weights_keys", {}).get(name)
    if source is None or not value.is_meta or not model.get_parameter(source).is_meta:
        return False
    one, other = (load_offloaded_parameter(model, tied) for tied in (name, source))
    return one.data_ptr() == other.data_ptr()


def _alone(tensor: Tensor, written: set[int]) -> Tensor:
    """The tensor contiguous and alone in its memory, as safetensors wants it; notes its address in `written`."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in written:
        tensor = tensor.clone()
    written.add(tensor.data_ptr())
    return tensor


def _updated(config: AqlmConfig, model: Any, schemes: dict[str, AQLMScheme]) -> AqlmConfig:
    """A config that describes a model: the one it was loaded with as long as that is right."""
    parsed = config.parsed()
    tied = getattr(model, "all_tied_weights_keys", {})  # not in the checkpoint
    dense = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module.weight, AQLMTensor)
        and (f"{name}.weight" not in tied or model.get_parameter(tied[f"{name}.weight"]) is not module.weight)
    ]
    dense = [name.removesuffix(".weight") for name in checkpoint_names(model, dense)]
    right = all(parsed.scheme_of(layer) == scheme for layer, scheme in schemes.items())
    if right and parsed.dense.isdisjoint(schemes) and parsed.dense.issuperset(dense):
        return config
    return AqlmConfig.describing(schemes, dense)
