"""The V step of PV-tuning: choose codes again, of the few rows where that lowers the loss of the whole model most.

PV-tuning (Malinovskii et al. 2024, arXiv 2405.14852, section 3.2) moves the dense weight along its Adam-normalised
gradient and projects the largest changes back onto what codes can express. At 2 bits neighbouring sums of entries are
far apart, and groups of a row that all answer the same gradient overshoot together: tried here, that raised the loss as
often as it lowered it. So the gradient G of the dense weight W is joined by a curvature, Kronecker-factored as in K-FAC
(Martens and Grosse 2015, arXiv 1503.05671), and the loss is modelled, row o by row o, as

    G_o d + damping / 2 * s_o * d X^T X d^T        d the change of the row, s_o the power of its output's gradient

which is what the layer solver minimises: its sweep of coordinate descent, couplings between groups included, takes the
step. The model knows nothing of how rows and layers depend on one another; so only the rows with the largest gain of
all layers are changed, and the damping is that of a trust region: a step that does not lower the loss of batches which
had no part in it is undone and tried again with more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aqlm_tensor.codes import codes_to_indices, indices_to_codes
from aqlm_tensor.kernels import ops
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.pv.config import PVConfig
from aqlm_tensor.pv.rows import Rows
from aqlm_tensor.quantizer.hessian import descent_coupling
from aqlm_tensor.quantizer.parallel import one_thread_per_operation
from aqlm_tensor.quantizer.search import Coupling, gather, sweep
from aqlm_tensor.ranks import Ranks

__all__ = ["CURVATURE_PASSES", "FIRST_DAMPING", "LossModel", "Parts", "choose_codes", "next_choice"]

FIRST_DAMPING = 64.0  # the power of gradients understates the curvature where the loss is small
_TRIES = 4  # of one V step
_MORE = 2.0  # times as much damping in each
_RIDGE = 0.1  # added to X^T X, of its mean diagonal: few tokens leave directions that only seem flat
_LEAST_POWER = 1e-2  # of the mean over rows, for rows whose outputs hardly matter
CURVATURE_PASSES = 4  # that the curvature is taken from
_BEAM = 8  # entries kept of the first of two codebooks, where codebooks are too large to try all pairs


@dataclass(frozen=True)
class Parts:
    """A quantized weight: codes [O/H, I/G, K], codebooks [K, 2^N, H, G] or [P, K, ...], scales [O/H, 1, 1, 1].

    If it is sharded, codes and scales are those of `rows`.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    rows: Rows = field(default_factory=Rows)


class LossModel:
    """What passes through the model tell about one weight [O, I]: its gradient, and the factors of its curvature.

    Memory: 4 bytes for each of the O * I weights and the I * I entries of X^T X.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        self._gradient = torch.zeros(out_features, in_features, device=device)
        self._inputs = torch.zeros(in_features, in_features, device=device)
        self._power = torch.zeros(out_features, device=device)
        self._passes = torch.zeros((), device=device)  # on the device: a replayed pass counts, too
        self._curvature_passes = 0

    @staticmethod
    def bytes_for(out_features: int, in_features: int) -> int:
        """How much memory one takes."""
        return 4 * (out_features * in_features + in_features * in_features + out_features)

    def learn(self, x: Tensor, gradient: Tensor, output_gradient: Tensor) -> None:
        """Learn from a backward pass: x [M, I], gradients of the weight [O, I] and of its product with x [M, O]."""
        self._gradient += gradient
        self._passes += 1
        if self._curvature_passes < CURVATURE_PASSES:
            self._curvature_passes += 1
            rows = x.float()
            self._inputs.addmm_(rows.T, rows)
            self._power += output_gradient.float().square().sum(0)

    def add_up(self, ranks: Ranks) -> None:
        """Take in what the same model has learned on the other ranks; all have to call this."""
        count = torch.full_like(self._passes, self._curvature_passes)
        for tensors in ([self._gradient], [self._inputs], [self._power, self._passes, count]):
            ranks.add_up_together(tensors)
        self._curvature_passes = int(count)

    def factors(self, out_group: int, rows: Rows) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mean gradient [O, I], metric [I, I] of mean diagonal about 1, and the power of each row group in its units.

        Gradient and power are those of some rows. None if nothing was seen, or nothing that matters.
        """
        if not self._curvature_passes:
            return None
        size = self._inputs.diagonal().mean()
        power = self._power.view(-1, out_group).mean(1) * (size / self._curvature_passes**2)
        if not (float(size) > 0 and float(power.mean()) > 0 and bool(power.isfinite().all())):
            return None
        metric = self._inputs / size
        metric.diagonal().add_(_RIDGE)
        power = power.clamp_min(_LEAST_POWER * power.mean())[rows.of(len(power))]
        return self._gradient[rows.of(len(self._gradient))] / self._passes, metric, power


