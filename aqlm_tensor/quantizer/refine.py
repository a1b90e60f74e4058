"""Given the codes, the best codebooks and scales: the weighted error is quadratic in either.

Codebooks by preconditioned conjugate gradients on the least-squares problem (AQLM, arXiv 2401.06118, section 3.3, uses
Adam on the same objective); scales in closed form.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aqlm_tensor.quantizer.parallel import map_rows
from aqlm_tensor.quantizer.search import gather
from aqlm_tensor.quantizer.sums import CodeSums, code_sums

__all__ = ["refine_codebooks", "refine_scales", "row_errors", "times_metric"]

_CONVERGED = 1e-8  # of the first squared residual


def times_metric(rows: Tensor, metric: Tensor | None) -> Tensor:
    """`rows` @ `metric`, None being the identity."""
    return rows if metric is None else rows @ metric


def row_errors(error: Tensor, metric: Tensor | None) -> Tensor:
    """e M e^T of every row group: `error` [R, H, I] -> [R]; None is the identity."""
    parts = map_rows(lambda r: (times_metric(error[r], metric) * error[r]).flatten(1).sum(1), len(error), error.device)
    return torch.cat(parts)


def refine_codebooks(
    target: Tensor, row_weights: Tensor, indices: Tensor, codebooks: Tensor, metric: Tensor | None, steps: int
) -> Tensor:
    """Codebooks after `steps` of conjugate gradients on sum over rows of weight * (u - q) metric (u - q)^T.

    Args:
        target: normalised weights u, [R, H, I].
        row_weights: [R].
        indices: codes of every group, [R, I / G, K].
        codebooks: where to start, [K, S, H, G]; left alone.
        metric: [I, I]; None is the identity.
        steps: iterations; entries that no group uses do not move.
    """
    weights = row_weights[:, None, None]
    result = codebooks.clone()
    shape = codebooks.shape

    sums = dict(map_rows(lambda r: (r.start, code_sums(indices[r], shape[1])), len(indices), target.device))

    def normal_part(rows: slice) -> Tensor:
        step = times_metric(gather(direction, indices[rows]) * weights[rows], metric)
        return _scatter(step, sums[rows.start], shape)

    def residual_part(rows: slice) -> Tensor:
        step = times_metric((target[rows] - gather(result, indices[rows])) * weights[rows], metric)
        return _scatter(step, sums[rows.start], shape)

    def over_rows(work: Callable[[slice], Tensor]) -> Tensor:
        parts = map_rows(work, len(indices), target.device)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    blocks = _diagonal_blocks(metric, indices.shape[1], shape[3], target.device)

    def diagonal_part(rows: slice) -> Tensor:
        return sums[rows.start].weighted(row_weights[rows], blocks)

    residual = over_rows(residual_part)
    preconditioner = _inverses(over_rows(diagonal_part).view(*shape[:2], shape[3], shape[3]))
    direction = torch.zeros_like(result)
    previous = enough = 0.0
    for _ in range(steps):
        conditioned = residual @ preconditioner
        current = float((residual * conditioned).sum())
        enough = enough or _CONVERGED * current
        if not current > enough:  # what is left is rounding, which further steps would amplify
            break
        direction = conditioned.add(direction, alpha=current / previous) if previous else conditioned
        image = over_rows(normal_part)
        curvature = float((direction * image).sum())
        if not curvature > 0:
            break
        length = current / curvature
        result.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        previous = current
    return result


def refine_scales(weight: Tensor, quantized: Tensor, scales: Tensor, metric: Tensor | None) -> Tensor:
    """Best scale of every row group, [R], for `weight` and unscaled `quantized` [R, H, I].

    A row whose optimum is not positive (its codes tell nothing about it) keeps its entry of `scales`.
    """

    def sums(rows: slice) -> Tensor:
        weighted = times_metric(quantized[rows], metric)
        return torch.stack([(weighted * other[rows]).flatten(1).sum(1) for other in (weight, quantized)])

    overlap, norm = torch.cat(map_rows(sums, len(weight), weight.device), 1)
    best = overlap / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    usable = (norm > 0) & (best > 0) & best.isfinite() & (scales > 0)
    return torch.where(usable, best, scales)


def _scatter(gradient: Tensor, sums: CodeSums, shape: torch.Size) -> Tensor:
    """Adjoint of `gather`: [R, H, I] -> [K, S, H, G], given the sums by code."""
    rows, height, inputs = gradient.shape
    group = shape[3]
    groups = gradient.view(rows, height, inputs // group, group).transpose(1, 2)
    flat = groups.reshape(rows * (inputs // group), height * group)
    return sums(flat).view(shape)


def _diagonal_blocks(metric: Tensor | None, groups: int, group: int, device: torch.device) -> Tensor:
    """The metric of each group, [J, G * G]."""
    if metric is None:
        return torch.eye(group, device=device).flatten().repeat(groups, 1)
    inputs = metric.shape[0]
    return metric.as_strided((groups, group, group), (group * (inputs + 1), inputs, 1)).flatten(1)


def _inverses(normal: Tensor) -> Tensor:
    """Inverses of the diagonal blocks [K, S, G, G] of the normal equations; entries without mass get an identity."""
    trace = normal.diagonal(dim1=2, dim2=3).sum(2)
    ridge = torch.where(trace > 0, trace * 1e-5, torch.ones_like(trace))
    damped = normal + ridge[..., None, None] * torch.eye(normal.shape[2], device=normal.device)
    return torch.linalg.inv(damped)
