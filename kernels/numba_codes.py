"""Codes repacked for the lookup kernels, in memory of its own that lives as long as the codes' storage.

The stored order [row][column] (a column is one codebook of one input group) would make the kernels, which walk down
the rows of a few columns, touch a new cache line for every row. The packed order is [row partition][block of 16
columns][block of 256 rows][column][row]: a vector load brings 64 rows' codes of one column, a 32-bit load four rows',
and a kernel that takes 16 columns at a time reads memory from front to back. The last block of either kind is as large
as what remains, so the copy occupies as many bytes as the codes; all packed copies kept for one storage together never
exceed the storage's own size, so weight plus cache is at most twice the codes.
"""

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLOCK_COLUMNS", "BLOCK_ROWS", "invalidate", "packed_codes"]

BLOCK_COLUMNS = 16
BLOCK_ROWS = 256

_Key = tuple[int, torch.Size, tuple[int, ...], int, int]


@dataclass(frozen=True)
class _Packed:
    version: int
    data: Tensor


_cache: weakref.WeakKeyDictionary[torch.UntypedStorage, OrderedDict[_Key, _Packed]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def packed_codes(codes: Tensor, nbits: int, partitions: int = 1) -> Tensor:
    """Indices of int8 codes [R, columns...] as uint8 [R * columns], in the packed order.

    The answer is cached and shared: it must not be written to. In-place changes of `codes` are noticed through its
    version counter; writes through `.data` or other memory (NumPy) are not and need `invalidate`.

    Args:
        codes: low `nbits` bits are the index, whatever their sign.
        nbits: at most 8.
        partitions: equal row partitions, R is a multiple.
    """
    storage = codes.untyped_storage()
    version = 0 if codes.is_inference() else codes._version
    key = (int(codes.storage_offset()), codes.shape, codes.stride(), nbits, partitions)
    with _lock:
        entries = _cache.get(storage)
        entry = entries.get(key) if entries is not None else None
        if entries is not None and entry is not None and entry.version == version:
            entries.move_to_end(key)
            return entry.data
    data = _pack(codes, nbits, partitions)
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


def _pack(codes: Tensor, nbits: int, partitions: int) -> Tensor:
    matrix = codes.detach().flatten(1).view(torch.uint8)
    packed = torch.empty(matrix.numel(), dtype=torch.uint8)
    for rows, out in zip(matrix.chunk(partitions), packed.chunk(partitions), strict=True):
        columns = rows.T.contiguous()  # torch transposes by tiles; what follows moves runs of BLOCK_ROWS bytes
        if nbits < 8:
            columns = columns & ((1 << nbits) - 1)
        whole = columns.shape[0] - columns.shape[0] % BLOCK_COLUMNS
        if whole:
            _pack_blocks(columns[:whole].view(-1, BLOCK_COLUMNS, columns.shape[1]), out[: whole * columns.shape[1]])
        if whole < columns.shape[0]:
            _pack_blocks(columns[whole:].unsqueeze(0), out[whole * columns.shape[1] :])
    return packed


def _pack_blocks(blocks: Tensor, out: Tensor) -> None:
    """Write blocks [block][column][row] as [block][block of rows][column][row]."""
    count, width, rows = blocks.shape
    whole = rows - rows % BLOCK_ROWS
    head, tail = out.view(count, rows * width).split([whole * width, (rows - whole) * width], dim=1)
    head.view(count, -1, width, BLOCK_ROWS).copy_(blocks[:, :, :whole].unflatten(2, (-1, BLOCK_ROWS)).transpose(1, 2))
    tail.unflatten(1, (width, -1)).copy_(blocks[:, :, whole:])
