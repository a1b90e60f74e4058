"""How the solver uses CPU threads, so that their number never changes a result.

The matrix library may sum in another order for another number of threads. So every torch operation of the solver runs
on one thread, and rows, which do not interact, are cut into chunks that depend on their number only; the chunks are
spread over as many threads as torch was set to use. On other devices there is one chunk.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import TypeVar

import torch

__all__ = ["compiled_search", "full_precision", "map_rows", "one_thread_per_operation"]

_T = TypeVar("_T")
_MAX_CHUNKS = 16
_MIN_CHUNK_ROWS = 64
_THREADS: ContextVar[int] = ContextVar("aqlm_solver_threads", default=1)


_COMPILERS = {"cpu": ("numba", "aqlm-tensor[cpu]"), "cuda": ("triton", "triton")}  # by type of device; and their names


@cache
def _installed(package: str, name: str) -> bool:
    """Whether a compiler is there; says once if it is not."""
    if importlib.util.find_spec(package) is not None:
        return True
    warnings.warn(
        f"without {package} codes are chosen by torch operations, about ten times as slowly: pip install '{name}'",
        stacklevel=2,
    )
    return False


def compiled_search(device: torch.device) -> ModuleType | None:
    """The module of compiled inner loops for a device; None where torch does all the work."""
    compiler = _COMPILERS.get(device.type)
    if compiler is None or not _installed(*compiler):
        return None
    return importlib.import_module(f"aqlm_tensor.kernels.{compiler[0]}_search")


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Run torch operations of this thread on one core and give `map_rows` the others; undone on leaving."""
    threads = torch.get_num_threads()
    token = _THREADS.set(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _THREADS.reset(token)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32 on GPUs, too, whatever the program has chosen; undone on leaving."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        threads, thread_name_prefix="aqlm-solver", initializer=torch.set_num_threads, initargs=(1,)
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child inherits the pool but not its threads


def map_rows(
    work: Callable[[slice], _T], rows: int, device: torch.device, *, smallest: int = _MIN_CHUNK_ROWS
) -> list[_T]:
    """Results of `work` on consecutive slices of range(rows), in order; in parallel on the CPU.

    Slices have at least `smallest` rows but for the last; how many there are depends on `rows` alone.
    """
    if device.type != "cpu":
        return [work(slice(0, rows))]
    size = max(smallest, -(-rows // (4 * _MAX_CHUNKS)) * 4)
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    threads = min(_THREADS.get(), len(parts))
    if threads <= 1:
        return [work(part) for part in parts]

    def without_grad(part: slice) -> _T:
        with torch.no_grad():  # the mode is per thread
            return work(part)

    return list(_pool(_THREADS.get()).map(without_grad, parts))
