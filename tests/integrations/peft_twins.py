"""A small Llama with AQLM layers and its dense twin: the same PEFT method must do the same to both."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import aqlm_tensor.integrations.peft_lora  # noqa: F401 - teaches PEFT
from aqlm_tensor import AQLMTensor, quantize_
from tests.models import config

__all__ = [
    "DORA",
    "PISSA",
    "PLAIN",
    "TARGETS",
    "TOKENS",
    "adapted",
    "aqlm_llama",
    "codes_of",
    "dense_twin",
    "each_kind",
    "gradients_of",
    "logits",
    "lora_config",
    "perturb",
    "q_proj",
    "share_adapter",
    "trained",
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
PLAIN: dict[str, Any] = {}
DORA: dict[str, Any] = {"use_dora": True}
PISSA: dict[str, Any] = {"init_lora_weights": "pissa"}
each_kind = pytest.mark.parametrize("kind", [PLAIN, DORA, PISSA], ids=["lora", "dora", "pissa"])
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


def lora_config(**options: Any) -> LoraConfig:
    """LoRA on some layers."""
    return LoraConfig(target_modules=TARGETS, **options)


def trained(seed: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A small AQLM model with a LoRA adapter that does something."""
    model = adapted(aqlm_llama(dtype), lora_config(**options))
    perturb(model, seed=seed)
    return model


def q_proj(model: Any) -> Any:
    """The first layer, or PEFT's layer around it."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model.layers[0].self_attn.q_proj


def gradients_of(model: Any) -> list[Tensor]:
    """To the trainable parameters, in training mode."""
    model.zero_grad()
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


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
