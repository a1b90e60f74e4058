"""X^T X of a layer's inputs: accumulating it, checking it, and the two ways in which the code search uses it."""

import torch
from torch import Tensor

from aqlm_tensor.quantizer.search import Coupling

__all__ = ["HessianAccumulator", "check_hessian", "descent_coupling", "feedback_coupling", "no_coupling", "regularize"]

_CHUNK_TOKENS = 8192
_SYMMETRY_TOLERANCE = 1e-4  # of the largest entry; float32 sums of half-precision inputs stay far below
_RIDGE = 1e-6  # of the mean diagonal: weights of dead inputs are kept close to their values


class HessianAccumulator:
    """Streams X^T X over batches of a layer's inputs.

    Products and sums are float32: after n batches the relative rounding error is at most about n * 6e-8, and typically
    the square root of n times that. Memory is one [I, I] float32 matrix and a scratch one of the same size.

    Args:
        in_features: I, the layer's input features.
        device: where the sum lives; inputs elsewhere are multiplied where they are and the product is moved.

    Attributes:
        tokens: rows of X seen so far.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the inputs x, [..., in_features], of any floating dtype.

        Raises:
            ValueError: if the last dimension is not `in_features`, or a value is not finite (or its square overflows
                float32); the sum is then as before.
            TypeError: if x is not floating point.
        """
        if not x.is_floating_point():
            raise TypeError(f"inputs must be floating point, got {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self._sum.shape[0]:
            raise ValueError(f"inputs must have {self._sum.shape[0]} features, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return
        product = torch.zeros_like(self._sum, device=x.device)
        for chunk in rows.split(_CHUNK_TOKENS):
            chunk = chunk.float()
            product.addmm_(chunk.T, chunk)
        if not bool(product.diagonal().isfinite().all()):
            raise ValueError("inputs hold NaN, infinite or overflowing values: X^T X would be useless")
        self._sum += product.to(self._sum.device)
        self.tokens += rows.shape[0]

    def merge(self, other: "HessianAccumulator") -> None:
        """Add what another accumulator of the same layer inputs has seen."""
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    def clone(self) -> "HessianAccumulator":
        """An independent accumulator that has seen the same."""
        copy = HessianAccumulator(self.in_features, self.device)
        copy.merge(self)
        return copy

    @property
    def in_features(self) -> int:
        """Rows and columns of the sum."""
        return self._sum.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the sum lives."""
        return self._sum.device

    def value(self) -> Tensor:
        """X^T X over all inputs so far: a new [in_features, in_features] float32 tensor."""
        return self._sum.clone()


def check_hessian(hessian: Tensor, in_features: int) -> None:
    """Raise unless `hessian` can be the X^T X of a layer with `in_features` inputs.

    Raises:
        ValueError: if it is not a finite, symmetric [in_features, in_features] matrix with a non-negative diagonal.
        TypeError: if it is not a floating point tensor.
    """
    if not isinstance(hessian, Tensor) or not hessian.is_floating_point():
        found = hessian.dtype if isinstance(hessian, Tensor) else type(hessian).__name__
        raise TypeError(f"hessian must be a floating point tensor, got {found}")
    if hessian.shape != (in_features, in_features):
        raise ValueError(
            f"hessian must be X^T X of the layer's inputs, of shape {(in_features, in_features)}, "
            f"got {tuple(hessian.shape)}"
        )
    if not bool(hessian.isfinite().all()):
        raise ValueError("hessian holds NaN or infinite values: check the calibration inputs")
    if hessian.numel() and float((hessian - hessian.T).abs().max()) > _SYMMETRY_TOLERANCE * float(hessian.abs().max()):
        raise ValueError("hessian is not symmetric: pass X^T X as HessianAccumulator.value() returns it")
    if bool((hessian.diagonal() < 0).any()):
        raise ValueError("hessian has a negative diagonal entry: X^T X is positive semidefinite")


def regularize(hessian: Tensor | None) -> Tensor | None:
    """The float32 metric of the search, [I, I], scaled to a mean diagonal of 1; None for the identity."""
    if hessian is None:
        return None
    wide = hessian.detach().double()
    mean = float(wide.diagonal().mean())
    if mean == 0:  # nothing was seen: every input counts the same
        return None
    metric = ((wide + wide.T) / (2 * mean)).float()
    metric.diagonal().add_(_RIDGE)
    return metric


def no_coupling(groups: int, group: int, device: torch.device) -> Coupling:
    """Groups that do not interact: the metric is the identity."""
    return Coupling(torch.eye(group, device=device).repeat(groups, 1, 1), None, causal=True)


def descent_coupling(metric: Tensor, group: int) -> Coupling:
    """Coordinate descent on the metric [I, I] itself: what one group should be, the others being as they are."""
    feedback = metric.clone()
    blocks = _diagonal_blocks(feedback, group)
    own = blocks.clone()
    blocks.zero_()
    return Coupling(own, feedback, causal=False)


def feedback_coupling(metric: Tensor, group: int, damping: float) -> Coupling:
    """Error feedback: what one group should be if all later ones will make up for it as well as they can.

    `damping` is added to the diagonal, half of it as such (a fraction of the mean diagonal, which is 1), half as a
    fraction of each diagonal entry: a fraction of the mean alone would drown inputs that vary little.
    With the damped metric R R^T, R upper triangular, a row's cost is the sum over groups j of e~_j D_j e~_j^T, where
    e~_j = e_j + sum over i < j of e_i R_ij R_jj^-1 and D_j = R_jj R_jj^T.

    Raises:
        ValueError: if the damped metric is not positive definite.
    """
    damped = metric.double()
    damped.diagonal().mul_(1 + damping / 2).add_(damping / 2)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) != 0:
        raise ValueError(
            "hessian is not positive semidefinite: pass X^T X of real inputs, or a SolverConfig with more damping "
            f"(now {damping})"
        )
    upper = lower.flip(0, 1).contiguous()  # LAPACK's result has its columns in sequence
    factors = _diagonal_blocks(upper, group)
    coupled = (upper.view(len(upper), -1, group).transpose(0, 1) @ factors.mT).transpose(0, 1).reshape(upper.shape)
    blocks = _diagonal_blocks(coupled, group)
    own = blocks.float()
    blocks.zero_()
    return Coupling(own, coupled.float(), causal=True)


def _diagonal_blocks(matrix: Tensor, group: int) -> Tensor:
    """View [I / group, group, group] of the diagonal blocks of a contiguous square matrix."""
    assert matrix.is_contiguous()
    size = matrix.shape[0]
    return matrix.as_strided((size // group, group, group), (group * (size + 1), size, 1), matrix.storage_offset())
