"""tune_pv: tune a quantized model end to end, codes included.

PV-tuning (Malinovskii et al. 2024, arXiv 2405.14852) alternates P steps, which train what is continuous (codebooks,
scales, norms, biases) with the codes fixed, and V steps, which choose codes again for the few groups that the gradient
of the dense weight asks to change most. Here a round is some P steps with Adam, a validation, and a V step with the
gradient that the round's P steps had for the dense weights anyway. The best state on batches held out is kept, rounded
to the dtype that is stored, the untuned one included: tuning never ends worse on them.

Memory beyond the model, in bytes: 12 for each trained parameter (value, two moments) and 4 for a copy of the best one;
the codes three times; for each weight matrix [O, I] whose codes the next V step chooses 4 (O I + I I), which
`gradient_memory` bounds, and about five times that while they are chosen; and the activations. Without gradient
checkpointing each layer's decoded weight is one of those, and the places of each code are kept, 8 bytes for each.

What it costs: about three forward passes of the dense model a batch, one more for a teacher, and the decoding. On one
GPU passes are replayed as CUDA graphs: SmolLM2-135M, 4096 tokens a step, takes about 0.1 s a step on one H100, and some
seconds for each choice of codes.
"""

import contextlib
import functools
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aqlm_tensor.blocks import find_blocks
from aqlm_tensor.calibration.work_folder import fingerprint
from aqlm_tensor.pv.adam import RelativeAdam
from aqlm_tensor.pv.checks import check_arguments
from aqlm_tensor.pv.codes import CURVATURE_PASSES, FIRST_DAMPING, choose_codes
from aqlm_tensor.pv.config import PVConfig
from aqlm_tensor.pv.graph import GraphedPasses, gpu_of
from aqlm_tensor.pv.layers import TunedWeight, in_turns, tuned_weights
from aqlm_tensor.pv.loss import Teacher, TopLogits, call_model, token_loss
from aqlm_tensor.pv.report import PVReport, PVRound
from aqlm_tensor.pv.state import TuningFolder, model_tensors
from aqlm_tensor.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["tune_pv"]

_LAST_LR = 0.1  # of the first
_PROBED = 4  # batches on which a choice of codes must prove itself


def tune_pv(
    model: nn.Module,
    teacher: Teacher | None,
    batches: Sequence[Tensor],
    *,
    config: PVConfig = PVConfig(),  # noqa: B008 (frozen)
    work_dir: str | Path | None = None,
    resume: bool = False,
    group: "ProcessGroup | None" = None,
    on_round: Callable[[PVRound], None] | None = None,
) -> PVReport:
    """Tune a model's AQLM weights, norms and biases in place, end to end.

    The model runs in evaluation mode (no dropout) and has its mode, dtypes and requires_grad again afterwards. An
    exception, Ctrl-C included, leaves it in the best state so far. Dense matrices stay as they are unless
    `config.dense` is "all". The same inputs give the same bits on the CPU, resumed or not; on a GPU as far as the
    backward passes of the model's own operations (attention, embeddings) do.

    Args:
        model: a quantized language model; called as model(batch), gives logits [B, seqlen, vocabulary] or an object
            that has them as `logits`.
        teacher: the dense model, whose distribution of the next token is learned; or what it said about each batch
            (`aqlm_tensor.pv.loss.teacher_logits`); or None to learn the text itself, which adapts the model to it.
        batches: token ids [B, seqlen], without padding; the last ones (`config.validation`) are held out.
        config: the effort.
        work_dir: keep the state in this folder after each round.
        resume: go on with what `work_dir` holds; the model must be the untuned one again, and everything else the
            same.
        group: divide the batches of each step, and those that are measured, over the ranks of this process group
            (torch.distributed). Each calls this function with the same model, on one device of its own, and the same
            arguments, and gets the same result: gradients are averaged, and codes are chosen from what all ranks have
            learned. How sums are rounded depends on the number of ranks. `work_dir` must be one folder for all.
        on_round: called after each round.

    Returns:
        Losses before and after, each round, and how many codes changed.

    Raises:
        ValueError: before any change: for a model without AQLM layers, or with some that cannot be tuned (fused,
            distributed, hooked, offloaded, stacks of experts); for batches or teacher logits of the wrong shape; for
            logits that are not finite; if what `work_dir` holds belongs to another run; if the ranks cannot share a
            step's batches evenly, or one has the model on several devices.
        TypeError: for arguments of the wrong type.
        FileExistsError: if `work_dir` holds something and `resume` was not asked for.
    """
    ranks = Ranks(group)
    held_out = check_arguments(model, teacher, batches, config, ranks)
    if resume and work_dir is None:
        raise ValueError("resume needs the work_dir of the run to go on with")
    folder = None
    if work_dir is not None:
        identity = {
            "config": asdict(config),
            "model": fingerprint(list(model_tensors(model))),
            "data": fingerprint(batches),
            "teacher": "none" if teacher is None else "module" if isinstance(teacher, nn.Module) else "logits",
        }
        with ranks.first_alone():
            folder = TuningFolder(Path(work_dir), identity, resume=resume or ranks.rank > 0)
    modules = [model, *([teacher] if isinstance(teacher, nn.Module) else [])]
    with (
        torch.enable_grad(),
        _evaluating(modules),
        _checkpointed(model, config),
        tuned_weights(model, keep_order=not config.gradient_checkpointing) as tuned,
    ):
        return _Run(model, teacher, batches, held_out, config, *tuned, folder, ranks, on_round).run()


