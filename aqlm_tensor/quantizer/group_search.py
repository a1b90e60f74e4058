"""One group of every row in torch operations: for codebooks of more than 256 entries, and where nothing is compiled.

One codebook: the nearest entry. Two: all pairs for codebooks of up to 256 entries, a beam over the first for larger
ones. More: pair after pair, the other codes fixed.
"""

import torch
from torch import Tensor

from aqlm_tensor.quantizer.nearest import Nearest

__all__ = ["PAIR_LIMIT", "GroupSearch", "fixed_point_pairs", "pair_order"]

_EXHAUSTIVE_SIZE = 256  # codebooks up to this size are searched over all pairs
_CHUNK_ELEMENTS = 1 << 24  # scratch floats of one step on the CPU
_GPU_CHUNK_ELEMENTS = 1 << 27
_PAIR_BITS = 28  # |pair costs| < 2^28 and row costs <= 2^29 each: sums stay inside int32
PAIR_LIMIT = float(2 << _PAIR_BITS)  # cap of a row's own fixed-point costs


def pair_order(count: int, *, fresh: bool) -> list[tuple[int, int]]:
    """Pairs of codebooks to search one after the other: neighbours, closed to a ring from three on.

    A `fresh` search of three or more goes round twice, because the first pairs were chosen without the rest.
    """
    pairs = [(k, k + 1) for k in range(count - 1)] + ([(count - 1, 0)] if count > 2 else [])
    return pairs * (2 if fresh and count > 2 else 1)


def fixed_point_pairs(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Interaction costs [..., S, S] as int32, and the steps per unit [...], the largest being 2^28.

    A row's own costs are taken relative to their minimum and capped at twice the largest pair cost: an entry beyond
    the cap cannot be part of the best pair. So sums of three stay inside int32, and resolution beats float32.
    """
    largest = pairs.abs().amax((-2, -1)).clamp_(min=1e-30)
    factors = float(1 << _PAIR_BITS) / largest
    return (pairs * factors[..., None, None]).to(torch.int32), factors


class GroupSearch:
    """Minimise q M q^T - 2 b q^T over the sums q of one entry per codebook, for many b at once."""

    def __init__(self, codebooks: Tensor, beam_width: int) -> None:
        self.codebooks = codebooks
        self.flat = codebooks.flatten(2)  # [K, S, H * G]
        self.nearest = [Nearest(book) for book in self.flat]
        self.exhaustive = codebooks.shape[1] <= _EXHAUSTIVE_SIZE
        self.beam_width = min(beam_width, codebooks.shape[1])

    def __call__(self, metric: Tensor, linear: Tensor, current: Tensor | None) -> Tensor:
        """Indices [R, K] for linear terms b [R, H, G]; `current` [R, K] is where the search starts, if known."""
        weighted = (self.codebooks @ metric).flatten(2)  # [K, S, H * G]
        squares = (weighted * self.flat).sum(2)
        rows, count = len(linear), len(self.flat)
        if count == 1:
            return self._nearest(linear.flatten(1), 0, squares)[1][:, None]
        chosen = torch.empty(rows, count, dtype=torch.int64, device=linear.device)
        elements = _CHUNK_ELEMENTS if linear.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
        step = max(1, elements // squares.numel())
        for start in range(0, rows, step):
            part = slice(start, start + step)
            begin = None if current is None else current[part]
            chosen[part] = self._search(linear[part], metric, squares, weighted, begin)
        return chosen

    def _search(
        self, linear: Tensor, metric: Tensor, squares: Tensor, weighted: Tensor, current: Tensor | None
    ) -> Tensor:
        count = len(self.flat)
        known = [current is not None] * count
        shape = (len(linear), count)
        chosen = torch.zeros(shape, dtype=torch.int64, device=linear.device) if current is None else current.clone()
        for first, second in pair_order(count, fresh=current is None):
            given = linear
            for k in range(count):
                if known[k] and k not in (first, second):
                    given = given - self.codebooks[k][chosen[:, k]] @ metric
            start = chosen[:, first] if known[first] and known[second] else None
            if self.exhaustive:
                found = self._all_pairs(given.flatten(1), first, second, squares, weighted)
            else:
                found = self._beam(given.flatten(1), first, second, squares, weighted, start)
            chosen[:, [first, second]] = found
            known[first] = known[second] = True
        return chosen

    def _nearest(self, linear: Tensor, k: int, squares: Tensor) -> tuple[Tensor, Tensor]:
        column = torch.zeros(len(linear), dtype=torch.int64, device=linear.device)
        return self.nearest[k](linear, column, squares[k : k + 1])

    def _costs(self, linear: Tensor, k: int, squares: Tensor) -> Tensor:
        """Costs [R, S] of each entry of codebook k alone."""
        return torch.addmm(squares[k], linear, self.flat[k].mT, alpha=-2.0)

    def _beam(
        self, linear: Tensor, first: int, second: int, squares: Tensor, weighted: Tensor, start: Tensor | None
    ) -> Tensor:
        """The best partners of the best entries of the first codebook: indices [R, 2]."""
        costs = self._costs(linear, first, squares)
        candidates = costs.topk(self.beam_width, dim=1, largest=False).indices
        if start is not None:  # the present code competes, so that a visit never makes the row worse
            candidates = torch.cat([candidates, start[:, None]], 1)
        left = linear[:, None] - weighted[first][candidates]
        values, partners = (t.view(candidates.shape) for t in self._nearest(left.flatten(0, 1), second, squares))
        best = (values + costs.gather(1, candidates)).argmin(1, keepdim=True)
        return torch.cat([candidates.gather(1, best), partners.gather(1, best)], 1)

    def _all_pairs(self, linear: Tensor, first: int, second: int, squares: Tensor, weighted: Tensor) -> Tensor:
        """Argmin over (i, l) of the costs of i, l and the pair: indices [R, 2]. The compiled loops agree."""
        table, factor = fixed_point_pairs(2.0 * (weighted[first] @ self.flat[second].mT))
        costs = (self._costs(linear, k, squares) for k in (first, second))
        one, two = ((c - c.amin(1, keepdim=True)).mul_(factor).clamp_(max=PAIR_LIMIT).to(torch.int32) for c in costs)
        step = max(1, _CHUNK_ELEMENTS // table.numel())
        parts = [
            (one[start : start + step, :, None] + two[start : start + step, None, :] + table).flatten(1).argmin(1)
            for start in range(0, len(linear), step)
        ]
        best = torch.cat(parts)
        return torch.stack([best // table.shape[1], best % table.shape[1]], 1)
