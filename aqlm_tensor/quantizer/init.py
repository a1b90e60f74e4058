"""Initial codebooks: k-means on a sample of groups, each codebook on what the ones before it left over.

Distances use each group's own metric, so that directions the inputs never take do not attract entries.
"""

import torch
from torch import Tensor

from aqlm_tensor.quantizer.nearest import nearest
from aqlm_tensor.quantizer.sums import code_sums

__all__ = ["initial_codebooks"]

_MIN_POINTS = 1 << 14
_MIN_POINTS_ALONE = 1 << 20  # with one codebook later rounds are k-means too, and only slowly correct a small sample
_POINTS_PER_ENTRY = 16
_OVERSTEP = 1.6  # past each cluster's mean: Lloyd's steps are short, this gains about a third of the iterations


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
        metric: metric of each group, [I / G, G, G].
        shape: of the codebooks, (K, S, H, G).
        iterations: Lloyd iterations per codebook; twice as many for a single one.
        generator: source of the sample and of the seeds, on the CPU.

    Returns:
        Codebooks [K, S, H, G], float32.
    """
    count, size, height, group = shape
    rows, groups = target.shape[0], metric.shape[0]
    total = rows * groups
    least = _MIN_POINTS if count > 1 else _MIN_POINTS_ALONE
    wanted = min(total, max(least, _POINTS_PER_ENTRY * size))
    if wanted < total:  # a draw may repeat; a permutation of hundreds of millions would take seconds
        picked = torch.randint(total, (wanted,), generator=generator)
    else:
        picked = torch.randperm(total, generator=generator)
    picked = picked[(picked % groups).argsort(stable=True)].to(target.device)  # neighbours share a metric
    row, column = picked // groups, picked % groups
    points = target.view(rows, height, groups, group)[row, :, column]
    weights = row_weights[row]
    codebooks = torch.zeros(shape, dtype=torch.float32, device=target.device)
    rounds = iterations if count > 1 else 2 * iterations  # one codebook has no other to make up for it
    for k in range(count):
        codebooks[k], assigned = _kmeans(points, weights, column, metric, size, rounds, generator)
        points = points - codebooks[k][assigned]
    return codebooks


def _kmeans(
    points: Tensor,
    weights: Tensor,
    column: Tensor,
    metric: Tensor,
    size: int,
    iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Centres [S, H, G] of `points` [N, H, G] and each point's centre [N]. Empty clusters restart at bad points."""
    number, height, group = points.shape
    seeds = torch.randperm(number, generator=generator)
    seeds = seeds.repeat(-(-size // number))[:size].to(points.device)
    centres = points[seeds].clone()
    own = metric[column]
    moments = ((points @ own) * weights[:, None, None]).flatten(1)
    weighted_metric = (own * weights[:, None, None]).flatten(1)
    assigned, distance = _assign(points, own, column, metric, centres)
    for iteration in range(iterations):
        sums = code_sums(assigned[:, None, None], size)
        left = sums(weighted_metric).view(size, group, group)
        right = sums(moments).view(size, height, group)
        step = _OVERSTEP if iteration < iterations - 1 else 1.0
        centres = centres + step * (_solve(left, right, centres) - centres)
        filled = torch.bincount(assigned, minlength=size) > 0
        empty = (~filled).nonzero()[:, 0]
        if len(empty) and len(empty) < number:
            worst = (distance * weights).topk(min(len(empty), number)).indices
            centres[empty[: len(worst)]] = points[worst]
        assigned, distance = _assign(points, own, column, metric, centres)
    return centres, assigned


def _assign(points: Tensor, own: Tensor, column: Tensor, metric: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each point and its squared distance, in the point's own metric."""
    weighted = (points @ own).flatten(1)
    norms = (weighted * points.flatten(1)).sum(1)
    squares = torch.einsum("shg,jgf,shf->js", centres, metric, centres)
    values, indices = nearest(weighted, column, squares, centres.flatten(1))
    return indices, values.add_(norms).clamp_(min=0)


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
