"""quantize_layer: one weight matrix to codes, codebooks and scales.

K-means codebooks, first codes by error feedback, then rounds of codebook update (conjugate gradients), scale update
(closed form) and code search (coordinate descent). This replaces the Adam steps and the beam search over random groups
of the official code (AQLM, arXiv 2401.06118) by exact steps on the same objective, tr(dW H dW^T).

The result depends on the seed, the inputs and the device, not on the time of day: on the CPU the same inputs give the
same bits from run to run. Threads split only rows that do not interact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.codes import indices_to_codes
from aqlm_tensor.quantizer.hessian import check_hessian, descent_coupling, feedback_coupling, no_coupling, regularize
from aqlm_tensor.quantizer.init import initial_codebooks
from aqlm_tensor.quantizer.parallel import full_precision, one_thread_per_operation
from aqlm_tensor.quantizer.refine import refine_codebooks, refine_scales, row_errors
from aqlm_tensor.quantizer.search import Coupling, gather, sweep
from aqlm_tensor.quantizer.solver import SolverConfig
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["QuantizedLayer", "quantize_layer"]


_FRESH_SHARE = 0.7  # of the rounds choose all codes afresh before local search takes over (of 0.5 to 0.9 the best)
_OVERSTEP = 1.5  # past the best codebooks for the present codes: worth about a third of the rounds


@dataclass(frozen=True)
class QuantizedLayer:
    """A weight in the AQLM format, and how well it fits.

    Attributes:
        codes: stored signed codes, [O / H, I / G, K], int8 or int16.
        codebooks: [K, 2^N, H, G] float32, representable in the dtype asked for.
        scales: [O / H, 1, 1, 1] float32, likewise.
        errors: tr(dW H dW^T) / tr(W H W^T) after the initialisation and after each round.
        error: the same of the stored result, the best of them.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    errors: tuple[float, ...]
    error: float

    @property
    def init_error(self) -> float:
        """The relative weighted error right after the initialisation."""
        return self.errors[0]


@dataclass
class _State:
    """Codebooks [K, S, H, G], scales [R], indices [R, J, K] and the row errors [R] they give."""

    codebooks: Tensor
    scales: Tensor
    indices: Tensor
    row_errors: Tensor


