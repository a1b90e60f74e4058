"""Where the solver's inner loops run: numba over row chunks when it is importable and the tensor is on the CPU.

Rows are split over as many threads as torch uses; a row's result does not depend on the split.
"""

import importlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import torch

__all__ = ["numba_search", "row_map"]


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def numba_search(device: torch.device) -> ModuleType | None:
    """The module of compiled inner loops, or None where torch does the work: other devices, or numba missing."""
    if device.type != "cpu" or not _has_numba():
        return None
    return importlib.import_module("aqlm_tensor.kernels.numba_search")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="aqlm-search")


def row_map(work: Callable[[slice], None], rows: int, *, granule: int = 4) -> None:
    """Call `work` on slices that cover range(rows), one per torch thread, cut at multiples of `granule`."""
    threads = torch.get_num_threads()
    blocks = -(-rows // granule)
    threads = min(threads, max(1, blocks // 4))
    if threads == 1:
        work(slice(0, rows))
        return
    cuts = [min(rows, blocks * t // threads * granule) for t in range(threads)] + [rows]
    list(_pool(threads).map(work, [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]))
