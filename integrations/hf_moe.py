"""Mixtures of experts in Transformers, with expert weights as one stack of AQLM weights per layer.

Transformers has three ways to run experts. Its eager loop takes one expert after another, which an AQLMTensor does by
itself. `grouped_mm` sorts the tokens by expert and is one grouped product (`aqlm_tensor.tensor_experts`).
`batched_mm` copies an expert's weight for each token, which gains nothing where weights are looked up: with AQLM
weights it runs as `grouped_mm`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.tensor_experts import grouped_mm

__all__ = ["register"]


def register() -> None:
    """Teach Transformers' expert implementations to take AQLM weights; doing it again changes nothing."""
    batched = moe.ALL_EXPERTS_FUNCTIONS["batched_mm"]
    if not hasattr(batched, "__wrapped__"):
        moe.ALL_EXPERTS_FUNCTIONS.register("batched_mm", _or_grouped(batched))


def _or_grouped(batched: Callable) -> Callable:
    @wraps(batched)
    def batched_mm_experts_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        weights = (getattr(self, name, None) for name in ("gate_up_proj", "up_proj", "down_proj"))
        quantized = any(isinstance(weight, AQLMTensor) for weight in weights)
        return (moe.grouped_mm_experts_forward if quantized else batched)(self, *args, **kwargs)

    return batched_mm_experts_forward


@AQLMTensor.implements_torch_function(torch.ops.transformers.grouped_mm_fallback)
def _(func: Callable, types: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight = args
    return grouped_mm(x, weight, kwargs["offs"])
