"""X^T X of a layer's inputs: accumulating it, checking it, and the two ways in which the code search uses it."""

import math

import torch
from torch import Tensor

from aqlm_tensor.quantizer.parallel import full_precision
from aqlm_tensor.quantizer.search import Coupling, diagonal_blocks
from aqlm_tensor.ranks import Ranks

__all__ = ["HessianAccumulator", "check_hessian", "descent_coupling", "feedback_coupling", "no_coupling", "regularize"]

_CHUNK_TOKENS = 8192
_AT_ONCE = 512  # rows or columns of a matrix that are widened or compared at a time
_SYMMETRY_TOLERANCE = 1e-4  # of the largest entry; float32 sums of half-precision inputs stay far below
_RIDGE = 1e-6  # of the mean diagonal: weights of dead inputs are kept close to their values


class HessianAccumulator:
    """Streams X^T X over batches of a layer's inputs.

    The product of a batch is float32, the sum of batches float64. So their order does not show: whichever processes
    added them, the float32 value has the same bits (but where the sum lies within some 1e-16 of the middle between two
    float32 numbers). Memory is one [I, I] float64 matrix, and a float32 one while a batch is added.

    Args:
        in_features: I, the layer's input features.
        device: where the sum lives; inputs elsewhere are multiplied where they are and the product is moved.

    Attributes:
        tokens: rows of X seen so far.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.in_features = in_features
        self.device = torch.empty(0, device=device).device
        self.tokens = 0
        self._sum: Tensor | None = None  # float32, and never changed in place, while it holds no more than one product

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
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"inputs must have {self.in_features} features, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return
        if self._sum is not None:
            self._sum = self._wide()  # before there is a product beside it
        product = torch.zeros(self.in_features, self.in_features, device=x.device, dtype=torch.float32)
        with full_precision():
            for chunk in rows.split(_CHUNK_TOKENS):
                chunk = chunk.float()
                product.addmm_(chunk.T, chunk)
        if not bool(product.diagonal().isfinite().all()):
            raise ValueError("inputs hold NaN, infinite or overflowing values: X^T X would be useless")
        self._add(product.to(self.device), rows.shape[0])

    def merge(self, other: "HessianAccumulator") -> None:
        """Add what another accumulator of the same layer inputs has seen."""
        if other._sum is not None:
            self._add(other._sum.to(self.device), other.tokens)

    def _add(self, product: Tensor, tokens: int) -> None:
        if self._sum is None and product.dtype == torch.float32:
            self._sum = product
        else:
            self._sum = self._wide().add_(product)
        self.tokens += tokens

    def _wide(self) -> Tensor:
        """The sum in float64, to be changed in place."""
        if self._sum is None:
            return torch.zeros(self.in_features, self.in_features, dtype=torch.float64, device=self.device)
        return self._sum.double()

    def clone(self) -> "HessianAccumulator":
        """An independent accumulator that has seen the same."""
        copy = HessianAccumulator(self.in_features, self.device)
        copy.merge(self)
        return copy

    def add_up(self, ranks: Ranks) -> None:
        """Take in what the same accumulator has seen on the other ranks; all have to call this."""
        tokens = torch.tensor(self.tokens, device=self.device)
        ranks.add_up(tokens)
        self.tokens = int(tokens)
        if self.tokens and ranks.size > 1:
            self._sum = self._wide()
            ranks.add_up(self._sum)

    def value(self) -> Tensor:
        """X^T X over all inputs so far: a new [in_features, in_features] float32 tensor."""
        return self._wide().float()

    def narrowed(self) -> Tensor:
        """The same without a copy, to be left alone; the sum is rounded to it, which halves its memory."""
        self._sum = self.value() if self._sum is None else self._sum.float()
        return self._sum


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
    if in_features == 0:
        return
    least, most = (float(extreme) for extreme in hessian.aminmax())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError("hessian holds NaN or infinite values: check the calibration inputs")
    pairs = zip(hessian.split(_AT_ONCE), hessian.split(_AT_ONCE, 1), strict=True)
    if max(float((rows - columns.T).abs().max()) for rows, columns in pairs) > _SYMMETRY_TOLERANCE * max(-least, most):
        raise ValueError("hessian is not symmetric: pass X^T X as HessianAccumulator.value() returns it")
    if bool((hessian.diagonal() < 0).any()):
        raise ValueError("hessian has a negative diagonal entry: X^T X is positive semidefinite")


def regularize(hessian: Tensor | None) -> Tensor | None:
    """The float32 metric of the search, [I, I], scaled to a mean diagonal of 1; None for the identity."""
    if hessian is None:
        return None
    mean = float(hessian.diagonal().double().mean())
    if mean == 0:  # nothing was seen: every input counts the same
        return None
    metric = torch.empty(hessian.shape, dtype=torch.float32, device=hessian.device)
    parts = zip(metric.split(_AT_ONCE), hessian.split(_AT_ONCE), hessian.split(_AT_ONCE, 1), strict=True)
    for part, rows, columns in parts:
        part.copy_((rows.double() + columns.T) / (2 * mean))
    metric.diagonal().add_(_RIDGE)
    return metric


def no_coupling(groups: int, group: int, device: torch.device) -> Coupling:
    """Groups that do not interact: the metric is the identity."""
    return Coupling(torch.eye(group, device=device).repeat(groups, 1, 1), None, causal=True)


def descent_coupling(metric: Tensor, group: int) -> Coupling:
    """Coordinate descent on the metric [I, I] itself: what one group should be, the others being as they are.

    It holds the metric, not a copy.
    """
    return Coupling(diagonal_blocks(metric, group).clone(), metric, causal=False)


def feedback_coupling(metric: Tensor, group: int, damping: float) -> Coupling:
    """Error feedback: what one group should be if all later ones will make up for it as well as they can.

    `damping` is added to the diagonal, half of it as such (a fraction of the mean diagonal, which is 1), half as a
    fraction of each diagonal entry: a fraction of the mean alone would drown inputs that vary little.
    With the damped metric R R^T, R upper triangular, a row's cost is the sum over groups j of e~_j D_j e~_j^T, where
    e~_j = e_j + sum over i < j of e_i R_ij R_jj^-1 and D_j = R_jj R_jj^T.

    Beyond the metric it needs three times its memory: for the result, and for the factor in float64.

    Raises:
        ValueError: if the damped metric is not positive definite.
    """
    lower = _factor(metric, damping)
    coupled, own = torch.empty_like(metric), torch.empty(len(metric) // group, group, group, device=metric.device)
    width = group * -(-_AT_ONCE // group)
    for start, part in zip(range(0, len(metric), width), coupled.split(width, 1), strict=True):
        stop = start + part.shape[1]
        upper = lower[:, len(lower) - stop : len(lower) - start].flip(0, 1).contiguous()  # these columns of R
        factors = diagonal_blocks(upper[start:stop], group)
        products = (upper.view(len(upper), -1, group).transpose(0, 1) @ factors.mT).transpose(0, 1).reshape(upper.shape)
        own[start // group : stop // group] = diagonal_blocks(products[start:stop], group)
        part.copy_(products)
    return Coupling(own, coupled, causal=True)


def _factor(metric: Tensor, damping: float) -> Tensor:
    """The lower triangular Cholesky factor, in float64, of the damped metric with rows and columns reversed."""
    damped = metric.flip(0, 1).double()
    damped.diagonal().mul_(1 + damping / 2).add_(damping / 2)
    lower = damped.T  # LAPACK's result has its columns in sequence: so it takes the place of the matrix
    info = torch.empty(0, dtype=torch.int32, device=metric.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info) != 0:
        raise ValueError(
            "hessian is not positive semidefinite: pass X^T X of real inputs, or a SolverConfig with more damping "
            f"(now {damping})"
        )
    return lower
