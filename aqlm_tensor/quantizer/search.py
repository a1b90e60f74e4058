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

from aqlm_tensor.quantizer.group_search import PAIR_LIMIT, GroupSearch, fixed_point_pairs, pair_order
from aqlm_tensor.quantizer.parallel import compiled_search, map_rows

__all__ = ["Coupling", "diagonal_blocks", "gather", "sweep"]

_BLOCK_COLUMNS = 256  # groups whose feedback is updated one by one before the next matrix product
_TABLE_ELEMENTS = 1 << 24  # pair costs of one block


@dataclass(frozen=True)
class Coupling:
    """How the groups of a row depend on one another.

    Attributes:
        metric: M of each group, [in_groups, G, G], symmetric positive semidefinite.
        feedback: couplings between inputs, [I, I]: errors e add e @ feedback to b. Its diagonal blocks do not count, so
            that it can be the metric of a whole row rather than a copy. None if there are none.
        causal: whether `feedback` reaches later groups only (error feedback from scratch).
    """

    metric: Tensor
    feedback: Tensor | None
    causal: bool

    def between(self, inputs: slice, block: slice) -> Tensor | None:
        """A copy of the couplings of some inputs with those of a block of groups, zero within a group."""
        if self.feedback is None:
            return None
        found = self.feedback[inputs, block].clone(memory_format=torch.contiguous_format)
        if inputs.start < block.stop and block.start < inputs.stop:
            diagonal_blocks(found[block.start - inputs.start :], self.metric.shape[1]).zero_()
        return found


def diagonal_blocks(matrix: Tensor, group: int) -> Tensor:
    """View [W / group, group, group] of the diagonal blocks of a contiguous matrix [at least W, W]."""
    assert matrix.is_contiguous()
    width = matrix.shape[1]
    size = (width // group, group, group)
    return matrix.as_strided(size, (group * (width + 1), width, 1), matrix.storage_offset())


def gather(codebooks: Tensor, indices: Tensor) -> Tensor:
    """Sum of the entries that `indices` [R, J, K] select from `codebooks` [K, S, H, G]: [R, H, J * G]."""
    total = codebooks[0].index_select(0, indices[..., 0].flatten())
    for k in range(1, codebooks.shape[0]):
        total += codebooks[k].index_select(0, indices[..., k].flatten())
    tiles = total.view(*indices.shape[:2], *codebooks.shape[2:])
    return tiles.transpose(1, 2).reshape(indices.shape[0], codebooks.shape[2], -1)


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
    compiled = compiled_search(target.device)
    if compiled is not None and compiled.supports(size, codebooks[0, 0].numel()):
        visit = _CompiledBlocks(codebooks, coupling, compiled, fresh)
    else:
        visit = _TorchBlocks(codebooks, coupling, beam_width, fresh)
    for start in range(0, columns, visit.width):
        block = slice(start, min(start + visit.width, columns))
        inputs = slice(0, start if coupling.causal else columns)
        visit.prepare(block)
        feedback = coupling.between(inputs, block)

        def work(rows: slice, block: slice = block, inputs: slice = inputs, feedback: Tensor | None = feedback) -> None:
            pending = (
                torch.zeros_like(target[rows, :, block]) if feedback is None else error[rows, :, inputs] @ feedback
            )
            visit(rows, block, target, pending, error, indices)

        map_rows(work, rows, target.device)
    return indices


def _block_width(columns: int, group: int, tables: int) -> int:
    """Columns of a block: whole groups, about _BLOCK_COLUMNS, with at most _TABLE_ELEMENTS table entries in all."""
    groups = max(1, min(_BLOCK_COLUMNS // group, _TABLE_ELEMENTS // max(tables, 1)))
    return min(columns, groups * group)


class _CompiledBlocks:
    """Blocks of groups in compiled loops."""

    def __init__(self, codebooks: Tensor, coupling: Coupling, compiled: ModuleType, fresh: bool) -> None:
        self.coupling, self.compiled, self.known = coupling, compiled, not fresh
        self.codebooks = codebooks
        count, size, _, self.group = codebooks.shape
        self.flat = codebooks.flatten(2).contiguous()
        self.transposed = self.flat.mT.contiguous()
        self.pairs = pair_order(count, fresh=False)
        order = pair_order(count, fresh=fresh) or [(0, 0)]
        self.order = torch.tensor(order, device=codebooks.device)
        self.width = _block_width(len(coupling.metric) * self.group, self.group, len(self.pairs) * size * size)

    def prepare(self, block: slice) -> None:
        """Tables of the groups of a block, shared by all rows."""
        metric = self.coupling.metric[block.start // self.group : block.stop // self.group]
        groups, (count, size), device = len(metric), self.codebooks.shape[:2], metric.device
        tables = torch.empty(groups, len(self.pairs), size, size, dtype=torch.int32, device=device)
        factors = torch.ones(groups, len(self.pairs), device=device)
        squares = torch.empty(groups, count, size, device=device)

        def work(part: slice) -> None:
            weighted = (self.codebooks @ metric[part, None, None]).flatten(3)
            squares[part] = (weighted * self.flat).sum(3)
            for p, (first, second) in enumerate(self.pairs):
                pairs = 2.0 * (weighted[:, first] @ self.transposed[second])
                tables[part, p], factors[part, p] = fixed_point_pairs(pairs)

        map_rows(work, groups, device, smallest=4)
        within = self.coupling.between(block, block)
        feedback = torch.empty(0, 0, device=device) if within is None else within
        self.shared = (metric, feedback, self.flat, self.transposed, squares, tables, factors)

    def __call__(
        self, rows: slice, block: slice, target: Tensor, pending: Tensor, error: Tensor, indices: Tensor
    ) -> None:
        groups = slice(block.start // self.group, block.stop // self.group)
        own = (target[rows, :, block], pending, error[rows, :, block], indices[rows, groups])
        self.compiled.sweep_block(*own, self.known, *self.shared, PAIR_LIMIT, self.order)


class _TorchBlocks:
    """Blocks of groups in torch operations, for any device and codebook size."""

    def __init__(self, codebooks: Tensor, coupling: Coupling, beam_width: int, fresh: bool) -> None:
        self.codebooks, self.coupling, self.fresh = codebooks, coupling, fresh
        self.group = codebooks.shape[-1]
        self.search = GroupSearch(codebooks, beam_width)
        self.width = _block_width(len(coupling.metric) * self.group, self.group, 1)

    def prepare(self, block: slice) -> None:
        """Couplings inside the block."""
        self.inner = self.coupling.between(block, block)

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
