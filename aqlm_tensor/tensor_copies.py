"""Copies, casts, constructors and comparisons of an AQLMTensor, and its multiples by a number.

Copies keep the structure: codes stay as they are, codebooks and scales take the dtype. A tensor of a new shape is an
AQLMTensor where the scheme can have that shape.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aqlm_tensor import tensor_distributed
from aqlm_tensor.kernels import registry
from aqlm_tensor.tensor import FLOATS, AQLMTensor
from aqlm_tensor.tensor_ops import REMEDY, bind
from aqlm_tensor.tensor_views import same

__all__: list[str] = []

aten = torch.ops.aten
implements = AQLMTensor.implements
implements_torch_function = AQLMTensor.implements_torch_function


@implements([aten._to_copy.default, aten.to.dtype_layout])
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    w = args[0]
    kwargs = {name: value for name, value in kwargs.items() if name not in ("layout", "memory_format", "copy")}
    target = w._get_to_kwargs(*args[1:], **kwargs)
    device, dtype, non_blocking = target["device"], target["dtype"], target["non_blocking"]
    if dtype not in FLOATS:
        raise TypeError(f"an AQLMTensor can be cast to float32, float16 or bfloat16, not {dtype}: {REMEDY}")
    return AQLMTensor(
        w.codes.to(device, non_blocking=non_blocking, copy=True),
        w.codebooks.to(device, dtype, non_blocking=non_blocking, copy=True),
        w.scales.to(device, dtype, non_blocking=non_blocking, copy=True),
        w.orientation,
    )


def _refuse_shared(w: AQLMTensor, source: AQLMTensor) -> None:
    """Raise if a copy into the view `w` would change codebooks or scales that weights outside of it use too."""
    base = w._base
    if not isinstance(base, AQLMTensor):
        return
    for name in ("codebooks", "scales"):
        part, whole, new = getattr(w, name), getattr(base, name), getattr(source, name)
        aliases = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        exclusive = w.codes.numel() * whole.numel() == base.codes.numel() * part.numel()
        if not (aliases and exclusive) and not same(part, new):
            raise ValueError(
                f"cannot copy into a part of an AQLMTensor whose {name} the rest shares, since the source has others: "
                "build the whole weight with `torch.cat` and copy that"
            )


@implements(aten.copy_.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    w, source, non_blocking = bind(("self", "src", "non_blocking"), args, kwargs)
    if not isinstance(w, AQLMTensor) or not isinstance(source, AQLMTensor):
        raise TypeError(
            "copy_ between an AQLMTensor and a dense tensor is not defined: quantize the source with "
            "`AQLMTensor.from_hp`, or `.dequantize()` to copy out of one"
        )
    shapes = [[tuple(part.shape) for part in tensor.parts()] for tensor in (w, source)]
    if shapes[0] != shapes[1] or w.orientation != source.orientation:
        raise ValueError(f"copy_ needs AQLMTensors of the same scheme and shape, got {source!r} into {w!r}")
    _refuse_shared(w, source)
    for target, part in zip(w.parts(), source.parts(), strict=True):
        target.copy_(part, non_blocking=bool(non_blocking))
        _written(target)
    return w


def _written(part: Tensor) -> None:
    """Tell kernels and fused layers that a part was changed in place.

    Autograd counts such changes of ordinary tensors. Handlers of aten ops run below it, and what they make views of has
    a count of its own.
    """
    registry.invalidate(part)
    if not part.is_inference():
        torch.autograd.graph.increment_version(part)


@implements(aten.equal.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> bool:
    a, b = args
    if a.shape != b.shape:
        return False
    alike = isinstance(a, AQLMTensor) and isinstance(b, AQLMTensor) and a.orientation == b.orientation
    if alike and all(same(*parts) for parts in zip(a.parts(), b.parts(), strict=True)):
        return True
    if a.dim() == 3:
        return all(torch.equal(*pair) for pair in zip(a.unbind(), b.unbind(), strict=True))
    # other codes may stand for the same values
    return torch.equal(*(w.dequantize() if isinstance(w, AQLMTensor) else w for w in (a, b)))


@implements([aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar])
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    w, number = args[::-1] if isinstance(args[1], AQLMTensor) else args
    _check_number(func, args, number)
    return AQLMTensor(w.codes, w.codebooks, func(w.scales, number), w.orientation)


@implements([aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar])
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    w, number = args
    _check_number(func, args, number)
    func(w.scales, number)
    _written(w.scales)
    return w


def _check_number(func: Callable, args: Any, number: Any) -> None:
    """Raise unless a weight is multiplied or divided by a number, which its scales are instead."""
    divides = "div" in str(func) and isinstance(args[1], AQLMTensor)
    if divides or isinstance(number, AQLMTensor) or (isinstance(number, Tensor) and number.dim()):
        raise NotImplementedError(f"{func} of an AQLMTensor is defined with a single number only: {REMEDY}")


def _new(w: AQLMTensor, shape: Sequence[int], kwargs: dict, make: Callable[..., Tensor]) -> Tensor:
    """A tensor of `shape` from `make`: an AQLMTensor where w's scheme can have that shape, else a dense one."""
    options = {name: value for name, value in kwargs.items() if name in ("dtype", "device", "pin_memory") and value}
    dtype, scheme = options.pop("dtype", w.dtype), w.scheme
    if w.orientation != "matrix" or len(shape) != w.dim() or scheme.why_not(*shape[-2:]) or dtype not in FLOATS:
        return make(w.scales, shape, dtype=dtype, **options)
    lead = tuple(shape[:-2])
    own = w.codebooks.shape[len(lead) :] if tuple(shape[-2:]) == w.shape[-2:] else scheme.codebooks_shape
    codes = make(w.codes, (*lead, *scheme.codes_shape(*shape[-2:])), **options)
    codebooks = make(w.codebooks, (*lead, *own), dtype=dtype, **options)
    return AQLMTensor(codes, codebooks, make(w.scales, (*codes.shape[:-2], 1, 1, 1), dtype=dtype, **options))


