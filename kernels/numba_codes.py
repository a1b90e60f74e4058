"""Codes repacked for the lookup kernel, in memory of its own that lives as long as the codes' storage.

The stored order [row][column] (a column is one codebook of one input group) would make the kernel, which walks down
the rows of a few columns, touch a new cache line for every row. The packed order is [tile of 4 columns][row][4]: one
4-byte load brings a row's codes for a tile, and rows follow each other in memory. It occupies as many bytes as the
codes; all packed copies kept for one storage together never exceed the storage's own size, so weight plus cache is at
most twice the codes.
"""

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TILE", "invalidate", "packed_codes"]

TILE = 4  # columns per tile: the bytes of one 32-bit load

_Key = tuple[int, torch.Size, tuple[int, ...], int]


@dataclass(frozen=True)
class _Packed:
    version: int
    data: Tensor


_cache: weakref.WeakKeyDictionary[torch.UntypedStorage, OrderedDict[_Key, _Packed]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def packed_codes(codes: Tensor, nbits: int) -> Tensor:
    """Indices of int8 codes [R, columns...] as uint8 [R * columns]: tiles of 4 columns, then the remaining columns.

    The answer is cached and shared: it must not be written to. In-place changes of `codes` are noticed through its
    version counter; writes through `.data` or other memory (NumPy) are not and need `invalidate`.
    """
    storage = codes.untyped_storage()
    version = 0 if codes.is_inference() else codes._version
    key = (int(codes.storage_offset()), codes.shape, codes.stride(), nbits)
    with _lock:
        entries = _cache.get(storage)
        entry = entries.get(key) if entries is not None else None
        if entries is not None and entry is not None and entry.version == version:
            entries.move_to_end(key)
            return entry.data
    data = _pack(codes, nbits)
    with _lock:
        entries = _cache.setdefault(storage, OrderedDict())
        entries[key] = _Packed(version, data)
        entries.move_to_end(key)
        while len(entries) > 1 and sum(kept.data.nbytes for kept in entries.values()) > storage.nbytes():
            entries.popitem(last=False)
    return data


def invalidate(codes: Tensor) -> None:
    """Forget everything derived from the storage that these codes lie in."""
    with _lock:
        _cache.pop(codes.untyped_storage(), None)


def _pack(codes: Tensor, nbits: int) -> Tensor:
    rows = codes.detach().flatten(1).view(torch.uint8)
    if nbits < 8:
        rows = rows & ((1 << nbits) - 1)
    whole = rows.shape[1] - rows.shape[1] % TILE
    packed = torch.empty(rows.numel(), dtype=torch.uint8)
    head, tail = packed.split([rows.shape[0] * whole, rows.shape[0] * (rows.shape[1] - whole)])
    if whole:
        words = rows[:, :whole].clone(memory_format=torch.contiguous_format).view(torch.int32)  # aligned, unlike `rows`
        head.view(torch.int32).view(-1, rows.shape[0]).copy_(words.T)
    tail.view(rows.shape[0], -1).copy_(rows[:, whole:])
    return packed
