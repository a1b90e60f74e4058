"""tune_pv: tune a quantized model end to end, codes included.

PV-tuning (Malinovskii et al. 2024, arXiv 2405.14852) alternates P steps, which train what is continuous (codebooks,
scales, norms, biases) with the codes fixed, and V steps, which choose codes again for the few groups that the gradient
of the dense weight asks to change most. Here a round is some P steps with Adam, a validation, and a V step with the
gradient that the round's P steps had for the dense weights anyway; after one that was undone, twice as many rounds go
without. The best state on batches held out is kept, rounded to the dtype that is stored, the untuned one included:
tuning never ends worse on them.

Memory beyond the model, in bytes: 12 for each trained parameter (value, two moments) and 4 for a copy of the best one;
the codes three times; for each weight matrix [O, I] whose codes the next V step chooses 4 (O I + I I), which
`gradient_memory` bounds, and about five times that while they are chosen; and the activations. Without gradient
checkpointing each layer's decoded weight is one of those, and the places of each code are kept, 8 bytes for each.

What it costs: about three forward passes of the dense model a batch, one more for a teacher, and the decoding. On one
GPU passes are replayed as CUDA graphs: SmolLM2-135M, 4096 tokens a step, takes about 0.07 s a step on one H100, and
some seconds for each choice of codes.

A model that outgrows one GPU is sharded by FSDP2 before (`aqlm_tensor.pv.sharded`); the teacher, too, if need be.
"""

import contextlib
import functools
import math
import resource
import sys
import time
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
from aqlm_tensor.pv.codes import FIRST_DAMPING, choose_codes, next_choice
from aqlm_tensor.pv.config import PVConfig
from aqlm_tensor.pv.layers import TunedWeight, in_turns, tuned_weights
from aqlm_tensor.pv.loss import Teacher
from aqlm_tensor.pv.passes import Passes
from aqlm_tensor.pv.report import PVReport, PVRound
from aqlm_tensor.pv.sharded import is_sharded, sharded_weights
from aqlm_tensor.pv.state import Saved, TuningFolder, model_tensors
from aqlm_tensor.pv.trained import Trained
from aqlm_tensor.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["tune_pv"]

_LAST_LR = 0.1  # of the first


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
            that has them as `logits`. Several processes can have sharded it by FSDP2 (`fully_shard` of each block and
            of the model, or `accelerator.prepare`): it stays sharded, with `gradient_checkpointing`, a bound on
            `gradient_memory` and the processes as `group`; dense parameters then keep their dtype in products.
        teacher: the dense model, sharded or not, whose distribution of the next token is learned; or what it said about
            each batch (`aqlm_tensor.pv.loss.teacher_logits`); or None to learn the text itself, which adapts the model
            to it.
        batches: token ids [B, seqlen], without padding; the last ones (`config.validation`) are held out.
        config: the effort.
        work_dir: keep the state in this folder after each round.
        resume: go on with what `work_dir` holds; the model must be the untuned one again, and everything else the
            same.
        group: divide the batches of each step, and those that are measured, over the ranks of this process group
            (torch.distributed). Each calls this function with the same model, on one device of its own, and the same
            arguments, and gets the same result: gradients are averaged, and codes are chosen from what all ranks have
            learned. How sums are rounded depends on the number of ranks. `work_dir` must be one folder for all. If
            model or teacher are sharded, passes are in step on all ranks.
        on_round: called after each round.

    Returns:
        Losses before and after, each round, and how many codes changed.

    Raises:
        ValueError: before any change: for a model without AQLM layers, or with some that cannot be tuned (fused,
            tensor parallel, hooked, offloaded, stacks of experts); for one that is sharded over other ranks, in part,
            or without the settings that this needs; for batches or teacher logits of the wrong shape; for logits that
            are not finite; if what `work_dir` holds belongs to another run; if the ranks cannot share a step's batches
            evenly, or one has the model on several devices.
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
            "model": fingerprint(model_tensors(model)),
            "data": fingerprint(batches),
            "teacher": "none" if teacher is None else "module" if isinstance(teacher, nn.Module) else "logits",
        }
        with ranks.first_alone():
            folder = TuningFolder(Path(work_dir), identity, resume=resume or ranks.rank > 0)
    modules = [model, *([teacher] if isinstance(teacher, nn.Module) else [])]
    passes = Passes(model, teacher, batches, held_out, config, ranks)
    with torch.enable_grad(), _evaluating(modules), _checkpointed(model, config), _spread(model, config) as spread:
        return _Run(model, passes, config, *spread, folder, ranks, on_round).run()


