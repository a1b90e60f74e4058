"""The V step of PV-tuning: choose codes again, of the few rows where that lowers the loss of the whole model most.

PV-tuning (Malinovskii et al. 2024, arXiv 2405.14852, section 3.2) moves the dense weight along its Adam-normalised
gradient and projects the largest changes back onto what codes can express. At 2 bits neighbouring sums of entries are
far apart, and groups of a row that all answer the same gradient overshoot together: tried here, that raised the loss as
often as it lowered it. So the gradient G of the dense weight W is joined by a curvature, Kronecker-factored as in K-FAC
(Martens and Grosse 2015, arXiv 1503.05671), and the loss is modelled, row o by row o, as

    G_o d + damping / 2 * s_o * d X^T X d^T        d the change of the row, s_o the power of its output's gradient

which is what the layer solver minimises: its sweep of coordinate descent, couplings between groups included, takes the
step. Rows with the largest gain are kept, as many as `code_fraction` and `trust_ratio` allow. Damping is that of a
trust region: a step that raises the loss of batches which did not take part is undone and tried again with more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_tensor.codes import codes_to_indices, indices_to_codes
from aqlm_tensor.kernels import ops
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.pv_config import PVConfig
from aqlm_tensor.quantizer.hessian import descent_coupling
from aqlm_tensor.quantizer.parallel import one_thread_per_operation
from aqlm_tensor.quantizer.search import gather, sweep

__all__ = ["FIRST_DAMPING", "LossModel", "Parts", "choose_codes"]

FIRST_DAMPING = 32.0
_TRIES = 4  # of one V step
_FACTOR = 2.0  # from one damping to the next
_RIDGE = 0.1  # added to X^T X, of its mean diagonal: few tokens leave directions that only seem flat
_LEAST_POWER = 1e-2  # of the mean over rows, for rows whose outputs hardly matter
_CURVATURE_PASSES = 4  # forward and backward passes that the curvature is taken from
_BEAM = 8  # entries kept of the first of two codebooks, where codebooks are too large to try all pairs


@dataclass(frozen=True)
class Parts:
    """A quantized weight: codes [O/H, I/G, K], codebooks [K, 2^N, H, G] or [P, K, ...], scales [O/H, 1, 1, 1]."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor


class LossModel:
    """What passes through the model tell about one weight [O, I]: its gradient, and the factors of its curvature.

    Memory: 4 bytes for each of the O * I weights and the I * I entries of X^T X.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        self._gradient = torch.zeros(out_features, in_features, device=device)
        self._inputs = torch.zeros(in_features, in_features, device=device)
        self._power = torch.zeros(out_features, device=device)
        self._passes = self._input_passes = self._output_passes = 0

    @staticmethod
    def bytes_for(out_features: int, in_features: int) -> int:
        """How much memory one takes."""
        return 4 * (out_features * in_features + in_features * in_features + out_features)

    def watch(self, x: Tensor, weight: Tensor, y: Tensor) -> None:
        """Learn from a product y [..., O] of x [..., I] and the dense weight, now and when gradients reach it.

        Activations that are computed again in the backward pass count twice, in sums and numbers alike.
        """
        weight.register_hook(self._add_gradient)
        if self._input_passes < _CURVATURE_PASSES:
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            self._inputs.addmm_(rows.T, rows)
            self._input_passes += 1
        if self._output_passes < _CURVATURE_PASSES:
            y.register_hook(self._add_power)

    def _add_gradient(self, gradient: Tensor) -> None:
        self._gradient += gradient.detach()
        self._passes += 1

    def _add_power(self, gradient: Tensor) -> None:
        self._power += gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(0)
        self._output_passes += 1

    def factors(self, out_group: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mean gradient [O, I], metric [I, I] of mean diagonal about 1, and the power of each row group in its units.

        None if nothing was seen, or nothing that matters.
        """
        if not (self._passes and self._output_passes):
            return None
        size = self._inputs.diagonal().mean()
        power = self._power.view(-1, out_group).mean(1) * (size / self._input_passes / self._output_passes)
        if not (float(size) > 0 and float(power.mean()) > 0 and bool(power.isfinite().all())):
            return None
        metric = self._inputs / size
        metric.diagonal().add_(_RIDGE)
        return self._gradient / self._passes, metric, power.clamp_min(_LEAST_POWER * power.mean())