class _Choice:
    """The codes of one weight: how they are, and what the model of the loss asks for."""

    def __init__(self, parts: Parts, factors: tuple[Tensor, Tensor, Tensor], config: PVConfig) -> None:
        self.parts, self.config = parts, config
        height, group = parts.codebooks.shape[-2:]
        self.nbits = (parts.codebooks.shape[-3] - 1).bit_length()
        gradient, self.metric, self.power = factors
        newton = torch.cholesky_solve(gradient.T, torch.linalg.cholesky(self.metric)).T
        self.gradient = gradient.view(len(self.power), height, -1)
        self.newton = newton.reshape(self.gradient.shape) / self.power[:, None, None]
        self.dense = ops.dequantize(parts.codes, parts.codebooks, parts.scales).view(self.gradient.shape)
        self.farthest = config.trust_ratio**2 * parts.rows.whole(self.dense.square().flatten(1).sum(1)).sum()
        self.coupling = descent_coupling(self.metric, group)
        self.stored = parts.codes.clone()
        self.old = codes_to_indices(parts.codes, self.nbits)

    def propose(self, damping: float) -> None:
        """Find new codes, and for each row of all ranks how many groups change and what is gained.

        No gain means that it must not change. `bounded` tells whether the trust ratio kept a row from a gain.
        """
        scales = self.parts.scales.view(-1, 1, 1)
        target = (self.dense - self.newton / damping) / torch.where(scales != 0, scales, torch.ones_like(scales))
        self.new, change = _swept(target, self.old, self.parts.codebooks, self.coupling)
        change *= scales
        gain = -(self.gradient * change).flatten(1).sum(1)
        gain -= 0.5 * damping * self.power * ((change @ self.metric) * change).flatten(1).sum(1)
        whole = self.parts.rows.whole
        self.groups, gain = whole((self.new != self.old).any(-1).sum(1)), whole(gain)
        order = gain.argsort(descending=True, stable=True)
        sizes = whole(change.flatten(1).square().sum(1))[order].cumsum(0)
        gain[self.groups == 0] = 0
        too_far = order[sizes > self.farthest]
        self.bounded = bool((gain[too_far] > 0).any())
        gain[too_far] = 0
        self.gain = gain

    def make(self, least: float) -> int:
        """Give rows that gain more than so much their new codes, the others their old ones; groups that change."""
        chosen = self.gain > least
        own = chosen[self.parts.rows.of(len(chosen))]
        self.parts.codes.copy_(self.stored)
        self.parts.codes[own] = indices_to_codes(self.new[own], self.nbits)
        return int(self.groups[chosen].sum())


def _swept(target: Tensor, old: Tensor, codebooks: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
    """New indices for a target [R, H, I] in units of the scales, and how much the sums of entries change."""
    new, change = old.clone(), torch.zeros_like(target)
    books = partitioned(codebooks)
    rows = len(target) // len(books)
    for number, own in enumerate(books):
        part = slice(number * rows, (number + 1) * rows)
        new[part] = sweep(target[part], old[part], own, coupling, _BEAM)
        change[part] = gather(own, new[part]) - gather(own, old[part])
    return new, change


def _threshold(choices: Sequence[_Choice], groups: float) -> float:
    """The gain above which rows change at most so many groups together."""
    gains = torch.cat([choice.gain.cpu() for choice in choices])
    counts = torch.cat([choice.groups.cpu() for choice in choices])
    order = gains.argsort(descending=True, stable=True)
    first_left_out = int((counts[order].cumsum(0) <= groups).sum())
    return max(0.0, float(gains[order[first_left_out]]) if first_left_out < len(order) else 0.0)


def next_choice(changed: Sequence[float]) -> tuple[int, int]:
    """Which round chooses codes next, and how many have.

    A choice of codes takes longer than the steps of a round. After one that was undone, the next comes after twice as
    many rounds as that one did.

    Args:
        changed: of each round so far, the share of groups with other codes afterwards.
    """
    due, wait, made = 0, 1, 0
    for number, share in enumerate(changed):
        if number == due:
            wait = 1 if share else 2 * wait
            due, made = number + wait, made + 1
    return due, made


@torch.no_grad()
def choose_codes(
    weights: Sequence[tuple[Parts, LossModel]], config: PVConfig, damping: float, loss: Callable[[], float]
) -> tuple[int, float]:
    """Change codes in place so that the loss falls, or leave them.

    Args:
        weights: the weights and what is known about them.
        config: `code_fraction` bounds the changes of all weights together, `trust_ratio` those of each.
        damping: to try first.
        loss: measures the model as it is.

    Returns:
        How many groups have other codes than before, and the damping for the next time.
    """
    with one_thread_per_operation():
        known = [(parts, model.factors(parts.codebooks.shape[-2], parts.rows)) for parts, model in weights]
        choices = [_Choice(parts, factors, config) for parts, factors in known if factors is not None]
    if not choices:
        return 0, damping
    most = config.code_fraction * sum(choice.old[..., 0].numel() * choice.parts.rows.count for choice in choices)
    before = loss()
    for attempt in range(_TRIES):
        with one_thread_per_operation():
            for choice in choices:
                choice.propose(damping)
        least = _threshold(choices, most)
        changed = sum(choice.make(least) for choice in choices)
        if changed == 0 and not any(choice.bounded for choice in choices):
            return 0, damping / _MORE  # so much damping that nothing is worth a change
        if changed and loss() < before:
            return changed, damping / (2 if attempt == 0 else 1)
        damping *= _MORE
    for choice in choices:
        choice.make(float("inf"))
    return 0, damping / _MORE
