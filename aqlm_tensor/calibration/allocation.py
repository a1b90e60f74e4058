"""Which scheme each layer gets when an average number of bits a weight is given.

Layers that a decoder multiplies with one input (`fuse_`) keep one scheme. For each such group a table says what each
scheme would take and cost (`sensitivity` measures it); the cheapest choice within the budget is a knapsack with one
item per group, solved by dynamic programming, as in HIGGS (Malinovskii et al. 2024, arXiv 2411.17525, section 5). It is
exact up to the rounding of sizes to a 16384th of the bits to spare.

Costs are added over layers as if they did not interact. At 2 bits they do, so the sum ranks choices better than it
predicts their perplexity.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torchao.quantization import FqnToConfig

from aqlm_tensor.config import AQLMWeightConfig

__all__ = ["Allocation", "Choice", "LayerGroup", "check_budget", "choose_schemes"]

_STEPS = 1 << 14  # sizes are rounded to this fraction of the bits that can be spent beyond the least


@dataclass(frozen=True)
class Choice:
    """One scheme for a group of layers.

    Attributes:
        scheme: for example "2x8g8".
        bits: stored bits of the group's weights, codebooks and scales included.
        error: tr(dW H dW^T) / tr(W H W^T) over the group's layers, H = X^T X.
        loss: what it is expected to add to the model's loss, in nats per token.
    """

    scheme: str
    bits: int
    error: float
    loss: float


@dataclass(frozen=True)
class LayerGroup:
    """Layers that get one scheme.

    Attributes:
        fqns: their names.
        weights: how many weights they hold; those of shared tensors count once.
        choices: what they could get, at least one.
    """

    fqns: tuple[str, ...]
    weights: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Allocation:
    """A scheme for each layer.

    Attributes:
        groups: the table it was chosen from.
        chosen: which of its choices each group gets.
        budget: bits a weight that were asked for, on average.
    """

    groups: tuple[LayerGroup, ...]
    chosen: tuple[Choice, ...]
    budget: float

    @property
    def schemes(self) -> dict[str, str]:
        """The scheme of each layer by its name."""
        pairs = zip(self.groups, self.chosen, strict=True)
        return {fqn: choice.scheme for group, choice in pairs for fqn in group.fqns}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight on average, codebooks and scales included."""
        return sum(choice.bits for choice in self.chosen) / sum(group.weights for group in self.groups)

    @property
    def loss(self) -> float:
        """The sum of what the choices are expected to add to the loss, in nats per token."""
        return sum(choice.loss for choice in self.chosen)

    def config(self, base: AQLMWeightConfig) -> FqnToConfig:
        """The config for `quantize_` and `calibrate`: for each layer `base` with the layer's scheme."""
        return FqnToConfig(
            OrderedDict((fqn, replace(base, scheme=scheme)) for fqn, scheme in self.schemes.items())  # pyright: ignore[reportArgumentType]
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "budget": self.budget,
            "bits_per_weight": self.bits_per_weight,
            "loss": self.loss,
            "groups": [
                {"layers": list(group.fqns), "weights": group.weights, "chosen": choice.scheme}
                | {"choices": [asdict(one) for one in group.choices]}
                for group, choice in zip(self.groups, self.chosen, strict=True)
            ],
        }

    def __str__(self) -> str:
        schemes = list(dict.fromkeys(choice.scheme for group in self.groups for choice in group.choices))
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for group, choice in zip(self.groups, self.chosen, strict=True):
            counts["/".join(fqn.rpartition(".")[2] for fqn in group.fqns)][choice.scheme] += 1
        width = max(map(len, counts))
        lines = [f"{'':{width}} " + "".join(f"{scheme:>9}" for scheme in schemes)]
        lines += [
            f"{kind:{width}} " + "".join(f"{by_scheme[scheme] or '-':>9}" for scheme in schemes)
            for kind, by_scheme in counts.items()
        ]
        lines.append(
            f"{self.bits_per_weight:.3f} bits a weight (at most {self.budget:g}), expected to add {self.loss:.3g} nats "
            "a token"
        )
        return "\n".join(lines)


def choose_schemes(groups: Sequence[LayerGroup], bits: float) -> Allocation:
    """Choose a scheme for each group so that the sum of their losses is least and the size within a budget.

    Args:
        groups: what each could get.
        bits: stored bits a weight, on average over all groups' weights, at most.

    Raises:
        ValueError: if there is no group, or even the smallest choices take more.
    """
    if not groups:
        raise ValueError("there are no layers to choose schemes for")
    weights = sum(group.weights for group in groups)
    least = sum(min(choice.bits for choice in group.choices) for group in groups)
    check_budget(bits, least, weights)
    sizes = [[choice.bits for choice in group.choices] for group in groups]
    losses = [[choice.loss for choice in group.choices] for group in groups]
    picked = _knapsack(sizes, losses, int(bits * weights))
    chosen = tuple(group.choices[index] for group, index in zip(groups, picked, strict=True))
    return Allocation(tuple(groups), chosen, bits)


def check_budget(bits: float, least: int, weights: int) -> None:
    """Raise ValueError if so many weights with at least `least` bits in all cannot have `bits` on average."""
    if not least <= bits * weights:
        raise ValueError(
            f"{bits:g} bits a weight cannot be reached: the smallest of the schemes take {least / weights:.3f} with "
            "their codebooks and scales; pass more bits, or schemes with fewer or smaller codebooks"
        )


def _knapsack(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """The index of one item per group with the least sum of losses among those whose sizes fit."""
    smallest = [min(options) for options in sizes]
    spare = capacity - sum(smallest)
    unit = max(1, spare // _STEPS)
    extras = [
        [max(round((size - low) / unit), int(size > low)) for size in options]
        for options, low in zip(sizes, smallest, strict=True)
    ]
    steps = spare // unit
    best = np.zeros(steps + 1)  # least loss of the groups so far, by the units that they may take
    picks: list[np.ndarray] = []
    for options, costs in zip(extras, losses, strict=True):
        totals = np.full((len(options), steps + 1), np.inf)
        for row, extra, cost in zip(totals, options, costs, strict=True):
            if extra <= steps:
                row[extra:] = best[: steps + 1 - extra] + cost
        picks.append(totals.argmin(0).astype(np.int16))
        best = totals.min(0)
    for units in range(steps, -1, -1):  # the first fits, but for what rounding added up to
        picked = _trace(extras, picks, units)
        if sum(options[index] for options, index in zip(sizes, picked, strict=True)) <= capacity:
            return picked
    raise AssertionError("with no units to spare every group takes its smallest item, and those fit")


def _trace(extras: Sequence[Sequence[int]], picks: Sequence[np.ndarray], units: int) -> list[int]:
    """The items that the best choice with so many units consists of."""
    picked: list[int] = []
    for options, pick in zip(reversed(extras), reversed(picks), strict=True):
        picked.append(int(pick[units]))
        units -= options[picked[-1]]
    return picked[::-1]