@contextlib.contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block of code, modules are in evaluation mode."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def _checkpointed(model: nn.Module, config: PVConfig) -> Iterator[None]:
    """Inside the block of code, what blocks compute is computed again in the backward pass, if the config says so."""
    blocks = list(find_blocks(model)) if config.gradient_checkpointing else []
    before = [(block, vars(block).get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, own in before:
            del block.forward
            if own is not None:
                block.forward = own


@dataclass
class _Run:
    """One call of `tune_pv`, while the model's weights are spread out."""

    model: nn.Module
    teacher: Teacher | None
    batches: Sequence[Tensor]
    held_out: range
    config: PVConfig
    weights: list[TunedWeight]
    dtypes: dict[int, torch.dtype]
    folder: TuningFolder | None
    ranks: Ranks
    on_round: Callable[[PVRound], None] | None
    rounds: list[PVRound] = field(default_factory=list)
    stale: int = 0
    damping: float = FIRST_DAMPING
    seconds: float = 0.0

    def __post_init__(self) -> None:
        parts = {id(part) for weight in self.weights for part in (weight.codebooks, weight.scales)}
        named = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if id(parameter) in parts
            or self.config.dense == "all"
            or (self.config.dense == "vectors" and parameter.dim() == 1)
        }
        self.trained = {name: value for name, value in named.items() if value.is_floating_point()}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.adam = RelativeAdam(list(self.trained.values()))
        self.first_codes = [weight.codes.clone() for weight in self.weights]
        self.best_codes = [weight.codes.clone() for weight in self.weights]
        self.best = [parameter.detach().clone() for parameter in self.trained.values()]
        self.turns = in_turns(self.weights, self.config.gradient_memory)
        self.steps = self.config.steps(len(self.batches))
        self.devices = sorted({p.device for p in self.model.parameters() if p.device.type == "cuda"}, key=str)
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        self.replayed = self._graphed()

    def _graphed(self) -> GraphedPasses | None:
        """Passes as a CUDA graph, if the model and its teacher, a module or none, are on one GPU, in one process."""
        kept = self.teacher is not None and not isinstance(self.teacher, nn.Module)
        if not self.config.cuda_graph or kept or self.ranks.size > 1:  # NCCL's own threads may disturb a capture
            return None
        gpu = gpu_of([part for part in (self.model, self.teacher) if isinstance(part, nn.Module)])
        if gpu is None:
            return None
        shapes = Counter(batch.shape for batch in self.batches[: self.held_out.start])
        usual = shapes.most_common(1)[0][0]
        return GraphedPasses(self._backward, self.adam.gradients, usual, gpu, CURVATURE_PASSES)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.rounds[-1].step if self.rounds else 0

    def run(self) -> PVReport:
        """Tune, and leave the best state in place."""
        start = time.perf_counter() - self.seconds
        progress = None if self.folder is None else self.folder.load(self._tensors())
        if progress is None:
            self.loss_before = self.best_loss = self._validate()
            if not math.isfinite(self.best_loss):
                raise ValueError(
                    "the loss is not finite before tuning: the model or the teacher is damaged, or its dtype too "
                    "narrow for its activations"
                )
        else:
            self._take(progress)
            start -= self.seconds
        try:
            while self.step < self.steps and self.stale < self.config.patience:
                self._round()
                self.seconds = time.perf_counter() - start
                ended = self.step == self.steps or self.stale == self.config.patience
                due = ended or len(self.rounds) % self.config.save_every == 0
                if self.folder is not None and due and self.ranks.rank == 0:
                    self.folder.save(self._tensors(), self._progress())
                if self.on_round is not None:
                    self.on_round(self.rounds[-1])
        finally:
            self._restore()
        return PVReport(
            self.loss_before, self.best_loss, tuple(self.rounds), self._changed(), self.seconds, self._peak()
        )

    def _round(self) -> None:
        start = time.perf_counter()
        number = len(self.rounds)
        end = min(self.step + self.config.steps_per_round, self.steps)
        turn = self.turns[number % len(self.turns)] if self.config.code_fraction and end < self.steps else []
        for weight in turn:
            weight.watch()
        if self.replayed is not None and self.config.code_fraction:
            self.replayed.restart()  # other weights are watched now, and other codes were chosen
        losses = [self._train(step) for step in range(self.step, end)]
        training = float(torch.stack(losses).mean())
        validation = self._validate()
        if validation < self.best_loss:
            self.best_loss, self.stale = validation, 0
            self._keep()
        else:  # NaN, too, is not better
            self.stale += 1
        known = [weight.watched() for weight in turn]
        for _, learned in known:
            learned.add_up(self.ranks)
        changed, self.damping = choose_codes(known, self.config, self.damping, functools.partial(self._probe, end))
        self.ranks.like_first(weight.codes for weight in turn)
        share = changed / sum(weight.groups for weight in self.weights)
        self.rounds.append(PVRound(end, self.steps, training, validation, share, time.perf_counter() - start))

    def _train(self, step: int) -> Tensor:
        """One P step; its loss."""
        count = self.config.batches_per_step
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for place in self.ranks.mine(count):
            total += self._pass(self._batch(step * count + place)).to(total.device)
        self.ranks.add_up_together([total, *self.adam.gradients()])
        progress = step / self.steps
        lr = self.config.lr * (_LAST_LR + (1 - _LAST_LR) * 0.5 * (1 + math.cos(math.pi * progress)))
        self.adam.step(step + 1, lr)
        return total

    def _pass(self, index: int) -> Tensor:
        """Add a batch's share to the gradients of a step; its share of the loss."""
        if self.replayed is not None:
            return self.replayed(self.batches[index])
        return self._backward(self.batches[index], self._target(index))

    def _backward(self, batch: Tensor, target: Tensor | TopLogits | None = None) -> Tensor:
        loss = self._loss(batch, target) / self.config.batches_per_step
        loss.backward()
        return loss.detach()

    def _probe(self, step: int) -> float:
        """Mean loss of some batches, those of the steps that come next."""
        first = step * self.config.batches_per_step
        coming = range(first, first + min(_PROBED, self.held_out.start))
        losses = self._measured([self._batch(micro) for micro in coming])
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _measured(self, indices: Sequence[int]) -> list[float]:
        """The losses of some batches, each measured by one of the ranks."""
        own = {
            place: float(self._loss(self.batches[indices[place]], self._target(indices[place])))
            for place in self.ranks.mine(len(indices))
        }
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
        with self._precision():
            if isinstance(self.teacher, nn.Module):
                with torch.no_grad():
                    target = call_model(self.teacher, batch)
            return token_loss(call_model(self.model, batch), batch, target)

    def _precision(self) -> torch.autocast:
        device = next(self.model.parameters()).device
        half = self.config.precision == "bfloat16" or (
            self.config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        return torch.autocast(device.type, torch.bfloat16, enabled=half)

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss over the tokens held out, of the parameters as they will be stored."""
        exact = [parameter.data for parameter in self.trained.values()]
        try:
            for parameter in self.trained.values():
                parameter.data = self._stored(parameter)
            sizes = [self.batches[index].numel() for index in self.held_out]
            losses = self._measured(self.held_out)
        finally:
            for parameter, value in zip(self.trained.values(), exact, strict=True):
                parameter.data = value
        return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    def _stored(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's value in float32, rounded to the dtype in which it is stored."""
        return parameter.data.to(self.dtypes[id(parameter)]).float()

    @torch.no_grad()
    def _keep(self) -> None:
        for kept, parameter in zip(self.best, self.trained.values(), strict=True):
            kept.copy_(self._stored(parameter))
        for kept, weight in zip(self.best_codes, self.weights, strict=True):
            kept.copy_(weight.codes)

    @torch.no_grad()
    def _restore(self) -> None:
        for kept, parameter in zip(self.best, self.trained.values(), strict=True):
            parameter.copy_(kept)
        for kept, weight in zip(self.best_codes, self.weights, strict=True):
            weight.codes.copy_(kept)

    def _changed(self) -> dict[str, float]:
        pairs = zip(self.weights, self.first_codes, strict=True)
        return {w.fqn: float((w.codes != first).any(-1).float().mean()) for w, first in pairs}

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        moments = zip(self.trained.items(), self.adam.first, self.adam.second, self.best, strict=True)
        found: dict[str, Tensor] = {}
        for (name, parameter), first, second, best in moments:
            found |= {f"now.{name}": parameter, f"first.{name}": first, f"second.{name}": second, f"best.{name}": best}
        for weight, best in zip(self.weights, self.best_codes, strict=True):
            found |= {f"now.{weight.fqn}.codes": weight.codes, f"best.{weight.fqn}.codes": best}
        return found

    def _progress(self) -> dict[str, Any]:
        rounds = [asdict(entry) for entry in self.rounds]
        names = ("loss_before", "best_loss", "stale", "damping", "seconds")
        return {"rounds": rounds} | {name: getattr(self, name) for name in names}

    def _take(self, progress: dict[str, Any]) -> None:
        self.rounds = [PVRound(**entry) for entry in progress.pop("rounds")]
        for name, value in progress.items():
            setattr(self, name, value)

    def _peak(self) -> int:
        if self.devices:
            return sum(torch.cuda.max_memory_allocated(device) for device in self.devices)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
