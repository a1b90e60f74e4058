"""Fine-tune a quantized block against the output it had before: what is continuous in it, the codes stay.

Codebooks, scales, norms and biases are trained with Adam to lower the error of the block's output, as in AQLM
(arXiv 2401.06118, section 3.4). Unlike there, each token's error counts relative to the size of its target: a few
tokens with outputs hundreds of times larger would otherwise decide everything, and the next block normalises them
away. The best state on batches held out is kept, the untrained one included, so that tuning never makes a block worse
on them.

Several processes divide the batches of a step. Gradients are added up in the order of the batches, whoever computed
them, so that all processes stay equal, and to what one alone would be.

A pass over a small block starts some hundred kernels and waits for Python. On one GPU and in one process, passes over
batches for which the block is called alike are replayed as a CUDA graph.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from aqlm_tensor.calibration.block_calls import BlockCalls
from aqlm_tensor.pv.graph import GraphedPasses, gpu_of
from aqlm_tensor.pv.layers import tuned_weights
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.training import Precision, held_out, products_in

__all__ = ["FinetuneConfig", "check_tunable", "finetune_block"]


@dataclass(frozen=True)
class FinetuneConfig:
    """How `calibrate` fine-tunes each block.

    Attributes:
        epochs: passes over the batches, at most.
        lr: Adam's learning rate at the start; it falls to a tenth along a half cosine.
        validation: share of the batches that is held out to choose the best epoch (at least one batch).
        patience: stop after so many epochs in a row without a better validation loss.
        batches_per_step: batches whose gradients are averaged for one step. Processes share them; a batch is not
            divided.
        precision: what products are computed in. "auto" is bfloat16 on GPUs that have it, float32 elsewhere; trained
            parameters, sums and the error are float32 always.

    Raises:
        ValueError: for a value that makes no sense, naming the accepted ones.
    """

    epochs: int = 4
    lr: float = 1e-3
    validation: float = 0.125
    patience: int = 2
    batches_per_step: int = 1
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batches_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {self.validation}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")

    def held_out(self, batches: int) -> range:
        """Which of so many batches are held out: the last ones.

        Raises:
            ValueError: for fewer than two batches.
        """
        return held_out(batches, self.validation, "fine-tuning")


def check_tunable(layers: Mapping[str, nn.Linear], option: str) -> None:
    """Raise unless all of these layers, once quantized, can be trained.

    Args:
        layers: by name.
        option: what asks for it.

    Raises:
        ValueError: naming the first that cannot.
    """
    for fqn, layer in layers.items():
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"{fqn} is a {type(layer).__name__}, of which only the base class nn.Linear can be "
                f"trained: leave out {option}"
            )


def finetune_block(
    block: nn.Module,
    calls: BlockCalls,
    index: int,
    targets: Sequence[Tensor],
    config: FinetuneConfig,
    *,
    seed: int = 0,
    ranks: Ranks,
) -> tuple[float, float]:
    """Train a block's codebooks, scales, norms and biases in place.

    Args:
        block: with AQLM weights; it is trained in float32 and has its own dtype again afterwards.
        calls: how the model calls it, and its inputs [B, seqlen, width]; with several ranks those of this rank's
            batches.
        index: of the block.
        targets: the output that the block should have for each of these inputs.
        config: the effort.
        seed: of the order of the batches.
        ranks: that divide the batches.

    Returns:
        The mean relative squared error on the batches held out, before and after.

    Raises:
        ValueError: for fewer than two batches.
    """
    batches = sum(ranks.everyones(len(calls.inputs)))
    held_out = config.held_out(batches)
    order = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), _trained_in_float32(block) as parameters:
        passes = _Passes(calls, index, targets, config.precision, parameters)
        graph = None if ranks.size > 1 else passes.graph(gpu_of([block]))  # NCCL's own threads may disturb a capture

        def validate() -> float:
            own = {batch: passes.error(place) for place, batch in enumerate(ranks.mine(batches)) if batch in held_out}
            errors = ranks.together(own)
            return sum(errors[batch] for batch in held_out) / len(held_out)

        optimizer = torch.optim.Adam(parameters, config.lr, betas=(0.9, 0.95))
        steps = config.epochs * -(-held_out.start // config.batches_per_step)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, config.lr / 10)
        first = best = validate()
        kept, stale = _copy(parameters), 0
        for _ in range(config.epochs):
            for step in _steps(held_out.start, config.batches_per_step, order):
                places = {batch: ranks.mine(batches).index(batch) for batch in step if ranks.owner(batch) == ranks.rank}
                own = {batch: passes.gradient(place, graph) for batch, place in places.items()}
                _set_mean_gradient(parameters, own, step, ranks)
                optimizer.step()
                schedule.step()
            now = validate()
            if now < best:
                best, kept, stale = now, _copy(parameters), 0
            else:  # NaN, too, is not better
                stale += 1
            if stale == config.patience:
                break
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    return first, best


class _Passes:
    """Passes over this process's batches, which are told by their places in the inputs."""

    def __init__(
        self,
        calls: BlockCalls,
        index: int,
        targets: Sequence[Tensor],
        precision: Precision,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._call, self._inputs, self._targets = functools.partial(calls.run, index), calls.inputs, targets
        self._like_first = functools.partial(calls.alike, index, 0)
        self._precision: Precision = precision
        self._parameters = parameters
        self._replayed: list[bool] = []  # by place, once there is a graph

    def graph(self, gpu: torch.device | None) -> GraphedPasses | None:
        """Replays passes over batches for which the block is called like for the first one, if there is a GPU.

        It is not kept here: it would hold all activations in a cycle of references.
        """
        if gpu is None:
            return None
        self._replayed = list(map(self._like_first, range(len(self._inputs))))
        shapes = [self._inputs[0].shape, self._targets[0].shape]
        return GraphedPasses(functools.partial(self._gradient, 0), list, shapes, gpu, 1)

    def error(self, place: int) -> float:
        """Of the block's output for a batch."""
        with torch.no_grad():
            return float(self._error(place, self._inputs[place], self._targets[place]))

    def gradient(self, place: int, graph: GraphedPasses | None) -> Tensor:
        """Of a batch's error, for all parameters one after another."""
        if graph is not None and self._replayed[place]:
            return graph(self._inputs[place], self._targets[place])
        return self._gradient(place, self._inputs[place], self._targets[place])

    def _error(self, place: int, hidden: Tensor, target: Tensor) -> Tensor:
        with products_in(self._precision, hidden.device):
            output = self._call(place, hidden.float())
        return _relative_error(output.float(), target.float())

    def _gradient(self, place: int, hidden: Tensor, target: Tensor) -> Tensor:
        error = self._error(place, hidden, target)  # zero for parameters that it does not depend on
        gradients = torch.autograd.grad(error, self._parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])


