"""Code search: given codebooks, choose every group's codes so that the weighted error of its row is small.

Rows are independent. Within a row the groups are visited in order; each takes the codes that minimise a quadratic
q M q^T - 2 b q^T, where b carries the errors of the other groups. With the couplings of the Hessian itself this is
coordinate descent (as in AQLM, Egiazarian et al. 2024, arXiv 2401.06118, section 3.2); with those of its block UDU^T
factor it is error feedback (GPTQ, Frantar et al. 2023, arXiv 2210.17323; QuIP, Chee et al. 2023, arXiv 2307.13304).
One group's codes are searched two codebooks at a time: all pairs of entries for codebooks of up to 256 entries, a beam
over the first codebook for larger ones.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from aqlm_tensor.quantizer.parallel import map_rows, numba_search

__all__ = ["Coupling", "gather", "sweep"]

_EXHAUSTIVE_SIZE = 256  # codebooks up to this size are searched over all pairs
_BLOCK_COLUMNS = 256  # groups whose feedback is updated one by one before the next matrix product
_CHUNK_ELEMENTS = 1 << 24  # scratch floats of one step
_PAIR_BITS = 28  # |pair costs| < 2^28 and row costs <= 2^29 each: sums stay inside int32


@dataclass(frozen=True)
class Coupling:
    """How the groups of a row depend on one another.

    Attributes:
        metric: M of each group, [in_groups, G, G], symmetric positive semidefinite.
        feedback: couplings between inputs, [I, I], zero in the diagonal blocks: errors e add e @ feedback to b. None if
            there are none.
        causal: whether `feedback` reaches later groups only (error feedback from scratch).
    """

    metric: Tensor
    feedback: Tensor | None
    causal: bool


def gather(codebooks: Tensor, indices: Tensor) -> Tensor:
    """Sum of the entries that `indices` [R, J, K] select from `codebooks` [K, S, H, G]: [R, H, J * G]."""
    total = codebooks[0][indices[..., 0]]
    for k in range(1, codebooks.shape[0]):
        total += codebooks[k][indices[..., k]]
    return total.transpose(1, 2).reshape(indices.shape[0], codebooks.shape[2], -1)


def sweep(target: Tensor, indices: Tensor | None, codebooks: Tensor, coupling: Coupling, beam_width: int) -> Tensor:
    """Visit every group once, in order, and return the new indices [R, J, K].

    Args:
        target: normalised weights, [R, H, I].
        indices: current choice, [R, J, K]; None chooses from scratch (only with a causal coupling). Left alone.
        codebooks: [K, S, H, G].
        coupling: metric and feedback; see there.
        beam_width: entries kept of the first codebook of a pair, for codebooks too large to try all pairs.
    """
    rows, _, columns = target.shape
    count, size, _, group = codebooks.shape
    fresh = indices is None
    if indices is None:
        indices = torch.zeros(rows, columns // group, count, dtype=torch.int64, device=target.device)
        error = torch.zeros_like(target)
    else:
        indices = indices.clone()
        error = torch.zeros_like(target) if coupling.causal else target - gather(codebooks, indices)
    compiled = numba_search(target.device) if size <= _EXHAUSTIVE_SIZE else None
    if compiled is None:
        visit = _TorchBlocks(codebooks, coupling, beam_width, fresh)
    else:
        visit = _NumbaBlocks(codebooks, coupling, compiled, fresh)
    for start in range(0, columns, visit.width):
        block = slice(start, min(start + visit.width, columns))
        inputs = slice(0, start if coupling.causal else columns)
        visit.prepare(block)
        feedback = None if coupling.feedback is None else coupling.feedback[inputs, block].contiguous()

        def work(rows: slice, block: slice = block, inputs: slice = inputs, feedback: Tensor | None = feedback) -> None:
            pending = (
                torch.zeros_like(target[rows, :, block]) if feedback is None else error[rows, :, inputs] @ feedback
            )
            visit(rows, block, target, pending, error, indices)

        map_rows(work, rows, target.device)
    return indices


def _block_width(columns: int, group: int, tables: int) -> int:
    """Columns of a block: whole groups, about _BLOCK_COLUMNS, with at most _CHUNK_ELEMENTS table entries in all."""
    groups = max(1, min(_BLOCK_COLUMNS // group, _CHUNK_ELEMENTS // max(tables, 1)))
    return min(columns, groups * group)


def _pair_order(count: int) -> list[tuple[int, int]]:
    """Pairs of codebooks to search one after the other: neighbours, closed to a ring from three on."""
    return [(k, k + 1) for k in range(count - 1)] + ([(count - 1, 0)] if count > 2 else [])


def _passes(count: int, fresh: bool) -> int:
    return 2 if fresh and count > 2 else 1


def _fixed_point_pairs(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Interaction costs [..., S, S] as int32, and the steps per unit [...], the largest being 2^28.

    A row's own costs are taken relative to their minimum and capped at twice the largest pair cost: an entry beyond
    the cap cannot be part of the best pair. So sums of three stay inside int32, and resolution beats float32.
    """
    largest = pairs.abs().amax((-2, -1)).clamp_(min=1e-30)
    factors = float(1 << _PAIR_BITS) / largest
    return (pairs * factors[..., None, None]).to(torch.int32), factors


