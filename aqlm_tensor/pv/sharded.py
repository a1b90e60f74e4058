"""Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded, themselves or by accelerate, in `tune_pv`.

FSDP2 goes on to do what it does: it gathers a block's codes (2 bits a weight) and dense parameters before they are
used, frees them afterwards and reduces the gradients of what it has sharded. Codebooks and scales become parameters of
every rank. Codes are chosen where they are: rows depend on one another only in how many may change.

So a rank holds its shards, all codebooks and scales (20 bytes for each entry, Adam's moments and the best state among
them; for 2^16 entries 11 MB a layer), one block in use, and what `gradient_memory` allows.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from aqlm_tensor.blocks import find_blocks
from aqlm_tensor.pv.config import PVConfig
from aqlm_tensor.pv.layers import TunedWeight, local_aqlm, multiplying
from aqlm_tensor.pv.rows import Rows
from aqlm_tensor.pv.trained import is_trained
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["check_sharding", "gather_into", "is_sharded", "reshard", "sharded_copy", "sharded_weights"]


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of a model is sharded by FSDP2."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered of a model: after passes without gradients it keeps some."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a model that is sharded block by block over all processes; each has its shard on a device.

    Args:
        model: the same on each process, in CPU memory; left alone.
        device: this process's.

    Raises:
        ValueError: if the model has no blocks, or the processes do not divide the rows of an AQLM weight.
    """
    own: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    own |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    copied = copy.deepcopy(model, own)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in find_blocks(copied):
        fully_shard(block.to(device), mesh=mesh)
    fully_shard(copied.to(device), mesh=mesh)
    return copied


@torch.no_grad()
def gather_into(model: nn.Module, sharded: nn.Module) -> None:
    """Copy all values of a sharded copy into a model's own parameters, gathering one at a time."""
    reshard(sharded)
    theirs = dict(sharded.named_parameters())
    for name, parameter in model.named_parameters():
        value: Any = theirs[name]
        parameter.copy_((value.full_tensor() if isinstance(value, DTensor) else value).to(parameter.device))


def check_sharding(model: nn.Module, config: PVConfig, ranks: Ranks) -> None:
    """Raise unless a model is whole, or sharded in a way in which it can be tuned.

    Raises:
        ValueError: naming what stands in the way and the remedy.
    """
    sharded = is_sharded(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            _check_parameter(name, parameter, sharded, ranks)
        elif sharded and local_aqlm(parameter) is None and is_trained(parameter, config):
            raise ValueError(
                f"{name} is not sharded, though other parts of the model are: call fully_shard on the model itself, "
                'too, or pass PVConfig(dense="none")'
            )
    if not sharded:
        return
    if not config.gradient_checkpointing:
        raise ValueError(
            "the model is sharded: pass PVConfig(gradient_checkpointing=True), without which every process would keep "
            "the decoded weights of all blocks"
        )
    if config.code_fraction and config.gradient_memory is None:
        raise ValueError(
            "the model is sharded: pass gradient_memory in PVConfig, how many bytes of each process the gradients of "
            "whole dense weights may take (or code_fraction=0, which leaves the codes as they are)"
        )


def _check_parameter(name: str, parameter: DTensor, sharded: bool, ranks: Ranks) -> None:
    mesh, placements = parameter.device_mesh, parameter.placements
    shards = [placement for placement in placements if not isinstance(placement, Replicate)]
    if not sharded or len(shards) > 1 or any(type(placement) is not Shard or placement.dim for placement in shards):
        raise ValueError(
            f"{name} is distributed as {placements} (tensor parallel?): tune_pv takes whole models, or those that "
            "fully_shard (FSDP2) has sharded along the first dimension"
        )
    if mesh.size() != ranks.size:
        raise ValueError(
            f"the model is sharded over {mesh.size()} processes, and {ranks.size} tune it: pass the same ones as "
            "group (torch.distributed.group.WORLD for all)"
        )
    if parameter.device.type != mesh.device_type:
        raise ValueError(
            f"{name} is offloaded to the {parameter.device.type}: shard the model without an offload_policy"
        )


@contextlib.contextmanager
def sharded_weights(model: nn.Module) -> Iterator[tuple[list[TunedWeight], dict[int, torch.dtype]]]:
    """`tuned_weights` of a model that FSDP2 has sharded; dense parameters stay in their dtypes."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    dtypes = {id(p): p.dtype for p in model.parameters() if isinstance(p, DTensor) and local_aqlm(p) is None}
    weights: dict[int, tuple[TunedWeight, AQLMTensor]] = {}
    layers: list[tuple[nn.Linear, TunedWeight]] = []
    for fqn, layer in model.named_modules():
        weight: Any = layer._parameters.get("weight")
        local = None if weight is None else local_aqlm(weight)
        if not isinstance(layer, nn.Linear) or local is None:
            continue
        if id(weight) not in weights:
            weights[id(weight)] = _tuned(fqn, layer, weight, local), local
            tuned = weights[id(weight)][0]
            dtypes |= {id(tuned.codebooks): local.dtype, id(tuned.scales): local.dtype}
        layers.append((layer, weights[id(weight)][0]))
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        with multiplying(layers):
            yield [tuned for tuned, _ in weights.values()], dtypes
    finally:
        reshard(model)
        with torch.no_grad():
            for tuned, local in weights.values():
                local.codebooks.copy_(tuned.codebooks)
                local.scales.copy_(tuned.scales[tuned.rows.of(len(tuned.scales))])
        for parameter, requires_grad in before:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)


def _tuned(fqn: str, layer: nn.Linear, weight: Any, local: AQLMTensor) -> TunedWeight:
    rows = Rows(weight if isinstance(weight, DTensor) else None)
    codebooks = nn.Parameter(local.codebooks.float().clone())
    scales = nn.Parameter(rows.whole(local.scales.contiguous()).float().clone())
    return TunedWeight(fqn, local.codes, codebooks, scales, keep_order=False, sharded_in=layer, rows=rows)