class _Choice:
    """The codes of one weight: how they were, and which the model of the loss asks for."""

    def __init__(self, parts: Parts, model: LossModel, config: PVConfig) -> None:
        self.parts, self.config = parts, config
        self.height, self.group = parts.codebooks.shape[-2:]
        self.nbits = (parts.codebooks.shape[-3] - 1).bit_length()
        self.old = codes_to_indices(parts.codes, self.nbits)
        self.changed = 0
        self._undo: tuple[Tensor, Tensor] | None = None
        factors = model.factors(self.height)
        self.useful = factors is not None
        if factors is None:
            return
        gradient, self.metric, self.power = factors
        self.gradient = gradient.view(len(self.power), self.height, -1)
        newton = torch.cholesky_solve(gradient.T, torch.linalg.cholesky(self.metric)).T
        self.step = newton.reshape(self.gradient.shape) / self.power[:, None, None]
        self.scales = parts.scales.view(-1, 1, 1)
        self.dense = ops.dequantize(parts.codes, parts.codebooks, parts.scales).view(self.gradient.shape)
        self.coupling = descent_coupling(self.metric, self.group)

    def make(self, damping: float) -> None:
        """Change codes in place."""
        usable = self.scales != 0
        target = (self.dense - self.step / damping) / torch.where(usable, self.scales, torch.ones_like(self.scales))
        new, change = self.old.clone(), torch.zeros_like(target)
        books = partitioned(self.parts.codebooks)
        rows = len(target) // len(books)
        for number, own in enumerate(books):
            part = slice(number * rows, (number + 1) * rows)
            new[part] = sweep(target[part], self.old[part], own, self.coupling, _BEAM)
            change[part] = gather(own, new[part]) - gather(own, self.old[part])
        self._accept(new, change.mul_(self.scales), damping)

    def _accept(self, new: Tensor, change: Tensor, damping: float) -> None:
        """Keep the rows with the largest gain."""
        gain = -(self.gradient * change).flatten(1).sum(1)
        gain -= 0.5 * damping * self.power * ((change @ self.metric) * change).flatten(1).sum(1)
        different = (new != self.old).any(-1)
        order = gain.argsort(descending=True, stable=True)
        groups = different[order].sum(1).cumsum(0)
        sizes = change.flatten(1).square().sum(1)[order].cumsum(0)
        fits = (groups <= self.config.code_fraction * different.numel()) & (
            sizes <= self.config.trust_ratio**2 * self.dense.square().sum()
        )
        rows = order[fits & (gain[order] > 0)]
        self._undo = (rows, self.parts.codes[rows])
        self.parts.codes[rows] = indices_to_codes(new[rows], self.nbits)
        self.changed = int(different[rows].sum())

    def undo(self) -> None:
        """Put the codes back as they were."""
        assert self._undo is not None
        rows, codes = self._undo
        self.parts.codes[rows] = codes
        self.changed = 0


@torch.no_grad()
def choose_codes(
    weights: Sequence[tuple[Parts, LossModel]], config: PVConfig, damping: float, loss: Callable[[], float]
) -> tuple[int, float]:
    """Change codes in place so that the loss falls, or leave them.

    Args:
        weights: the weights and what is known about them.
        config: `code_fraction` and `trust_ratio` bound the changes of each weight.
        damping: to try first.
        loss: measures the model as it is.

    Returns:
        How many groups have other codes than before, and the damping for the next time.
    """
    with one_thread_per_operation():
        choices = [choice for choice in (_Choice(*weight, config) for weight in weights) if choice.useful]
    if not choices:
        return 0, damping
    before = loss()
    for attempt in range(_TRIES):
        with one_thread_per_operation():
            for choice in choices:
                choice.make(damping)
        changed = sum(choice.changed for choice in choices)
        if changed == 0:  # so much damping that nothing is worth a change
            return 0, damping / _FACTOR
        if loss() < before:
            return changed, damping / (_FACTOR if attempt == 0 else 1)
        for choice in choices:
            choice.undo()
        damping *= _FACTOR
    return 0, damping