class _NumbaBlocks:
    """Blocks of groups in compiled loops; codebooks of up to 256 entries."""

    def __init__(self, codebooks: Tensor, coupling: Coupling, compiled: ModuleType, fresh: bool) -> None:
        self.coupling, self.compiled, self.known = coupling, compiled, not fresh
        self.codebooks = codebooks
        count, size, _, self.group = codebooks.shape
        self.flat = codebooks.flatten(2).contiguous()
        self.transposed = self.flat.mT.contiguous()
        self.pairs = _pair_order(count)
        order = torch.tensor(self.pairs * _passes(count, fresh), dtype=torch.int64).view(-1, 2)
        self.order = order.numpy()
        self.width = _block_width(len(coupling.metric) * self.group, self.group, len(self.pairs) * size * size)

    def prepare(self, block: slice) -> None:
        """Tables of the groups of a block, shared by all rows."""
        metric = self.coupling.metric[block.start // self.group : block.stop // self.group]
        groups, (count, size) = len(metric), self.codebooks.shape[:2]
        tables = torch.empty(groups, len(self.pairs), size, size, dtype=torch.int32)
        factors = torch.ones(groups, len(self.pairs))
        squares = torch.empty(groups, count, size)

        def work(part: slice) -> None:
            for j in range(part.start, part.stop):
                weighted = (self.codebooks @ metric[j]).flatten(2)
                squares[j] = (weighted * self.flat).sum(2)
                for p, (first, second) in enumerate(self.pairs):
                    pairs = 2.0 * (weighted[first] @ self.transposed[second])
                    tables[j, p], factors[j, p] = _fixed_point_pairs(pairs)

        map_rows(work, groups, metric.device, smallest=4)
        whole = self.coupling.feedback
        feedback = torch.empty(0, 0) if whole is None else whole[block, block].contiguous()
        self.shared = [t.numpy() for t in (metric, feedback, self.flat, self.transposed, squares, tables, factors)]

    def __call__(
        self, rows: slice, block: slice, target: Tensor, pending: Tensor, error: Tensor, indices: Tensor
    ) -> None:
        groups = slice(block.start // self.group, block.stop // self.group)
        part_error = error[rows, :, block].contiguous()
        part_indices = indices[rows, groups].contiguous()
        arrays = [t.contiguous().numpy() for t in (target[rows, :, block], pending, part_error, part_indices)]
        limit = arrays[0].dtype.type(2 << _PAIR_BITS)
        self.compiled.sweep_block(*arrays, self.known, *self.shared, limit, self.order)
        error[rows, :, block] = part_error
        indices[rows, groups] = part_indices


class _TorchBlocks:
    """Blocks of groups in torch operations, for any device and codebook size."""

    def __init__(self, codebooks: Tensor, coupling: Coupling, beam_width: int, fresh: bool) -> None:
        self.codebooks, self.coupling, self.fresh = codebooks, coupling, fresh
        self.group = codebooks.shape[-1]
        self.search = _GroupSearch(codebooks, beam_width)
        self.width = _block_width(len(coupling.metric) * self.group, self.group, 1)

    def prepare(self, block: slice) -> None:
        """Couplings inside the block."""
        self.inner = None if self.coupling.feedback is None else self.coupling.feedback[block, block]

    def __call__(
        self, rows: slice, block: slice, target: Tensor, pending: Tensor, error: Tensor, indices: Tensor
    ) -> None:
        group, start = self.group, block.start
        for left in range(0, block.stop - start, group):
            right, j = left + group, (start + left) // group
            here = (rows, slice(None), slice(start + left, start + right))
            metric = self.coupling.metric[j]
            linear = target[here] @ metric + pending[..., left:right]
            chosen = self.search(metric, linear, None if self.fresh else indices[rows, j])
            indices[rows, j] = chosen
            new = target[here] - gather(self.codebooks, chosen[:, None])
            if self.inner is not None:
                pending[..., right:] += (new - error[here]) @ self.inner[left:right, right:]
            error[here] = new


class _GroupSearch:
    """Minimise q M q^T - 2 b q^T over the sums q of one entry per codebook, for many b at once."""

    def __init__(self, codebooks: Tensor, beam_width: int) -> None:
        self.codebooks = codebooks
        self.flat = codebooks.flatten(2)  # [K, S, H * G]
        count, size = codebooks.shape[:2]
        self.exhaustive = size <= _EXHAUSTIVE_SIZE
        self.beam_width = min(beam_width, size)
        self.pairs = _pair_order(count)

    def __call__(self, metric: Tensor, linear: Tensor, current: Tensor | None) -> Tensor:
        """Indices [R, K] for linear terms b [R, H, G]; `current` [R, K] is where the search starts, if known."""
        weighted = (self.codebooks @ metric).flatten(2)  # [K, S, H * G]
        squares = (weighted * self.flat).sum(2)
        rows = linear.shape[0]
        step = max(1, _CHUNK_ELEMENTS // squares.numel())
        chosen = torch.empty(rows, len(self.flat), dtype=torch.int64, device=linear.device)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            flat = linear[part].flatten(1)
            costs = torch.baddbmm(squares[:, None], flat.expand(len(self.flat), -1, -1), self.flat.mT, alpha=-2.0)
            begin = None if current is None else current[part]
            chosen[part] = self._search(costs, weighted, begin)
        return chosen

    def _search(self, costs: Tensor, weighted: Tensor, current: Tensor | None) -> Tensor:
        """`costs` [K, R, S] of each entry alone -> indices [R, K]."""
        count, rows = costs.shape[:2]
        if count == 1:
            return costs[0].argmin(1, keepdim=True)
        known = [current is not None] * count
        chosen = (
            torch.zeros(rows, count, dtype=torch.int64, device=costs.device) if current is None else current.clone()
        )
        for first, second in self.pairs * _passes(count, current is None):
            others = [k for k in range(count) if k not in (first, second) and known[k]]
            given = [self._given(costs, weighted, k, others, chosen) for k in (first, second)]
            start = chosen[:, first] if known[first] and known[second] else None
            chosen[:, [first, second]] = self._search_pair(first, second, given[0], given[1], weighted, start)
            known[first] = known[second] = True
        return chosen

    def _given(self, costs: Tensor, weighted: Tensor, k: int, others: list[int], chosen: Tensor) -> Tensor:
        """Costs [R, S] of the entries of codebook k when the codes of `others` are fixed."""
        if not others:
            return costs[k]
        fixed = self.flat[others[0]][chosen[:, others[0]]]
        for other in others[1:]:
            fixed = fixed + self.flat[other][chosen[:, other]]
        return torch.addmm(costs[k], fixed, weighted[k].mT, alpha=2.0)

    def _search_pair(
        self, first: int, second: int, costs1: Tensor, costs2: Tensor, weighted: Tensor, start: Tensor | None
    ) -> Tensor:
        if self.exhaustive:
            return _all_pairs(costs1, costs2, 2.0 * (weighted[first] @ self.flat[second].mT))
        candidates = costs1.topk(self.beam_width, dim=1, largest=False).indices
        if start is not None:  # the present code competes, so that a visit never makes the row worse
            candidates = torch.cat([candidates, start[:, None]], 1)
        totals, partners = [], []
        for code in candidates.unbind(1):
            total = torch.addmm(costs2, weighted[first][code], self.flat[second].mT, alpha=2.0)
            value, partner = total.min(1)
            totals.append(value + costs1.gather(1, code[:, None])[:, 0])
            partners.append(partner)
        best = torch.stack(totals, 1).argmin(1, keepdim=True)
        return torch.cat([candidates.gather(1, best), torch.stack(partners, 1).gather(1, best)], 1)


def _all_pairs(costs1: Tensor, costs2: Tensor, pairs: Tensor) -> Tensor:
    """Argmin over (i, l) of costs1[r, i] + costs2[r, l] + pairs[i, l]: indices [R, 2]. The compiled loops agree."""
    fixed, factor = _fixed_point_pairs(pairs)
    limit = float(2 << _PAIR_BITS)
    one, two = ((c - c.amin(1, keepdim=True)).mul_(factor).clamp_(max=limit).to(torch.int32) for c in (costs1, costs2))
    step = max(1, _CHUNK_ELEMENTS // fixed.numel())
    parts = [
        (one[start : start + step, :, None] + two[start : start + step, None, :] + fixed).flatten(1).argmin(1)
        for start in range(0, costs1.shape[0], step)
    ]
    best = torch.cat(parts)
    return torch.stack([best // fixed.shape[1], best % fixed.shape[1]], 1)