@torch.no_grad()
def quantize_layer(
    weight: Tensor,
    scheme: AQLMScheme,
    *,
    hessian: Tensor | None = None,
    solver: SolverConfig = SolverConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> QuantizedLayer:
    """Quantize a weight so that tr((W - What) H (W - What)^T) is small.

    Args:
        weight: [O, I], floating point, finite; left alone.
        scheme: the format; its groups must divide the weight.
        hessian: H = X^T X of the layer's inputs, [I, I]; None weighs every input the same (data-free).
        solver: effort.
        seed: of the initialisation.
        dtype: what codebooks and scales will be stored in; they are rounded to it before each code search. None keeps
            float32.
        on_progress: called with (round, relative error) after the initialisation (round 0) and each round.

    Raises:
        ValueError: if weight or hessian are not finite, have wrong shapes, or the groups do not divide the weight.
        TypeError: if an argument has the wrong type.
    """
    _check(weight, scheme, hessian, solver, dtype)
    with one_thread_per_operation(), full_precision():
        return _solve(weight, scheme, hessian, solver, seed, dtype, on_progress)


def _solve(
    weight: Tensor,
    scheme: AQLMScheme,
    hessian: Tensor | None,
    solver: SolverConfig,
    seed: int,
    dtype: torch.dtype | None,
    on_progress: Callable[[int, float], None] | None,
) -> QuantizedLayer:
    problem = _Problem(weight, scheme, hessian, solver, dtype or torch.float32)
    generator = torch.Generator().manual_seed(seed)
    state = problem.initialize(generator)
    errors = [problem.relative(state)]
    report = on_progress or (lambda _round, _error: None)
    report(0, errors[0])
    best = state
    fresh = int(_FRESH_SHARE * solver.max_rounds) if problem.metric is not None else 0
    for number in range(1, solver.max_rounds + 1):
        state = problem.improve(state, afresh=number <= fresh, last=number == solver.max_rounds)
        errors.append(problem.relative(state))
        report(number, errors[-1])
        if errors[-1] < problem.relative(best):
            best = state
        if number > fresh and errors[-2] - errors[-1] <= solver.relative_tolerance * errors[-2]:
            break
    return problem.result(best, errors)


def _check(
    weight: Tensor, scheme: AQLMScheme, hessian: Tensor | None, solver: SolverConfig, dtype: torch.dtype | None
) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating point tensor, got {found}")
    if not isinstance(scheme, AQLMScheme):
        raise TypeError(f"scheme must be an AQLMScheme, got {scheme!r}: use AQLMScheme.parse('2x8g8')")
    if not isinstance(solver, SolverConfig):
        raise TypeError(f"solver must be a SolverConfig, got {type(solver).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating point torch.dtype or None, got {dtype!r}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be a non-empty matrix [out_features, in_features], got {tuple(weight.shape)}")
    reason = scheme.why_not(*weight.shape)
    if reason is not None:
        raise ValueError(f"scheme {scheme} does not fit a weight of shape {tuple(weight.shape)}: {reason}")
    if not bool(weight.float().isfinite().all()):
        raise ValueError("weight holds NaN or infinite values, or values beyond float32")
    if dtype is not None and float(weight.abs().amax()) > torch.finfo(dtype).max:
        raise ValueError(f"weight holds values beyond the range of {dtype}: store the codebooks in another dtype")
    if hessian is not None:
        check_hessian(hessian, weight.shape[1])


class _Problem:
    """What stays the same over the rounds: the weight as [R, H, I], its row weights, the metric and its couplings.

    Groups are ordered by falling weight of their inputs, so that error feedback ends with those that matter least.
    """

    def __init__(
        self, weight: Tensor, scheme: AQLMScheme, hessian: Tensor | None, solver: SolverConfig, dtype: torch.dtype
    ) -> None:
        self.scheme, self.solver, self.dtype = scheme, solver, dtype
        group = scheme.in_group_size
        metric = regularize(None if hessian is None else hessian.to(weight.device))
        if metric is None:
            self.metric, self.order = None, torch.arange(weight.shape[1] // group, device=weight.device)
            columns = torch.arange(weight.shape[1], device=weight.device)
            self.feedback = self.descent = no_coupling(len(self.order), group, weight.device)
        else:
            self.order = metric.diagonal().view(-1, group).sum(1).argsort(descending=True, stable=True)
            columns = (self.order[:, None] * group + torch.arange(group, device=weight.device)).flatten()
            self.metric = metric = metric[columns][:, columns].contiguous()
            self.feedback = feedback_coupling(self.metric, group, solver.damping)
            self.descent = descent_coupling(self.metric, group)
        wide = weight.detach().float()[:, columns].view(-1, scheme.out_group_size, weight.shape[1])
        self.unit = torch.ldexp(torch.ones(()), wide.abs().amax().frexp().exponent.cpu()).to(weight.device)
        self.weight = wide / self.unit
        self.total = float(row_errors(self.weight, self.metric).sum())

    def initialize(self, generator: torch.Generator) -> _State:
        """K-means codebooks and codes by error feedback."""
        scales = self.weight.square().mean((1, 2)).sqrt()
        target = self._target(scales)
        codebooks = initial_codebooks(
            target,
            scales.square(),
            self.feedback.metric if self.metric is not None else self.feedback.metric[:1],
            self.scheme.codebooks_shape,
            self.solver.kmeans_iterations,
            generator,
        )
        return self._state(codebooks, scales, None, self.feedback)

    def improve(self, state: _State, *, afresh: bool, last: bool) -> _State:
        """One round: codebooks, scales, and codes, either `afresh` by error feedback or starting from the present."""
        best = refine_codebooks(
            self._target(state.scales),
            state.scales.square(),
            state.indices,
            state.codebooks,
            self.metric,
            self.solver.conjugate_gradient_steps,
        )
        codebooks = best if last else torch.lerp(state.codebooks, best, _OVERSTEP)
        scales = refine_scales(self.weight, gather(codebooks, state.indices), state.scales, self.metric)
        start, coupling = (None, self.feedback) if afresh else (state.indices, self.descent)
        return self._state(codebooks, scales, start, coupling)

    def relative(self, state: _State) -> float:
        """Weighted error of a state relative to that of the zero matrix."""
        error = float(state.row_errors.sum())
        return error / self.total if self.total > 0 else error

    def result(self, state: _State, errors: list[float]) -> QuantizedLayer:
        """The state as stored, groups back in their places."""
        indices = torch.empty_like(state.indices)
        indices[:, self.order] = state.indices
        codes = indices_to_codes(indices, self.scheme.nbits_per_codebook)
        scales = (state.scales * self.unit).view(-1, 1, 1, 1)
        return QuantizedLayer(codes, state.codebooks, scales, tuple(errors), self.relative(state))

    def _target(self, scales: Tensor) -> Tensor:
        return self.weight / torch.where(scales > 0, scales, torch.ones_like(scales))[:, None, None]

    def _state(self, codebooks: Tensor, scales: Tensor, indices: Tensor | None, coupling: Coupling) -> _State:
        """Round codebooks and scales to what will be stored, then choose the codes for them."""
        codebooks = codebooks.to(self.dtype).float()
        scales = (scales * self.unit).to(self.dtype).float() / self.unit
        indices = sweep(self._target(scales), indices, codebooks, coupling, self.solver.beam_width)
        error = self.weight - scales[:, None, None] * gather(codebooks, indices)
        return _State(codebooks, scales, indices, row_errors(error, self.metric))
