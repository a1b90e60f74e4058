"""A small Llama with AQLM layers and its dense twin: the same PEFT method must do the same to both."""

import copy
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import aqlm_tensor.integrations.peft_lora  # noqa: F401 - teaches PEFT
from aqlm_tensor import AQLMTensor, quantize_
from tests.models import config

__all__ = ["TARGETS", "TOKENS", "adapted", "aqlm_llama", "codes_of", "dense_twin", "logits", "perturb", "share_adapter"]

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def aqlm_llama(dtype: torch.dtype = torch.float32) -> Any:
    """Two blocks, all 14 of whose linear layers are 2x4g8; q, k, v and o have biases."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            attention_bias=True,
        )
    ).to(dtype)  # pyright: ignore[reportArgumentType]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    quantize_(model, config("2x4g8"))
    return model


def dense_twin(model: Any) -> Any:
    """A copy whose linear layers hold the dequantized weights."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, AQLMTensor):
            module.weight = nn.Parameter(module.weight.dequantize())
    return twin


def adapted(model: Any, peft_config: PeftConfig, *, seed: int = 2) -> Any:
    """A copy of the model with an adapter, initialised from the seed."""
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(model), copy.deepcopy(peft_config))


def perturb(model: nn.Module, *, seed: int = 3, size: float = 0.02) -> None:
    """Move the trainable parameters away from where the adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def share_adapter(source: nn.Module, target: nn.Module) -> None:
    """Copy the trainable parameters of one twin to the other, which must have the same."""
    values = {name: p for name, p in source.named_parameters() if p.requires_grad}
    places = {name: p for name, p in target.named_parameters() if p.requires_grad}
    assert values.keys() == places.keys()
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(values[name])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of TOKENS, in evaluation mode."""
    return model.eval()(TOKENS).logits


def codes_of(model: nn.Module) -> list[Tensor]:
    """Codes of all AQLM weights, in order."""
    return [parameter.codes for parameter in model.parameters() if isinstance(parameter, AQLMTensor)]