def _steps(batches: int, at_once: int, generator: torch.Generator) -> list[list[int]]:
    """The batches of each step of an epoch, in random order.

    A step has one batch of each residue class modulo `at_once`, so that ranks whose number divides that have equal
    shares.
    """
    classes = [range(first, batches, at_once) for first in range(min(at_once, batches))]
    shuffled = [[own[place] for place in torch.randperm(len(own), generator=generator).tolist()] for own in classes]
    return [[own[step] for own in shuffled if step < len(own)] for step in range(len(shuffled[0]))]


def _set_mean_gradient(
    parameters: Sequence[nn.Parameter], own: dict[int, Tensor], step: Sequence[int], ranks: Ranks
) -> None:
    """Give parameters the mean of the gradients of some batches, this rank's its own; the same bits on every rank."""
    sizes = [parameter.numel() for parameter in parameters]
    total = torch.zeros(sum(sizes), device=parameters[0].device)
    for batch in step:
        part = own.pop(batch) if batch in own else torch.empty_like(total)
        ranks.spread(part, ranks.owner(batch))
        total += part
    total /= len(step)
    for parameter, gradient in zip(parameters, total.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, for tensors [..., width]."""
    power = target.square().sum(-1)
    return ((output - target).square().sum(-1) / power.clamp_min(torch.finfo(power.dtype).tiny)).mean()


@contextlib.contextmanager
def _trained_in_float32(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside the block of code, everything is float32, and the parameters that are yielded require gradients."""
    with tuned_weights(block):
        trained = [
            parameter
            for name, parameter in block.named_parameters()
            if parameter.dim() == 1 or name.rpartition(".")[2] in ("codebooks", "scales")
        ]
        for parameter in trained:
            parameter.requires_grad_(True)
        yield trained
