"""Given the codes, the best codebooks and scales: the weighted error is quadratic in either.

Codebooks by preconditioned conjugate gradients on the least-squares problem (AQLM, arXiv 2401.06118, section 3.3, uses
Adam on the same objective); scales in closed form.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aqlm_tensor.quantizer.parallel import map_rows, numba_search
from aqlm_tensor.quantizer.search import gather

__all__ = ["refine_codebooks", "refine_scales", "row_errors", "scatter_add", "times_metric"]

_CONVERGED = 1e-8  # of the first squared residual


def scatter_add(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """Sums of the rows of `values` [N, D] by `indices` [N]: [size, D], in an order that does not vary between runs."""
    out = torch.zeros(size, values.shape[1], dtype=values.dtype, device=values.device)
    backend = numba_search(values.device)
    if backend is not None:
        backend.scatter_add(values.contiguous().numpy(), indices.contiguous().numpy(), out.numpy())
    elif values.device.type == "cpu":
        out.index_add_(0, indices, values)
    else:  # index_add_ uses atomics on GPUs; accumulating index_put_ sorts
        out.index_put_((indices,), values, accumulate=True)
    return out


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

    def normal_part(rows: slice) -> Tensor:
        step = times_metric(gather(direction, indices[rows]) * weights[rows], metric)
        return _scatter(step, indices[rows], shape)

    def residual_part(rows: slice) -> Tensor:
        step = times_metric((target[rows] - gather(result, indices[rows])) * weights[rows], metric)
        return _scatter(step, indices[rows], shape)

    def over_rows(work: Callable[[slice], Tensor]) -> Tensor:
        return torch.stack(map_rows(work, len(indices), target.device)).sum(0)

    residual = over_rows(residual_part)
    factors = _block_factors(row_weights, indices, metric, codebooks.shape)
    direction = torch.zeros_like(result)
    previous = enough = 0.0
    for _ in range(steps):
        conditioned = torch.cholesky_solve(residual.mT, factors).mT
        current = float((residual * conditioned).flatten(1).sum(1).sum())
        enough = enough or _CONVERGED * current
        if not current > enough:  # what is left is rounding, which further steps would amplify
            break
        direction = conditioned + (current / previous) * direction if previous else conditioned
        image = over_rows(normal_part)
        curvature = float((direction * image).flatten(1).sum(1).sum())
        if not curvature > 0:
            break
        length = current / curvature
        result += length * direction
        residual -= length * image
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


def _scatter(gradient: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """Adjoint of `gather`: [R, H, I] -> [K, S, H, G]."""
    count, size, height, group = shape
    rows, groups = indices.shape[:2]
    flat = gradient.view(rows, height, groups, group).transpose(1, 2).reshape(rows * groups, height * group)
    parts = [scatter_add(flat, indices[..., k].reshape(-1), size) for k in range(count)]
    return torch.stack(parts).view(shape)


def _block_factors(row_weights: Tensor, indices: Tensor, metric: Tensor | None, shape: torch.Size) -> Tensor:
    """Cholesky factors [K, S, G, G]... of the diagonal blocks of the normal equations, one block per entry."""
    count, size, _, group = shape
    rows, groups = indices.shape[:2]
    if metric is None:
        blocks = torch.eye(group, device=indices.device).flatten().expand(groups, -1)
    else:
        inputs = metric.shape[0]
        blocks = metric.as_strided((groups, group, group), (group * (inputs + 1), inputs, 1)).flatten(1)
    column = torch.arange(groups, device=indices.device)
    mass = row_weights[:, None].expand(rows, groups).reshape(-1, 1)
    diagonal = []
    for k in range(count):
        slots = (indices[..., k] * groups + column).reshape(-1)
        diagonal.append(scatter_add(mass, slots, size * groups).view(size, groups) @ blocks)
    normal = torch.stack(diagonal).view(count, size, group, group)
    trace = normal.diagonal(dim1=2, dim2=3).sum(2)
    ridge = torch.where(trace > 0, trace * 1e-5, torch.ones_like(trace))
    normal = normal + ridge[..., None, None] * torch.eye(group, dtype=normal.dtype, device=normal.device)
    return torch.linalg.cholesky(normal)
