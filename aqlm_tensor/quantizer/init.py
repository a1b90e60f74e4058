"""Initial codebooks: k-means on a sample of groups, each codebook on what the ones before it left over.

Distances use each group's own metric, so that directions the inputs never take do not attract entries. Centres move on
for a while in the direction that they took (heavy ball), which finds better codebooks in a third of Lloyd's iterations.
"""

import torch
from torch import Tensor

from aqlm_tensor.quantizer.nearest import Nearest
from aqlm_tensor.quantizer.sums import code_sums

__all__ = ["initial_codebooks"]

_MIN_POINTS = 1 << 14
_MIN_POINTS_ALONE = 1 << 20  # with one codebook later rounds are k-means too, and only slowly correct a small sample
_MIN_POINTS_ALIKE = 1 << 22  # and with one metric for all groups the k-means here has the last word
_QUICK_SIZE = 256  # entries; for more of them a CPU takes minutes a layer as it is
_POINTS_PER_ENTRY = 16
_STEP = 1.3  # of the way to each cluster's mean


def initial_codebooks(
    target: Tensor,
    row_weights: Tensor,
    metric: Tensor,
    shape: tuple[int, int, int, int],
    iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """Residual k-means.

    Args:
        target: normalised weights, [R, H, I].
        row_weights: weight of each row in the objective, [R].
        metric: metric of each group, [I / G, G, G], or one for all, [1, G, G].
        shape: of the codebooks, (K, S, H, G).
        iterations: of k-means, for each codebook; for a single one twice as many, or eight times with one metric (on
            the CPU only up to 256 entries).
        generator: source of the sample and of the seeds, on the CPU.

    Returns:
        Codebooks [K, S, H, G], float32.
    """
    count, size, height, group = shape
    rows, groups = target.shape[0], target.shape[2] // group
    total = rows * groups
    least, longer = _MIN_POINTS, 1
    if count == 1:
        alike = len(metric) == 1 and (size <= _QUICK_SIZE or target.device.type != "cpu")
        least, longer = (_MIN_POINTS_ALIKE, 8) if alike else (_MIN_POINTS_ALONE, 2)
    wanted = min(total, max(least, _POINTS_PER_ENTRY * size))
    if wanted < total:  # a draw may repeat; a permutation of hundreds of millions would take seconds
        picked = torch.randint(total, (wanted,), generator=generator)
    else:
        picked = torch.randperm(total, generator=generator)
    picked = picked[(picked % groups).argsort(stable=True)].to(target.device)  # neighbours share a metric
    row, column = picked // groups, picked % groups
    values = target.view(rows, height, groups, group)[row, :, column]
    column = column.clamp_(max=len(metric) - 1)
    codebooks = torch.zeros(shape, dtype=torch.float32, device=target.device)
    for k in range(count):
        points = _Points(values, row_weights[row], column, metric)
        codebooks[k], assigned = points.clustered(size, longer * iterations, generator)
        values = values - codebooks[k][assigned]
    return codebooks


class _Points:
    """Vectors [N, H, G] with weights [N], each in one of the metrics [J, G, G], `column` [N] saying which."""

    def __init__(self, values: Tensor, weights: Tensor, column: Tensor, metric: Tensor) -> None:
        self.values, self.weights, self.column, self.metric = values, weights, column, metric
        own = metric[column] if len(metric) > 1 else None
        self.linear = (values @ metric[0] if own is None else values @ own).flatten(1)
        self.norms = (self.linear * values.flatten(1)).sum(1)
        self.moments = self.linear * weights[:, None]
        self.weighted = None if own is None else (own * weights[:, None, None]).flatten(1)

    def clustered(self, size: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Centres [S, H, G] and each point's centre [N]. Empty clusters restart at bad points."""
        number = len(self.values)
        seeds = torch.randperm(number, generator=generator)
        seeds = seeds.repeat(-(-size // number))[:size].to(self.values.device)
        centres = self.values[seeds].clone()
        moved = torch.zeros_like(centres)
        momentum = max(0.0, 1 - 1.2 / max(1, iterations) ** 0.5)  # for 8 to 100 iterations about the best
        assigned, distance = self.assigned(centres)
        for iteration in range(iterations):
            way = self.means(assigned, centres) - centres
            moved = way if iteration == iterations - 1 else _STEP * way + momentum * moved
            centres = centres + moved
            empty = (torch.bincount(assigned, minlength=size) == 0).nonzero()[:, 0]
            if 0 < len(empty) < number:
                worst = (distance * self.weights).topk(len(empty)).indices
                centres[empty], moved[empty] = self.values[worst], 0.0
            assigned, distance = self.assigned(centres)
        return centres, assigned

    def assigned(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest centre of each point and its squared distance, in the point's own metric."""
        squares = torch.einsum("shg,jgf,shf->js", centres, self.metric, centres)
        values, indices = Nearest(centres.flatten(1))(self.linear, self.column, squares)
        return indices, values.add_(self.norms).clamp_(min=0)

    def means(self, assigned: Tensor, centres: Tensor) -> Tensor:
        """The best centres [S, H, G] for the present clusters; those without points stay."""
        size, height, group = centres.shape
        sums = code_sums(assigned[:, None, None], size)
        left = sums.weighted(self.weights, self.metric.flatten(1)) if self.weighted is None else sums(self.weighted)
        return _solve(left.view(size, group, group), sums(self.moments).view(size, height, group), centres)


def _solve(left: Tensor, right: Tensor, fallback: Tensor) -> Tensor:
    """Solve centre @ left = right for every entry; entries without mass keep `fallback`."""
    trace = left.diagonal(dim1=1, dim2=2).sum(1)
    alive = trace > 0
    ridge = torch.where(alive, trace * 1e-5, torch.ones_like(trace))
    damped = left + ridge[:, None, None] * torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    solved = torch.cholesky_solve(right.mT, factor).mT
    usable = alive & (info == 0) & solved.flatten(1).isfinite().all(1)
    return torch.where(usable[:, None, None], solved, fallback)
