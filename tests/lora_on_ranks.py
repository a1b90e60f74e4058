"""LoRA on a small AQLM Llama, trained on two ranks as in one process: what FSDP2, DDP and accelerate must do."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from aqlm_tensor import AQLMTensor
from aqlm_tensor.integrations import peft_lora  # noqa: F401 - registers
from aqlm_tensor.linear import set_quantized
from tests import ranks
from tests.tensor.weights import random_weight

__all__ = ["assert_trains_as_in_one_process", "lora_model", "tokens"]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tokens() -> Tensor:
    """A batch [4, 16]."""
    return (torch.arange(64, device=ranks.device()).view(4, 16) * 7) % 64


def lora_model(seed: int = 0) -> Any:
    """A tiny Llama with random AQLM weights and LoRA adapters that are not zero."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    linears = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    for index, layer in enumerate(linears):
        w = random_weight("2x4g8", layer.out_features, layer.in_features, seed=seed + index)
        set_quantized([layer], AQLMTensor(w.codes, w.codebooks * 0.05, w.scales))
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(model, config).to(ranks.device())


def two_steps(model: Any, batch: Tensor, accelerator: Any = None) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Loss and gradients of two steps of SGD."""
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, gradients = [], []
    for _ in range(2):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward() if accelerator is None else accelerator.backward(loss)
        full = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in trained.items()}
        gradients.append({n.removeprefix("module."): g.clone() for n, g in full.items()})
        losses.append(mean_of_ranks(loss.detach()) if batch.shape != tokens().shape else loss.item())
        optimizer.step()
    return losses, gradients


def mean_of_ranks(value: Tensor) -> float:
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total.item() / 2


def assert_trains_as_in_one_process(model: Any, rank: int, accelerator: Any = None) -> None:
    """Each rank sees half of the batch, and FSDP2 and DDP average the gradients.

    Args:
        model: distributed already, or by the accelerator.
        rank: of this process.
        accelerator: accelerate's, or None.
    """
    losses, gradients = two_steps(model, tokens().chunk(2)[rank], accelerator)
    expected_losses, expected = two_steps(lora_model(), tokens())
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert len(expected[0]) == 12
    for step in range(2):
        assert gradients[step].keys() == expected[step].keys()
        for name, gradient in gradients[step].items():
            torch.testing.assert_close(
                gradient.to(ranks.device()),
                expected[step][name],
                rtol=1e-4,
                atol=1e-6,
                msg=lambda text, step=step, name=name: f"{name}, step {step}: {text}",
            )
