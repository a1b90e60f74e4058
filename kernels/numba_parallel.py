"""Run a compiled function on several threads: safely from any number of Python threads, and after a fork.

Numba's own `parallel=True` is not used: of its threading layers `workqueue` crashes when two Python threads call at
once, `omp` aborts the process when used after a fork, `tbb` needs another package, and the choice among them is global
to the process. Here a kernel is one C function that takes items of work from an atomic counter until none are left, and
the OpenMP library that torch itself runs on calls it from torch's own worker threads, which are warm after other torch
ops. Where that library cannot be had (macOS, Windows) or must not be used (in a forked child, where libgomp would
wait for threads that do not exist), Python threads take its place: some 100 us slower to start, otherwise the same.

Which thread runs an item never affects its result, so results do not depend on the number of threads.
"""

import ctypes
import functools
import os
import threading
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from numba import cfunc, types
from numba.core.ccallback import CFunc
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ITEMS",
    "NEXT_ITEM",
    "NEXT_SLOT",
    "OPTIONS",
    "Kernel",
    "as_float32",
    "compile_kernel",
    "make_frame",
    "padded_float32",
    "run",
    "source_digest",
    "threads_for",
]

_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_SIGNATURE = types.void(types.CPointer(types.int64))  # of every kernel: it is given its frame
OPTIONS = {"error_model": "numpy", "nogil": True}

# The head of every kernel's frame, an int64 array of sizes and addresses.
NEXT_ITEM = 0  # counter: the next item to be taken
NEXT_SLOT = 1  # counter: the next thread's share of scratch memory
ITEMS = 2  # number of items

_WORK_PER_THREAD = 50_000  # elementary steps (about a nanosecond each) below which waking a thread does not pay
_forked = threading.Event()


def _after_fork() -> None:
    _forked.set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads_for(items: int, work: int, available: int | None = None) -> int:
    """How many of the available threads (None: `torch.get_num_threads()`) so many items and elementary steps take."""
    return max(1, min(available or torch.get_num_threads(), items, work // _WORK_PER_THREAD))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        compiled: what keeps the machine code alive.
        address: where the code is.
        call: the same as a ctypes function of the frame's address.
    """

    compiled: CFunc
    address: int
    call: Callable[[int], None]


def compile_kernel(function: Callable[..., None]) -> Kernel:
    """The C function for a Python function of a frame, from Numba's cache on disk if it is there.

    The cache lies in `__pycache__` beside the source, or in the user's cache directory where that cannot be written
    (NUMBA_CACHE_DIR overrides both); where nothing can be written, every process compiles anew.
    """
    try:
        compiled = cfunc(_SIGNATURE, cache=True, **OPTIONS)(function)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        compiled = cfunc(_SIGNATURE, **OPTIONS)(function)
    assert compiled.address is not None
    return Kernel(compiled, compiled.address, _C_FUNCTION(compiled.address))


def make_frame(items: int, *fields: int) -> "array[int]":
    """A frame for so many items: its head and then a kernel's own fields."""
    return array("q", (0, 0, items, *fields))


def as_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous float32, else a copy that is."""
    return tensor if tensor.dtype is torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def padded_float32(x: Tensor, rows: int, columns: int) -> Tensor:
    """x in float32, contiguous, zero-padded to multiples of `rows` and `columns`."""
    right, below = -x.shape[1] % columns, -x.shape[0] % rows
    return F.pad(x.float(), (0, right, 0, below)).contiguous() if right or below else as_float32(x)


def run(kernel: Kernel, frame: "array[int]", threads: int) -> None:
    """Call a kernel with its frame, on the calling thread and `threads` - 1 others.

    Returns when all of them have returned. The global interpreter lock is released meanwhile.
    """
    address = frame.buffer_info()[0]
    if threads == 1:
        kernel.call(address)
    elif (parallel := _openmp_parallel()) is not None and not _forked.is_set():
        parallel(kernel.address, address, threads, 0)
    else:
        _run_on_python_threads(functools.partial(kernel.call, address), threads)


def _run_on_python_threads(call: Callable[[], None], threads: int) -> None:
    others = [threading.Thread(target=call) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    call()
    for thread in others:
        thread.join()


@functools.cache
def _openmp_parallel() -> "ctypes._NamedFuncPointer | None":
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch is linked to, or None.

    A handle to libtorch_cpu also finds the symbols of the libraries it depends on. libgomp, Intel's and LLVM's OpenMP
    all export this entry point, which is where GCC compiles `#pragma omp parallel` to.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(path)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


@functools.cache
def source_digest() -> int:
    """A number that changes with the source of the compiled kernels.

    Numba's disk cache looks only at the file that a function stands in, not at those it calls into. Kernels therefore
    carry this number as a constant of their own, which is part of the cache's key.
    """
    sources = sorted(Path(__file__).parent.glob("numba_*.py"))
    return zlib.crc32(b"".join(source.read_bytes() for source in sources))
