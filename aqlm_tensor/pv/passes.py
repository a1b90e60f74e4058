"""Passes of model and teacher in `tune_pv`: which batch comes when, its loss and gradients, and what is measured."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aqlm_tensor.pv.adam import RelativeAdam
from aqlm_tensor.pv.codes import CURVATURE_PASSES
from aqlm_tensor.pv.config import PVConfig
from aqlm_tensor.pv.graph import GraphedPasses, gpu_of
from aqlm_tensor.pv.loss import Teacher, TopLogits, call_model, token_loss
from aqlm_tensor.pv.sharded import is_sharded, reshard
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.training import products_in

__all__ = ["Passes"]

_PROBED = 4  # batches on which a choice of codes must prove itself


@dataclass
class Passes:
    """The passes of one run.

    Attributes:
        model: with weights that can be tuned.
        teacher: as `tune_pv` takes it.
        batches: all.
        held_out: which of them are not trained on.
        config: of the run.
        ranks: that share the batches.
        replayed: passes as a CUDA graph, where that can be done.
    """

    model: nn.Module
    teacher: Teacher | None
    batches: Sequence[Tensor]
    held_out: range
    config: PVConfig
    ranks: Ranks
    replayed: GraphedPasses | None = None

    def __post_init__(self) -> None:
        teacher = [self.teacher] if isinstance(self.teacher, nn.Module) else []
        self._modules = [self.model, *teacher]
        self._in_step = any(map(is_sharded, self._modules))  # ranks gather weights in every pass, all at once

    def graph(self, adam: RelativeAdam) -> None:
        """Replay passes if the model and its teacher, a module or none, are on one GPU, in one process."""
        kept = self.teacher is not None and not isinstance(self.teacher, nn.Module)
        several = self.ranks.size > 1 or self._in_step  # NCCL's own threads may disturb a capture
        gpu = None if not self.config.cuda_graph or kept or several else gpu_of(self._modules)
        if gpu is not None:
            shapes = Counter(batch.shape for batch in self.batches[: self.held_out.start])
            usual = shapes.most_common(1)[0][0]
            self.replayed = GraphedPasses(self._backward, adam.gradients, [usual], gpu, CURVATURE_PASSES)

    def step(self, number: int) -> Tensor:
        """Add this rank's share to the gradients of a step; its share of the loss."""
        count = self.config.batches_per_step
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for place in self.ranks.mine(count):
            index = self._batch(number * count + place)
            if self.replayed is not None:
                total += self.replayed(self.batches[index])
            else:
                total += self._backward(self.batches[index], self._target(index)).to(total.device)
        return total

    def validate(self) -> float:
        """Mean loss over the tokens held out."""
        sizes = [self.batches[index].numel() for index in self.held_out]
        losses = self._measured(self.held_out)
        return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    def probe(self, step: int) -> float:
        """Mean loss of some batches, those of the steps that come after so many."""
        first = step * self.config.batches_per_step
        coming = range(first, first + min(_PROBED, self.held_out.start))
        losses = self._measured([self._batch(micro) for micro in coming])
        return sum(losses) / len(losses)

    def _backward(self, batch: Tensor, target: Tensor | TopLogits | None = None) -> Tensor:
        loss = self._loss(batch, target) / self.config.batches_per_step
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _measured(self, indices: Sequence[int]) -> list[float]:
        """The losses of some batches, each measured by one of the ranks."""
        places = list(self.ranks.mine(len(indices)))
        if self._in_step:
            most = -(-len(indices) // self.ranks.size)
            places += [len(indices) - 1] * (most - len(places))
        own = {place: float(self._loss(self.batches[indices[place]], self._target(indices[place]))) for place in places}
        for module in self._modules:
            reshard(module)
        losses = self.ranks.together(own)
        return [losses[place] for place in range(len(indices))]

    def _batch(self, micro: int) -> int:
        """The training batch whose turn it is after so many."""
        epoch, place = divmod(micro, self.held_out.start)
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> list[int]:
        """The order of the training batches in an epoch."""
        generator = torch.Generator().manual_seed((self.config.seed << 20) + epoch)
        return torch.randperm(self.held_out.start, generator=generator).tolist()

    def _target(self, index: int) -> Tensor | TopLogits | None:
        """What was kept of the teacher's words on a batch; None for a teacher that is asked, or none."""
        return None if self.teacher is None or isinstance(self.teacher, nn.Module) else self.teacher[index]

    def _loss(self, batch: Tensor, target: Tensor | TopLogits | None) -> Tensor:
        with products_in(self.config.precision, next(self.model.parameters()).device):
            if isinstance(self.teacher, nn.Module):
                with torch.no_grad():
                    target = call_model(self.teacher, batch)
            return token_loss(call_model(self.model, batch), batch, target)
