"""The official inference library's CPU kernel (aqlm 1.1.7, Numba): float32, 8-bit codes, out_group 1.

It expects codes as [I/G, O, K] and multiplies one row of x at a time. With more than one thread its threads add to the
same outputs without synchronisation, so that its result is wrong; it is timed all the same, and its error reported.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, cast

import numba
import torch
from torch import Tensor

__all__ = ["official", "official_runs"]

Parts = tuple[Tensor, Tensor, Tensor]


def official_runs(parts: Parts) -> bool:
    """Whether the package (and SciPy, which its kernel needs) is installed and has a CPU kernel for such a weight."""
    _, codebooks, _ = parts
    if codebooks.shape[1] != 256 or codebooks.shape[2] != 1:
        return False
    if importlib.util.find_spec("scipy") is None:
        return False
    try:
        return importlib.metadata.version("aqlm") == "1.1.7"
    except importlib.metadata.PackageNotFoundError:
        return False


def official(parts: Sequence[Parts], x: Tensor, threads: int) -> Callable[[int], Tensor]:
    """Its Numba kernel on so many threads."""
    from aqlm.inference_kernels.numba_kernel import numba_gemm_lut

    permuted = [(codes.transpose(0, 1).contiguous(), codebooks, scales) for codes, codebooks, scales in parts]

    def call(index: int) -> Tensor:
        before, torch_before = numba.get_num_threads(), torch.get_num_threads()
        numba.set_num_threads(threads)
        try:
            with torch.no_grad():
                return numba_gemm_lut(x, *cast("tuple[Any, Any, Any]", permuted[index % len(permuted)]), None)
        finally:
            numba.set_num_threads(before)
            torch.set_num_threads(torch_before)  # Numba's threading layer sets it, where both use the same OpenMP

    return call
