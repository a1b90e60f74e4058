"""accelerate, and with it Trainer: what it assumes of weights that AQLM weights are not.

It tells weights apart by their address, has DDP send all weights of rank 0 to the others, and fills FSDP2's shards from
rank 0 alone. AQLM weights have no address of their own and are frozen, and every rank loads them itself. So they are
left out there; dense weights, adapters and new heads go the usual way.
"""

from collections.abc import Callable
from typing import Any

import accelerate.accelerator
import accelerate.big_modeling
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aqlm_tensor.integrations.wrapping import wrap_once
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["register"]


def register() -> None:
    """Teach accelerate to prepare models with AQLM weights; doing it again changes nothing."""
    wrap_once(accelerate.big_modeling, "find_tied_parameters", _only_dense)
    wrap_once(accelerate.Accelerator, "prepare_model", _left_out_of_ddp)
    wrap_once(accelerate.accelerator, "fsdp2_prepare_model", _loaded_by_every_rank)


def _only_dense(find: Callable) -> Callable:
    """The search for tied weights by address, which is 0 for all that wrap other tensors."""

    def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        groups = find(model, **kwargs)
        return [group for group in groups if not isinstance(parameters[group[0]], AQLMTensor)]

    return find_tied_parameters


def _left_out_of_ddp(prepare: Callable) -> Callable:
    """Accelerator.prepare_model, which may wrap the model in DDP."""

    def prepare_model(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        names = _quantized(model)
        if names:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return prepare(self, model, *args, **kwargs)

    return prepare_model


def _loaded_by_every_rank(prepare: Callable) -> Callable:
    """fsdp2_prepare_model, which with `cpu_ram_efficient_loading` broadcasts every weight as a dense one."""

    def fsdp2_prepare_model(accelerator: Any, model: nn.Module) -> nn.Module:
        plugin = accelerator.state.fsdp_plugin
        if not plugin.cpu_ram_efficient_loading or not _quantized(model):
            return prepare(accelerator, model)
        _broadcast_dense(model, accelerator.device)
        plugin.cpu_ram_efficient_loading = False
        try:
            return prepare(accelerator, model)
        finally:
            plugin.cpu_ram_efficient_loading = True

    return fsdp2_prepare_model


@torch.no_grad()
def _broadcast_dense(model: nn.Module, device: torch.device) -> None:
    """Give all ranks rank 0's dense weights, which the others may have left as they were allocated."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, AQLMTensor):
            value = tensor.to(device)
            dist.broadcast(value, src=0)
            tensor.copy_(value)


def _quantized(model: nn.Module) -> list[str]:
    """Names of the AQLM weights of a model."""
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, AQLMTensor)]
