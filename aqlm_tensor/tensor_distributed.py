"""What FSDP2 (`torch.distributed.fsdp.fully_shard`), DTensor and DDP ask of an AQLMTensor.

Each rank keeps its rows' codes and scales and all of the codebooks; before use, codes and scales are gathered. So what
travels is 2 bits a weight, and only the codebooks are held by all. A stack of experts is sharded by expert, and its
codebooks travel along. Equal shards only: FSDP2 pads uneven ones in a way that it defines for dense weights alone.

The gathered codes lie in memory of FSDP2's own, which it frees after use and fills again. Kernels that repack the codes
do so again after each gathering; those for GPUs do not repack.

DDP sends rank 0's weights to all others when it starts, as bytes of dense tensors, and is told how to leave AQLM
weights out: they are frozen, and every rank loads them itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import return_and_correct_aliasing

from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.tensor_ops import REMEDY

__all__: list[str] = []

implements = AQLMTensor.implements


def _pre_all_gather(
    self: AQLMTensor, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What this rank contributes, and the parts that it has whole.

    Args:
        self: this rank's shard.
        mesh: over which the weight is sharded.
        outer_size: of the whole weight.
        outer_stride: of the whole weight.
        module: that holds the weight.
        mp_policy: whose `param_dtype` codebooks and scales are cast to.

    Raises:
        ValueError: unless the weight is sharded into equal parts along its first dimension.
    """
    shape, count = tuple(outer_size), mesh.size()
    if tuple(self.shape[1:]) != shape[1:]:
        raise ValueError(f"an AQLMTensor {shape} can only be sharded along dimension 0, by Shard(0)")
    if shape[0] % count:
        raise ValueError(_uneven(shape, f"{count} ranks"))
    dtype = mp_policy.param_dtype or self.dtype
    codes, codebooks, scales = self.codes, self.codebooks.to(dtype), self.scales.to(dtype)
    parts = dict(zip(self.tensor_data_names, (codes, codebooks, scales), strict=True))
    if count == 1:  # FSDP2 then looks at the first tensor only
        kept = {"codebooks": codebooks, "scales": scales}
    else:
        kept = {"codebooks": codebooks} if self.dim() == 2 else {}
    return tuple(part.contiguous() for name, part in parts.items() if name not in kept), kept


def _post_all_gather(
    self: AQLMTensor,
    all_gather_outputs: tuple[Tensor, ...],
    metadata: dict[str, Tensor],
    param_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> tuple[AQLMTensor, tuple[Tensor, ...]] | None:
    """The whole weight, on the gathered tensors; with `out`, which lies on them already, bring it up to date."""
    gathered = [name for name in self.tensor_data_names if name not in metadata]
    parts = dict(zip(gathered, all_gather_outputs, strict=True)) | metadata
    whole = AQLMTensor(parts["codes"], parts["codebooks"], parts["scales"])
    whole.invalidate_cache()  # FSDP2 wrote to them without a change of their version
    if out is None:
        return whole, ()
    target = getattr(out, "_local_tensor", out)
    assert isinstance(target, AQLMTensor)
    assert target.codes.untyped_storage().data_ptr() == whole.codes.untyped_storage().data_ptr()
    for name, part in metadata.items():
        setattr(target, name, part)
    return None


AQLMTensor.fsdp_pre_all_gather = _pre_all_gather  # pyright: ignore[reportAttributeAccessIssue] - the names FSDP2 prescribes
AQLMTensor.fsdp_post_all_gather = _post_all_gather  # pyright: ignore[reportAttributeAccessIssue]


def check_shard(w: AQLMTensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if w cannot be sharded into parts of a shape, which FSDP2 makes by `new_zeros`."""
    if shape[1:] != tuple(w.shape[1:]) or not 0 < shape[0] < w.shape[0]:
        return
    if w.dim() == 2 and w.partitions > 1:
        raise ValueError(
            f"an AQLMTensor of {w.partitions} partitions with codebooks of their own (fused layers) cannot be sharded: "
            "`aqlm_tensor.unfuse_(model)` first"
        )
    if w.shape[0] % shape[0]:
        raise ValueError(_uneven(tuple(w.shape), f"parts of {shape[0]}"))


def _uneven(shape: tuple[int, ...], parts: str) -> str:
    what = "out_features" if len(shape) == 2 else "experts"
    return (
        f"an AQLMTensor {shape} cannot be sharded into {parts}, which do not divide its {shape[0]} {what}: use another "
        "number of ranks, or keep it whole on each rank by `fully_shard(..., ignored_params={weight})`"
    )


@implements(torch.ops.aten.as_strided.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
    w, size, stride = args[:3]
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if tuple(size) != tuple(w.shape) or tuple(stride) != w.stride() or offset:
        raise ValueError(f"an AQLMTensor {tuple(w.shape)} has no strides to change to {tuple(size)}: {REMEDY}")
    return return_and_correct_aliasing(func, args, kwargs, w._apply_fn_to_data(lambda part: part))


@implements(torch.ops._c10d_functional.all_gather_into_tensor.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    w, count, group = args
    wait = torch.ops._c10d_functional.wait_tensor.default
    gathered = []
    for part in w.parts():
        sent = part.contiguous().view(torch.uint8)  # neither gloo nor NCCL knows int16
        gathered.append(wait(func(sent, count, group)).view(part.dtype).chunk(count))
    shards: list[Any] = [AQLMTensor(*parts, orientation=w.orientation) for parts in zip(*gathered, strict=True)]
    return torch.cat(shards)  # pyright: ignore[reportReturnType]


_WAITING = [
    getattr(torch.ops._c10d_functional, name).default
    for name in ("wait_tensor", "_wrap_tensor_autograd")
    if hasattr(torch.ops._c10d_functional, name)  # which of them torch calls depends on its version
]


@implements(_WAITING)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    return args[0]  # the gathering above has waited already


def refuse_broadcast() -> Any:
    """Raise the error for DDP, which broadcasts weights flattened and joined."""
    raise ValueError(
        "AQLM weights cannot be broadcast. Load the same checkpoint on every rank, and before "
        "DistributedDataParallel(model) call DistributedDataParallel._set_params_and_buffers_to_ignore_for_model("
        "model, [name for name, p in model.named_parameters() if isinstance(p, AQLMTensor)])"
    )


@implements(torch.ops.c10d.broadcast_.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
    return refuse_broadcast()
