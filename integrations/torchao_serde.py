"""Transformers' `TorchAoConfig(AQLMWeightConfig(...))`: it quantizes on the fly, and must not save.

torchao's own serialization knows a fixed list of tensor classes and names of their parts. Transformers cannot read an
AQLM weight written that way, and puts random values in its place. So saving is refused here with the remedy: the AQLM
checkpoint format, which `as_aqlm` makes `save_pretrained` write.
"""

from collections.abc import Callable
from typing import Any

from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from aqlm_tensor.integrations.hf_quantizer import attach
from aqlm_tensor.integrations.wrapping import wrap_once
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["as_aqlm", "register"]


def register() -> None:
    """Make Transformers refuse to save AQLM weights as torchao's; doing it again changes nothing."""
    wrap_once(TorchAoHfQuantizer, "get_state_dict_and_metadata", _refusing)


def as_aqlm(model: Any) -> Any:
    """Turn a model that `TorchAoConfig(AQLMWeightConfig(...))` quantized into one as from an AQLM checkpoint.

    From then on `save_pretrained` writes an AQLM checkpoint, and Trainer accepts the model for training adapters.

    Args:
        model: a PreTrainedModel.

    Returns:
        The same model.

    Raises:
        ValueError: if it has no AQLM weights, or weights of other torchao types beside them.
    """
    parameters = dict(model.named_parameters())
    others = [n for n, p in parameters.items() if isinstance(p, TorchAOBaseTensor) and not isinstance(p, AQLMTensor)]
    if others:
        kind = type(parameters[others[0]]).__name__
        raise ValueError(
            f"{others[0]} is a {kind} of torchao ({len(others)} such weights): an AQLM checkpoint holds AQLM and dense "
            "weights only, so make those dense first"
        )
    if not any(isinstance(parameter, AQLMTensor) for parameter in parameters.values()):
        raise ValueError(f"the {type(model).__name__} has no AQLM weights: quantize it first")
    model.hf_quantizer = None
    attach(model)
    return model


def _refusing(method: Callable) -> Callable:
    def get_state_dict_and_metadata(self: TorchAoHfQuantizer, model: PreTrainedModel) -> Any:
        if any(isinstance(parameter, AQLMTensor) for parameter in model.parameters()):
            raise ValueError(
                "AQLM weights cannot be saved as torchao's: they would be random after loading. Save an AQLM "
                "checkpoint instead: `aqlm_tensor.integrations.torchao_serde.as_aqlm(model).save_pretrained(folder)`, "
                "or `aqlm_tensor.save(model, folder)`"
            )
        return method(self, model)

    return get_state_dict_and_metadata


register()
