"""Views and concatenations of an AQLMTensor: what codes can express shares memory, the rest raises.

Rows, whole input groups, experts and the transpose are views. Stacking rows of weights with different codebooks gives
partitioned codebooks, so concatenation along out_features always works; along in_features it needs equal ones.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from aqlm_tensor import tensor_distributed
from aqlm_tensor.kernels.ops import weight_shape
from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.tensor_ops import REMEDY, bind, transposed

__all__ = ["same"]

aten = torch.ops.aten
implements = AQLMTensor.implements
implements_torch_function = AQLMTensor.implements_torch_function


def _axis(w: AQLMTensor, dim: int) -> str:
    """What a dimension of the tensor is: "expert", "out" or "in"."""
    if w.orientation == "flat":
        raise ValueError(f"a flat AQLMTensor has no rows or groups to take apart or join: view it back, or {REMEDY}")
    if not -w.dim() <= dim < w.dim():
        raise IndexError(f"dimension {dim} is out of range for an AQLMTensor of {w.dim()} dimensions")
    axes = {"matrix": ("expert", "out", "in"), "transposed": ("expert", "in", "out"), "row": ("in",)}[w.orientation]
    return axes[-w.dim() :][dim]


def _slice(w: AQLMTensor, dim: int, start: int, stop: int, step: int = 1) -> AQLMTensor:
    """w[start:stop:step] along a dimension, sharing memory with w."""
    axis = _axis(w, dim)
    scheme = w.scheme
    if axis == "expert":
        return w._apply_fn_to_data(lambda part: part[start:stop:step])
    group = scheme.out_group_size if axis == "out" else scheme.in_group_size
    if start % group or stop % group or step != 1:
        raise ValueError(
            f"cannot slice {start}:{stop}:{step} along {axis}_features of an AQLMTensor {scheme}: start and stop must "
            f"be multiples of {group} and step 1; {REMEDY}"
        )
    first, length = start // group, max(0, stop - start) // group
    if axis == "in":
        return AQLMTensor(w.codes.narrow(-2, first, length), w.codebooks, w.scales, w.orientation)
    if length == w.codes.shape[-3]:
        return w._apply_fn_to_data(lambda part: part)
    codes, scales = w.codes.narrow(-3, first, length), w.scales.narrow(-4, first, length)
    return AQLMTensor(codes, _join(_books(w, first, first + length), scheme_dim=w.codes.dim()), scales, w.orientation)


def _books(w: AQLMTensor, start: int, stop: int) -> list[tuple[Tensor, int]]:
    """(codebooks without partitions, number of out groups) of each stretch of out groups start..stop."""
    if w.partitions == 1:
        books = w.codebooks if w.codebooks.dim() == w.codes.dim() + 1 else w.codebooks.select(-5, 0)
        return [(books, stop - start)]
    size = w.codes.shape[-3] // w.partitions
    if stop == start or size == 0:
        return [(w.codebooks.select(-5, 0), 0)]
    return [
        (w.codebooks.select(-5, p), min(stop, (p + 1) * size) - max(start, p * size))
        for p in range(start // size, (stop - 1) // size + 1)
    ]


def _join(stretches: Sequence[tuple[Tensor, int]], scheme_dim: int) -> Tensor:
    """Codebooks, partitioned if need be, of stretches of out groups with codebooks of their own, in order.

    Partitions are equal, so uneven stretches are cut to their greatest common divisor and repeat their codebooks.
    """
    merged: list[tuple[Tensor, int]] = []
    for books, groups in stretches:
        if merged and (groups == 0 or same(merged[-1][0], books)):
            merged[-1] = (merged[-1][0], merged[-1][1] + groups)
        elif merged and merged[-1][1] == 0:
            merged[-1] = (books, groups)
        else:
            merged.append((books, groups))
    if len(merged) == 1:
        return merged[0][0]
    size = math.gcd(*(groups for _, groups in merged))
    return torch.stack([books for books, groups in merged for _ in range(groups // size)], dim=scheme_dim - 3)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are known to hold the same values; unknown (meta, tracing) counts as different."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or type(a) is not Tensor or type(b) is not Tensor:
        return False
    return torch.equal(a, b)


def _bounds(size: int, start: int | None, stop: int | None) -> tuple[int, int]:
    """Python's meaning of a slice's ends, in 0..size and ordered."""
    first, last, _ = slice(start, stop).indices(size)
    return first, max(first, last)


@implements(aten.slice.Tensor)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
    w, dim, start, stop, step = bind(("self", "dim", "start", "end", "step"), args, kwargs)
    dim = dim or 0
    first, last = _bounds(w.shape[dim], start, stop)
    return return_and_correct_aliasing(func, args, kwargs, _slice(w, dim, first, last, 1 if step is None else step))


@implements(aten.select.int)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
    w, dim, index = args
    if not -w.shape[dim] <= index < w.shape[dim]:
        raise IndexError(f"index {index} is out of range for dimension {dim} of size {w.shape[dim]}")
    index %= w.shape[dim]
    axis = _axis(w, dim)
    if axis == "expert":
        out = w._apply_fn_to_data(lambda part: part.select(0, index))
    elif axis == "out" and w.dim() == 2 and w.scheme.out_group_size == 1:
        out = AQLMTensor(*_slice(w, dim, index, index + 1).parts(), "row")
    else:
        raise ValueError(f"cannot select one index along {axis}_features of an AQLMTensor {w.scheme}: {REMEDY}")
    return return_and_correct_aliasing(func, args, kwargs, out)


def _rows(w: AQLMTensor, index: Tensor) -> AQLMTensor:
    """A copy of some rows, or experts of a stack, in any order."""
    axis = _axis(w, 0)
    if axis == "expert":
        return w._apply_fn_to_data(lambda part: part[index])
    if axis != "out" or w.partitions > 1 or w.scheme.out_group_size > 1:
        raise ValueError(
            f"rows of {w!r} cannot be indexed: only those of a matrix with one set of codebooks and out groups of 1 "
            f"can; {REMEDY}"
        )
    return AQLMTensor(w.codes[index], w.codebooks, w.scales[index])


@implements(aten.index_select.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    w, dim, index = args
    if dim % w.dim():
        raise ValueError(f"index_select of an AQLMTensor takes dimension 0, not {dim}: {REMEDY}")
    return _rows(w, index)


@implements(aten.index.Tensor)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    w, indices = args
    index, *others = indices
    if index is None or index.dim() != 1 or any(other is not None for other in others):
        raise ValueError(f"an AQLMTensor can only be indexed by one list, mask or 1-D tensor for its rows: {REMEDY}")
    return _rows(w, index)


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> list[AQLMTensor]:
    w, sizes, dim = bind(("self", "split_size", "dim"), args, kwargs)
    dim = dim or 0
    total = w.shape[dim]
    if isinstance(sizes, int):
        if sizes < 0 or (sizes == 0 and total):
            raise ValueError(f"split_size must be positive, got {sizes}")
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)] or [0]
    elif sum(sizes) != total:
        raise ValueError(f"split sizes {list(sizes)} do not add up to {total}, the size of dimension {dim}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [aten.slice.Tensor(w, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


@implements(aten.unbind.int)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> list[AQLMTensor]:
    w, dim = bind(("self", "dim"), args, kwargs)
    return [aten.select.int(w, dim or 0, index) for index in range(w.shape[dim or 0])]


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
    w = args[0]
    axes = list(range(w.dim()))
    if func is aten.permute.default:
        axes = [dim % w.dim() for dim in args[1]]
    elif w.dim() > 1:
        a, b = (0, 1) if func is aten.t.default else (dim % w.dim() for dim in args[1:])
        axes[a], axes[b] = axes[b], axes[a]
    identity = list(range(w.dim()))
    if axes == identity:
        out = w._apply_fn_to_data(lambda part: part)
    elif axes == [*identity[:-2], identity[-1], identity[-2]]:
        out = transposed(w)
    else:
        raise ValueError(f"an AQLMTensor can only swap its last two dimensions, not permute to {axes}: {REMEDY}")
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements([aten.view.default, aten._unsafe_view.default])
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
    w, shape = args[0], list(args[1])
    if shape.count(-1) == 1:
        known = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = w.numel() // known if known else 0
    whole = (*w.codes.shape[:-3], *weight_shape(w.codes, w.codebooks))
    if tuple(shape) == tuple(w.shape):
        out = w._apply_fn_to_data(lambda part: part)
    elif w.orientation == "matrix" and shape == [w.numel()]:
        out = AQLMTensor(*w.parts(), orientation="flat")
    elif w.orientation in ("row", "flat") and tuple(shape) == whole:
        out = AQLMTensor(*w.parts())
    else:
        raise ValueError(f"cannot view an AQLMTensor of shape {tuple(w.shape)} as {tuple(args[1])}: {REMEDY}")
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements(aten.unsqueeze.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
    w, dim = args
    if dim not in (0, -w.dim() - 1) or w.dim() == 3 or w.orientation == "flat":
        raise ValueError(f"cannot unsqueeze dimension {dim} of an AQLMTensor of shape {tuple(w.shape)}: {REMEDY}")
    out = AQLMTensor(*w.parts()) if w.orientation == "row" else w._apply_fn_to_data(lambda part: part.unsqueeze(0))
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements(aten.squeeze.dim)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
    w, dim = args
    if w.dim() < 3 or dim % w.dim() != 0:
        raise ValueError(f"can only squeeze the first dimension of a stack of AQLMTensors, not {dim}: {REMEDY}")
    out = w._apply_fn_to_data(lambda part: part.squeeze(0))
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements(aten.stack.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    tensors, dim = bind(("tensors", "dim"), args, kwargs)
    return aten.cat.default([aten.unsqueeze.default(w, dim or 0) for w in tensors], dim or 0)


@implements(aten.cat.default)
def _(func: Callable, types: Any, args: Any, kwargs: Any) -> AQLMTensor:
    tensors, dim = bind(("tensors", "dim"), args, kwargs)
    return _cat(tensors, dim or 0)


def _cat(tensors: Sequence[Tensor], dim: int) -> AQLMTensor:
    """Concatenate AQLMTensors of one scheme, dtype and orientation."""
    first = tensors[0]
    if any(isinstance(w, AQLMTensor) and w.orientation == "flat" for w in tensors):
        tensor_distributed.refuse_broadcast()
    if not all(isinstance(w, AQLMTensor) for w in tensors):
        raise TypeError(f"cannot concatenate AQLMTensors with dense tensors: {REMEDY}")
    weights: list[AQLMTensor] = list(tensors)  # pyright: ignore[reportAssignmentType] - checked above
    kinds = {(str(w.scheme), w.dtype, w.device, w.orientation, w.dim()) for w in weights}
    if len(kinds) > 1:
        raise ValueError(f"cannot concatenate AQLMTensors of different schemes, dtypes, devices or views: {kinds}")
    axis = _axis(weights[0], dim)
    fixed = [i for i in range(first.dim()) if i != dim % first.dim()]
    if any([w.shape[i] for i in fixed] != [first.shape[i] for i in fixed] for w in weights):
        raise ValueError(f"cannot concatenate shapes {[tuple(w.shape) for w in weights]} along dimension {dim}")
    codes, codebooks, scales = zip(*(w.parts() for w in weights), strict=True)
    if axis == "expert":
        return AQLMTensor(torch.cat(codes), torch.cat(codebooks), torch.cat(scales), weights[0].orientation)
    if axis == "in":
        if not all(same(codebooks[0], c) and same(scales[0], s) for c, s in zip(codebooks, scales, strict=True)):
            raise ValueError(
                f"AQLMTensors concatenate along in_features only with identical codebooks and scales: {REMEDY}"
            )
        return AQLMTensor(torch.cat(codes, -2), codebooks[0], scales[0], weights[0].orientation)
    stretches = [stretch for w in weights for stretch in _books(w, 0, w.codes.shape[-3])]
    books = _join(stretches, scheme_dim=codes[0].dim())
    return AQLMTensor(torch.cat(codes, -3), books, torch.cat(scales, -4), weights[0].orientation)