@implements([aten.new_zeros.default, aten.zeros_like.default])
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Tensor:
    shape = tuple(args[1] if len(args) > 1 else args[0].shape)
    tensor_distributed.check_shard(args[0], shape)
    return _new(args[0], shape, kwargs, Tensor.new_zeros)


@implements([aten.new_empty.default, aten.empty_like.default])
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Tensor:
    if len(args) == 1 and isinstance(args[0], AQLMTensor):
        w = args[0]  # the same structure, partitions and orientation included
        options = {name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None}
        dtype = options.pop("dtype", w.dtype)
        return AQLMTensor(
            torch.empty_like(w.codes, **options),
            torch.empty_like(w.codebooks, dtype=dtype, **options),
            torch.empty_like(w.scales, dtype=dtype, **options),
            w.orientation,
        )
    return _new(args[0], args[1], kwargs, Tensor.new_empty)


@implements(aten._pin_memory.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    w = args[0]
    return w._apply_fn_to_data(Tensor.pin_memory)


@implements(aten.is_pinned.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> bool:
    return all(part.is_pinned() for part in args[0].parts())


@implements_torch_function(torch.Tensor.numpy)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> None:
    raise TypeError(
        "an AQLMTensor is no NumPy array: `.dequantize().numpy()` is the dense weight. accelerate's disk offload would "
        'need one; offload AQLM weights to "cpu"'
    )


@implements_torch_function(vars(torch._C.TensorBase)["requires_grad"].__set__)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> None:
    args[0].requires_grad_(args[1])


@implements_torch_function(vars(torch._C.TensorBase)["data"].__set__)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> None:
    w, new = args
    if not isinstance(new, AQLMTensor):
        raise TypeError("the data of an AQLMTensor can only be replaced by another one: quantize with `from_hp` first")
    with torch._C.DisableTorchFunctionSubclass():
        func(w, new)
    w.codes, w.codebooks, w.scales, w.orientation = *new.parts(), new.orientation
