"""The nearest codebook entry of many vectors, each in a metric of its own."""

import torch
from torch import Tensor

from aqlm_tensor.quantizer.parallel import compiled_search, map_rows

__all__ = ["Nearest"]

_CHUNK_ELEMENTS = 1 << 17  # scratch floats of one step: they stay in the cache
_MAX_ENTRY = 64


class Nearest:
    """Finds the nearest of some entries. What can be prepared is prepared once.

    Args:
        entries: [S, E].
    """

    def __init__(self, entries: Tensor) -> None:
        backend = compiled_search(entries.device)
        self._compiled, self._lowest = None, _lowest
        if backend is not None and entries.device.type == "cpu":  # where BLAS is best at the products
            self._lowest = backend.lowest
        elif backend is not None and entries.shape[1] <= _MAX_ENTRY:
            self._compiled = backend.Nearest(entries)
        self._transposed = entries.T.contiguous()

    def __call__(self, linear: Tensor, column: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and argmin over s of squares[column[n], s] - 2 linear[n] . entries[s], for each n.

        With linear = x M and squares[j, s] = c_s M c_s^T this is the squared distance of x and c_s, less x M x^T.

        Args:
            linear: [N, E].
            column: [N] int64, rows of `squares`; neighbours should have the same.
            squares: [J, S].

        Returns:
            Values [N] and indices [N] int64.
        """
        if self._compiled is not None:
            return self._compiled(linear, column, squares)
        longest = max(1, _CHUNK_ELEMENTS // self._transposed.shape[1])

        def work(rows: slice) -> tuple[Tensor, Tensor]:
            parts = [slice(i, min(i + longest, rows.stop)) for i in range(rows.start, rows.stop, longest)]
            found = [self._lowest(self._costs(linear[part], column[part], squares)) for part in parts]
            return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

        values, indices = zip(*map_rows(work, len(linear), linear.device), strict=True)
        return torch.cat(values), torch.cat(indices)

    def _costs(self, linear: Tensor, column: Tensor, squares: Tensor) -> Tensor:
        added = squares[0] if len(squares) == 1 else squares.index_select(0, column)
        return torch.addmm(added, linear, self._transposed, alpha=-2.0)


def _lowest(costs: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = costs.min(1)
    return values, indices
