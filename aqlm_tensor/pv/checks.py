"""What `tune_pv` refuses, before it changes anything."""

from collections.abc import Sequence

from torch import Tensor, nn

from aqlm_tensor.blocks import find_blocks
from aqlm_tensor.pv.config import PVConfig
from aqlm_tensor.pv.layers import check_layers
from aqlm_tensor.pv.loss import Teacher, check_teacher
from aqlm_tensor.pv.sharded import check_sharding, reshard
from aqlm_tensor.ranks import Ranks

__all__ = ["check_arguments"]


def check_arguments(
    model: nn.Module, teacher: Teacher | None, batches: Sequence[Tensor], config: PVConfig, ranks: Ranks
) -> range:
    """The batches that are held out, if tuning can begin.

    Raises:
        ValueError, TypeError: as `tune_pv` says.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, PVConfig):
        raise TypeError(f"config must be a PVConfig, got {type(config).__name__}")
    if isinstance(batches, Tensor) or not isinstance(batches, Sequence):
        raise TypeError(f"batches must be a sequence of token ids [B, seqlen], got {type(batches).__name__}")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point():
            found = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"batch {number} must be token ids [B, seqlen], got {found}")
        if len(batch) == 0 or batch.shape[1] < 2:
            raise ValueError(
                f"batch {number} must hold windows of at least 2 tokens, got shape {tuple(batch.shape)} [B, seqlen]"
            )
    reshard(model)
    check_layers(model)
    check_sharding(model, config, ranks)
    check_teacher(teacher, model, batches)
    if config.gradient_checkpointing:
        find_blocks(model)  # raises if there are none
    _check_ranks(ranks, model, config)
    return config.held_out(len(batches))


def _check_ranks(ranks: Ranks, model: nn.Module, config: PVConfig) -> None:
    if config.batches_per_step % ranks.size:
        raise ValueError(
            f"batches_per_step must be a multiple of the number of processes, {ranks.size}, which share a step's "
            f"batches; got {config.batches_per_step}"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if ranks.size > 1 and len(devices) > 1:
        raise ValueError(f"each process must have the model on one device, got {', '.join(sorted(devices))}")