def _spread(
    model: nn.Module, config: PVConfig
) -> contextlib.AbstractContextManager[tuple[list[TunedWeight], dict[int, torch.dtype]]]:
    """The model's weights as they can be tuned, and the dtypes of what can be trained."""
    if is_sharded(model):
        return sharded_weights(model)
    return tuned_weights(model, keep_order=not config.gradient_checkpointing)


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
    passes: Passes
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
    watched: bool = False  # weights in the round before

    def __post_init__(self) -> None:
        self.trained = Trained(self.model, self.weights, self.dtypes, self.config)
        self.adam = RelativeAdam(self.trained.values, [one.size() for one in self.trained.parameters])
        self.first_codes = [weight.codes.clone() for weight in self.weights]
        self.best_codes = [weight.codes.clone() for weight in self.weights]
        self.turns = in_turns(self.weights, self.config.gradient_memory)
        self.steps = self.config.steps(len(self.passes.batches))
        self.devices = sorted({p.device for p in self.model.parameters() if p.device.type == "cuda"}, key=str)
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        self.passes.graph(self.adam)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.rounds[-1].step if self.rounds else 0

    def run(self) -> PVReport:
        """Tune, and leave the best state in place."""
        start = time.perf_counter() - self.seconds
        progress = None if self.folder is None else self.folder.load(self._saved())
        if progress is None:
            self.loss_before = self.best_loss = self._validate()
            if not math.isfinite(self.best_loss):
                raise ValueError(
                    "the loss is not finite before tuning: the model or the teacher is damaged, or its dtype too "
                    "narrow for its activations"
                )
        else:
            self._take(progress)
            self.trained.publish()
            start -= self.seconds
        try:
            while self.step < self.steps and self.stale < self.config.patience:
                self._round()
                self.seconds = time.perf_counter() - start
                ended = self.step == self.steps or self.stale == self.config.patience
                due = ended or len(self.rounds) % self.config.save_every == 0
                if self.folder is not None and due:
                    self.folder.save(self._saved(), self._progress(), self.ranks)
                if self.on_round is not None:
                    self.on_round(self.rounds[-1])
        finally:
            self._restore()
            self.passes.replayed = None  # in a cycle of references, it would hold its memory for longer
        return PVReport(
            self.loss_before, self.best_loss, tuple(self.rounds), self._changed(), self.seconds, self._peak()
        )

    def _round(self) -> None:
        start = time.perf_counter()
        number = len(self.rounds)
        end = min(self.step + self.config.steps_per_round, self.steps)
        due, made = next_choice([entry.changed for entry in self.rounds])
        choosing = self.config.code_fraction and end < self.steps and number == due
        turn = self.turns[made % len(self.turns)] if choosing else []
        for weight in turn:
            weight.watch()
        if self.passes.replayed is not None and (turn or self.watched):
            self.passes.replayed.restart()  # other weights are watched now, and other codes may have been chosen
        self.watched = bool(turn)
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
        probe = functools.partial(self.passes.probe, end)
        changed, self.damping = choose_codes(known, self.config, self.damping, probe)
        self.ranks.like_first(weight.codes for weight in turn if weight.rows.count == 1)
        share = changed / sum(weight.groups for weight in self.weights)
        self.rounds.append(PVRound(end, self.steps, training, validation, share, time.perf_counter() - start))

    def _train(self, step: int) -> Tensor:
        """One P step; its loss."""
        total = self.passes.step(step)
        self.trained.add_up_gradients(total, self.ranks)
        progress = step / self.steps
        lr = self.config.lr * (_LAST_LR + (1 - _LAST_LR) * 0.5 * (1 + math.cos(math.pi * progress)))
        self.adam.step(step + 1, lr)
        self.trained.publish()
        return total

    def _validate(self) -> float:
        """The loss on the batches held out, of the parameters as they will be stored."""
        with self.trained.rounded():
            return self.passes.validate()

    @torch.no_grad()
    def _keep(self) -> None:
        self.trained.keep()
        for kept, weight in zip(self.best_codes, self.weights, strict=True):
            kept.copy_(weight.codes)

    @torch.no_grad()
    def _restore(self) -> None:
        self.trained.restore()
        for kept, weight in zip(self.best_codes, self.weights, strict=True):
            weight.codes.copy_(kept)

    def _changed(self) -> dict[str, float]:
        """For each layer the share of groups that have other codes than at first, on all ranks."""
        pairs = zip(self.weights, self.first_codes, strict=True)
        rows = {w.fqn: w.rows.whole((w.codes != first).any(-1).float().mean(1)) for w, first in pairs}
        return {fqn: float(shares.mean()) for fqn, shares in rows.items()}

    def _saved(self) -> dict[str, Saved]:
        """Everything that a resumed run needs, by name."""
        moments = zip(self.trained.parameters, self.adam.first, self.adam.second, self.trained.best, strict=True)
        found: dict[str, Saved] = {}
        for one, first, second, best in moments:
            for kind, tensor in (("now", one.value), ("first", first), ("second", second), ("best", best)):
                found[f"{kind}.{one.name}"] = Saved(tensor, one.rows, one.length)
        for weight, best in zip(self.weights, self.best_codes, strict=True):
            for kind, codes in (("now", weight.codes), ("best", best)):
                found[f"{kind}.{weight.fqn}.codes"] = Saved(codes, weight.rows, len(codes) * weight.rows.count)
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
