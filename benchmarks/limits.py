"""What this machine can do at best: bytes from memory, loads from the L1 cache, multiply-adds; each per second.

Measured, since neither the clock nor the memory of a virtual machine can be looked up. Each number is of one thread;
memory is also measured with all.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from aqlm_tensor.kernels.numba_vectors import add, fma, load, store, zeros

__all__ = ["Limits", "measure"]

_LOADS = 16  # per iteration, each from another cache line and into a sum of its own


@dataclass(frozen=True)
class Limits:
    """Rates per second.

    Attributes:
        bytes_read: sequentially from memory, by number of threads.
        loads: of the L1 cache by one thread, each feeding an addition.
        multiply_adds: of float32 by one thread.
    """

    bytes_read: dict[int, float]
    loads: float
    multiply_adds: float


@njit(nogil=True)
def _load_often(buffer: int, rounds: int) -> None:
    zero = zeros(1)
    a = b = c = d = e = f = g = h = zero
    for i in range(rounds):
        line = buffer + (i & 31) * 128
        a = add(a, load(line, zero))
        b = add(b, load(line + 4, zero))
        c = add(c, load(line + 8, zero))
        d = add(d, load(line + 12, zero))
        e = add(e, load(line + 16, zero))
        f = add(f, load(line + 20, zero))
        g = add(g, load(line + 24, zero))
        h = add(h, load(line + 28, zero))
    store(buffer, add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h))))


@njit(nogil=True)
def _multiply_often(buffer: int, rounds: int) -> None:
    zero = zeros(16)
    x = load(buffer, zero)
    a = b = c = d = e = f = g = h = zero
    for _ in range(rounds):
        a, b, c, d = fma(x, x, a), fma(x, x, b), fma(x, x, c), fma(x, x, d)
        e, f, g, h = fma(x, x, e), fma(x, x, f), fma(x, x, g), fma(x, x, h)
    store(buffer, add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h))))


def _best(call: Callable[[], object], times: int = 7) -> float:
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(threads: tuple[int, ...]) -> Limits:
    """The rates of this machine now; torch's number of threads is left as it was."""
    buffer = np.ones(2048, np.float32)
    rounds = 2_000_000
    loads = 8 * rounds / _best(lambda: _load_often(buffer.ctypes.data, rounds))
    multiply_adds = 8 * 16 * rounds / _best(lambda: _multiply_often(buffer.ctypes.data, rounds))
    large = torch.ones(1 << 26)  # 256 MB
    before = torch.get_num_threads()
    bytes_read = {}
    for count in threads:
        torch.set_num_threads(count)
        bytes_read[count] = large.nbytes / _best(large.sum)
    torch.set_num_threads(before)
    return Limits(bytes_read, loads, multiply_adds)
