"""The nearest codebook entry of many vectors, each in a metric of its own."""

import torch
from torch import Tensor

from aqlm_tensor.quantizer.parallel import compiled_search, map_rows

__all__ = ["nearest"]

_CHUNK_ELEMENTS = 1 << 22  # scratch floats of one step
_MAX_ENTRY = 64


def nearest(linear: Tensor, column: Tensor, squares: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and argmin over s of squares[column[n], s] - 2 linear[n] . entries[s], for each n.

    With linear = x M and squares[j, s] = c_s M c_s^T this is the squared distance of x and c_s, less x M x^T.

    Args:
        linear: [N, E].
        column: [N] int64, rows of `squares`.
        squares: [J, S].
        entries: [S, E].

    Returns:
        Values [N] and indices [N] int64.
    """
    backend = compiled_search(linear.device) if linear.device.type != "cpu" else None  # BLAS is best on the CPU
    if backend is not None and linear.shape[1] <= _MAX_ENTRY:
        return backend.nearest(linear, column, squares, entries)
    flat = entries.T.contiguous()
    longest = max(1, _CHUNK_ELEMENTS // flat.shape[1])

    def work(rows: slice) -> tuple[Tensor, Tensor]:
        parts = [slice(i, min(i + longest, rows.stop)) for i in range(rows.start, rows.stop, longest)]
        found = [torch.addmm(squares[column[p]], linear[p], flat, alpha=-2.0).min(1) for p in parts]
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

    values, indices = zip(*map_rows(work, len(linear), linear.device), strict=True)
    return torch.cat(values), torch.cat(indices)
