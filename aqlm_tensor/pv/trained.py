"""Trained: the parameters that P steps of `tune_pv` change, and how they get from float32 to where the model has them.

Where FSDP2 has sharded a dense parameter, each rank trains a float32 copy of its part, with the gradient that FSDP2
reduced, and writes it back after every step in the dtype of the shard. Codebooks and scales are float32 parameters of
every rank, whose gradients are added up here: they are small, and all rows of a layer need them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aqlm_tensor.pv.config import PVConfig
from aqlm_tensor.pv.layers import TunedWeight
from aqlm_tensor.pv.rows import Rows
from aqlm_tensor.ranks import Ranks

__all__ = ["Trained", "TrainedParameter", "is_trained"]


@dataclass(frozen=True, eq=False)
class TrainedParameter:
    """One of them.

    Attributes:
        name: in reports and saved states.
        value: float32, what Adam changes.
        dtype: in which it is stored in the end.
        shard: the sharded parameter whose part on this rank `value` stands for; None if `value` is the parameter.
    """

    name: str
    value: nn.Parameter
    dtype: torch.dtype
    shard: DTensor | None

    @property
    def rows(self) -> Rows:
        """Those that `value` has."""
        return Rows(self.shard)

    @property
    def length(self) -> int:
        """Rows on all ranks together."""
        return len(self.value if self.shard is None else self.shard)

    def stored(self) -> Tensor:
        """The value in float32, rounded to the dtype in which it is stored."""
        return self.value.data.to(self.dtype).float()

    def size(self) -> float:
        """Root mean square, over all ranks; 1 for zeros."""
        whole: Any = self.value.detach() if self.shard is None else self.shard.detach().float()
        total: Any = whole.square().sum()
        total = total.full_tensor() if isinstance(total, DTensor) else total
        return float(total / whole.numel()) ** 0.5 or 1.0


class Trained:
    """All of them, and the best state that they have had.

    Args:
        model: whose dense parameters are trained along, as the config says.
        weights: whose codebooks and scales are trained.
        dtypes: in which parameters are stored, by their ids.
        config: of the run.
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[TunedWeight], dtypes: Mapping[int, torch.dtype], config: PVConfig
    ) -> None:
        found: dict[str, nn.Parameter] = {}
        for weight in weights:
            found |= {f"{weight.fqn}.codebooks": weight.codebooks, f"{weight.fqn}.scales": weight.scales}
        parts = set(map(id, found.values()))
        for name, parameter in model.named_parameters():
            if id(parameter) not in parts and id(parameter) in dtypes and is_trained(parameter, config):
                found[name] = parameter
        self.parameters = [_trained(name, parameter, dtypes[id(parameter)]) for name, parameter in found.items()]
        self.best = [parameter.value.detach().clone() for parameter in self.parameters]

    @property
    def values(self) -> list[nn.Parameter]:
        """What Adam changes."""
        return [parameter.value for parameter in self.parameters]

    @torch.no_grad()
    def add_up_gradients(self, total: Tensor, ranks: Ranks) -> None:
        """Add up the gradients of all ranks and `total`, a float32 scalar, where FSDP2 has not done so."""
        own = [total]
        for parameter in self.parameters:
            if parameter.shard is None:
                gradient = parameter.value.grad
                own.append(torch.zeros_like(parameter.value) if gradient is None else gradient)
                parameter.value.grad = own[-1]
            elif parameter.shard.grad is not None:  # the mean over the ranks
                reduced: Any = parameter.shard.grad
                parameter.value.grad = reduced.to_local().float() * parameter.shard.device_mesh.size()
                parameter.shard.grad = None
        ranks.add_up_together(own)

    @torch.no_grad()
    def publish(self) -> None:
        """Write values to the shards that they stand for."""
        for parameter in self.parameters:
            if parameter.shard is not None:
                parameter.shard.to_local().copy_(parameter.value)

    @contextlib.contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside the block of code the model has the values as they will be stored; shards always are so."""
        exact = [parameter.value.data for parameter in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.value.data = parameter.stored()
            yield
        finally:
            for parameter, value in zip(self.parameters, exact, strict=True):
                parameter.value.data = value

    @torch.no_grad()
    def keep(self) -> None:
        """The values are the best ones."""
        for kept, parameter in zip(self.best, self.parameters, strict=True):
            kept.copy_(parameter.stored())

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best ones."""
        for kept, parameter in zip(self.best, self.parameters, strict=True):
            parameter.value.copy_(kept)
        self.publish()


def is_trained(parameter: nn.Parameter, config: PVConfig) -> bool:
    """Whether a dense parameter is trained along."""
    wanted = config.dense == "all" or (config.dense == "vectors" and parameter.dim() == 1)
    return wanted and parameter.is_floating_point()


def _trained(name: str, parameter: nn.Parameter, dtype: torch.dtype) -> TrainedParameter:
    parameter.requires_grad_(True)
    if not isinstance(parameter, DTensor):
        return TrainedParameter(name, parameter, dtype, None)
    # of a float32 shard it is the same memory
    return TrainedParameter(name, nn.Parameter(parameter.to_local().detach().float()), dtype, parameter)
