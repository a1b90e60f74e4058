"""BlockRun: what `calibrate` does with each block: calibrate, quantize, fine-tune, and hand the outputs on.

A step is done for all batches before the next one begins, so only one block's X^T X and activations are alive. What is
finished is written to the work folder at once.
"""

import contextlib
import errno
import functools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from aqlm_tensor.api import quantize_
from aqlm_tensor.blocks import dense_weights, reading_order
from aqlm_tensor.calibration.activations import Activations, Place
from aqlm_tensor.calibration.block_calls import Batch, BlockCalls, on_device
from aqlm_tensor.calibration.experts import ExpertObserver, ExpertStack, one_by_one, quantize_expert
from aqlm_tensor.calibration.finetune import FinetuneConfig, finetune_block
from aqlm_tensor.calibration.report import BlockReport, CalibratedLayer, Pace, Phase, Progress, Stopwatch
from aqlm_tensor.calibration.work_folder import WorkFolder, continuous
from aqlm_tensor.handler import LayerReport
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.quantizer.observers import add_up, detach_observers, observer_of
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.targets import Target
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["BlockRun"]

_UNOBSERVED = "it saw no data"


@dataclass
class BlockRun:
    """One call of `calibrate`; its arguments are that function's.

    Attributes:
        work: where finished layers are kept, if anywhere.
        finished_layers: names of those that it held at the start.
        finished_blocks: indices of those that it held at the start.
        layers: reports so far.
        sharing: the model's linear layers by the id of their dense weight.
        skipped: why layers are left dense after all.
        tuned: reports so far.
        now: phase and index of the block.
        pace: of the blocks that this run did itself.
    """

    model: nn.Module
    finetune: FinetuneConfig | None
    true_sequential: bool
    blocks: list[nn.Module]
    targets: list[Target]
    stacks: list[ExpertStack]
    device: torch.device
    place: Place
    ranks: Ranks
    watch: Stopwatch
    on_progress: Callable[[Progress], None] | None
    work: WorkFolder | None = None
    finished_layers: set[str] = field(default_factory=set)
    finished_blocks: set[int] = field(default_factory=set)
    layers: list[LayerReport] = field(default_factory=list)
    sharing: dict[int, list[nn.Linear]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tuned: list[BlockReport] = field(default_factory=list)
    now: tuple[Phase, int] = ("capture", 0)
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear):
                self.sharing.setdefault(id(layer.weight), []).append(layer)

    def use(self, work: WorkFolder) -> None:
        """Keep finished layers and blocks in a folder, and take those that it holds."""
        self.work = work
        self.finished_layers, self.finished_blocks = self.ranks.shared((work.layers(), work.blocks()), 0)

    def capture(self, batches: Sequence[Batch]) -> None:
        """Learn what the blocks are called with."""
        with self._phase("capture", 0):
            folder = None if self.work is None else self.work.path
            own = [batches[batch] for batch in self.ranks.mine(len(batches))]
            self.calls = BlockCalls(self.model, self.blocks, own, device=self.device, place=self.place, folder=folder)

    def quantize(self, index: int, block: nn.Module) -> None:
        """Calibrate, quantize and fine-tune a block, and compute what the next one gets."""
        inside = set(map(id, block.modules()))
        # what an earlier block has, too, is quantized already
        targets = [target for target in self.targets if id(target.module) in inside and not _is_quantized(target)]
        stacks = [stack for stack in self.stacks if id(stack.module) in inside]
        stacks = [stack for stack in stacks if not isinstance(stack.weight, AQLMTensor)]
        finished = index in self.finished_blocks
        self.pace.begin(sum(layer.weight.numel() for layer in (*(target.module for target in targets), *stacks)))
        with on_device(block, self.device):
            if (targets or stacks) and not finished:
                outputs = self._quantize_layers(index, block, targets, stacks)
                tuned = None
                if self.finetune is not None and any(map(_is_quantized, targets)):
                    with dense_weights(nn.ModuleList(stack.module for stack in stacks)):
                        tuned = self._fine_tune(index, block, outputs)
                if self.work is not None and self.ranks.rank == 0:
                    self.work.save_block(index, block, tuned)
            elif finished:
                self._take_block(index, block, targets, stacks)
            if index + 1 < len(self.blocks):
                with dense_weights(block), self._phase("propagate", index):
                    self.calls.inputs = self._outputs(index)
        if not finished:
            self.pace.end()

    def _quantize_layers(
        self, index: int, block: nn.Module, targets: list[Target], stacks: list[ExpertStack]
    ) -> Activations | None:
        """Quantize the layers of a block; the outputs that the dense block has for its inputs, to tune on."""
        outputs = None
        try:
            for number, (group, watched) in enumerate(self._groups(index, block, targets, stacks)):
                if group:
                    quantize_(self.model, _at_step("prepare", group))
                observer = ExpertObserver(watched)
                with one_by_one(watched), dense_weights(block), self._phase("calibrate", index), observer:
                    if number == 0 and self.finetune is not None:
                        outputs = self._outputs(index)
                    else:
                        for _ in self._each_output(index):
                            pass
                    add_up([target.module for target in group], self.ranks)
                    observer.add_up(self.ranks)
                with self._phase("quantize", index):
                    self._convert(self._observed(index, group))
                    for stack in watched:
                        self._convert_experts(stack, observer)
        finally:
            detach_observers(block.modules())
        return outputs

    def _observed(self, index: int, targets: list[Target]) -> list[Target]:
        """The prepared layers of a block that saw data, or may do without.

        Raises:
            ValueError: if one did not, no later block has it, too, and its config says so.
        """
        seen = {id(target.module.weight) for target in targets if _tokens(target.module)}
        without = [target for target in targets if id(target.module.weight) not in seen]
        waiting, last = self._waiting(index, without)
        refused = [target.fqn for target in last if target.config.on_unobserved == "raise"]
        if refused:
            names = ", ".join(refused[:5]) + (", ..." if len(refused) > 5 else "")
            raise ValueError(
                f"{len(refused)} of the {len(targets)} layers calibrated in block {index} saw no data: {names}. Pass "
                'data that reaches them, or on_unobserved="skip" (leave them dense) or "data_free"'
            )
        skipped = [target for target in last if target.config.on_unobserved == "skip"]
        self.skipped |= {target.fqn: _UNOBSERVED for target in skipped}
        left_out = set(map(id, (*waiting, *skipped)))
        detach_observers(target.module for target in targets if id(target) in left_out)
        return [target for target in targets if id(target) not in left_out]

    def _waiting(self, index: int, targets: list[Target]) -> tuple[list[Target], list[Target]]:
        """Layers of a block whose weights a later one has, too, and the others."""
        later = {id(parameter) for block in self.blocks[index + 1 :] for parameter in block.parameters()}
        waiting = [target for target in targets if id(target.module.weight) in later]
        return waiting, [target for target in targets if id(target.module.weight) not in later]

    def _convert(self, targets: list[Target]) -> None:
        """Quantize prepared layers, this rank's share of them, but for those that the work folder holds."""
        before = len(self.layers)
        for target in targets:
            if target.fqn in self.finished_layers:
                self._take(target)
                detach_observers([target.module])
        left = [target for target in targets if not _is_quantized(target)]
        firsts = {id(target.module.weight): target for target in reversed(left)}  # of those that share a weight
        weights = {target.fqn: target.module.weight for target in firsts.values()}
        owners = dict(zip(firsts, self.ranks.owners([weight.numel() for weight in weights.values()]), strict=True))
        mine = [target for target in left if owners[id(target.module.weight)] == self.ranks.rank]
        detach_observers({target.module for target in left} - {target.module for target in mine})
        solved = {target.fqn: owners[id(target.module.weight)] for target in firsts.values()}
        if mine:
            quantize_(self.model, _at_step("convert", mine), on_layer=functools.partial(self._layer_done, weights))
        if self.ranks.size > 1:
            for target in left:
                if target.fqn in solved:
                    self._exchange(target, solved[target.fqn])
        order = {target.fqn: number for number, target in enumerate(targets)}
        self.layers[before:] = sorted(self.layers[before:], key=lambda layer: order[layer.fqn])

    def _exchange(self, target: Target, owner: int) -> None:
        """Give a layer that this rank solved to the others, or get it."""
        weight, given = target.module.weight, None
        if owner == self.ranks.rank:
            assert isinstance(weight, AQLMTensor)
            report = next(layer for layer in self.layers if layer.fqn == target.fqn)
            given = (report, [part.cpu() for part in weight.parts()])
        report, parts = self.ranks.shared(given, owner)
        if owner != self.ranks.rank:
            self._put(target, report, _weight_of(parts, weight.device))

    def _convert_experts(self, stack: ExpertStack, observer: ExpertObserver | None) -> None:
        """Quantize each expert of a stack, but for those that the work folder holds; all, without an observer."""
        weights: list[Tensor] = []
        count, size = len(stack.weight), self.ranks.size
        for start in range(0, count, size):
            own = start + self.ranks.rank
            given = None
            if own < count and stack.expert(own) not in self.finished_layers:
                assert observer is not None
                given = self._solve_expert(stack, own, observer)
            for expert in range(start, min(start + size, count)):
                name = stack.expert(expert)
                if name in self.finished_layers:
                    assert self.work is not None
                    report, weight = self.work.load_layer(name, stack.weight.device)
                else:
                    report, parts = self.ranks.shared(given if expert == own else None, expert - start)
                    weight = _weight_of(parts, stack.weight.device)
                weights.append(weight)
                self.layers.append(report)
                self._tell(report)
        if observer is not None:
            del observer.seen[stack.fqn]
        stacked = torch.stack(weights)
        assert isinstance(stacked, AQLMTensor)
        stack.replace(stacked)

    def _solve_expert(
        self, stack: ExpertStack, expert: int, observer: ExpertObserver
    ) -> tuple[CalibratedLayer, list[Tensor]]:
        weight, plain = quantize_expert(stack, expert, observer)
        report = CalibratedLayer(**asdict(plain), weight_error=_weight_error(stack.weight[expert], weight))
        if self.work is not None:
            self.work.save_layer(report, weight)
        return report, [part.cpu() for part in weight.parts()]

    def _groups(
        self, index: int, block: nn.Module, targets: list[Target], stacks: list[ExpertStack]
    ) -> list[tuple[list[Target], list[ExpertStack]]]:
        """The layers and expert stacks of a block that are calibrated in one pass, for each pass."""
        if not self.true_sequential or not targets:
            return [(targets, stacks)]
        first = functools.partial(self.calls.run, index, 0, self.calls.inputs[0])
        place = {id(target.module): number for number, target in enumerate(targets)}
        groups = reading_order(block, [target.module for target in targets], first)
        order = self.ranks.shared([[place[id(layer)] for layer in group] for group in groups], 0)
        passes: list[tuple[list[Target], list[ExpertStack]]] = []
        passes += [([targets[number] for number in group], []) for group in order]
        return [*passes, ([], stacks)] if stacks else passes

    def _fine_tune(self, index: int, block: nn.Module, outputs: Activations | None) -> BlockReport:
        assert self.finetune is not None
        assert outputs is not None
        start = time.perf_counter()
        with self._phase("fine-tune", index):
            seed = self.targets[0].config.seed
            errors = finetune_block(block, self.calls, index, outputs, self.finetune, seed=seed, ranks=self.ranks)
        self.ranks.like_first(continuous(block).values())
        self.tuned.append(self.ranks.shared(BlockReport(index, *errors, time.perf_counter() - start), 0))
        return self.tuned[-1]

    def _take(self, target: Target) -> None:
        """Take a finished layer from the work folder."""
        assert self.work is not None
        self._put(target, *self.work.load_layer(target.fqn, target.module.weight.device))

    def _put(self, target: Target, report: LayerReport, weight: AQLMTensor) -> None:
        """Put a layer that was solved elsewhere in its place."""
        set_quantized(self.sharing[id(target.module.weight)], weight)
        self.layers.append(report)
        self._tell(report)

    def _take_block(self, index: int, block: nn.Module, targets: list[Target], stacks: list[ExpertStack]) -> None:
        """Take a finished block from the work folder."""
        assert self.work is not None
        with self._phase("quantize", index):
            for target in targets:
                if target.fqn in self.finished_layers:
                    self._take(target)
            left = [target for target in targets if not _is_quantized(target)]
            self.skipped |= {target.fqn: _UNOBSERVED for target in self._waiting(index, left)[1]}
            for stack in stacks:
                self._convert_experts(stack, None)
            tuned = self.work.load_block(index, block)
        self.tuned += [] if tuned is None else [BlockReport(**tuned)]

    def _each_output(self, index: int) -> Iterator[Tensor]:
        for batch, hidden in enumerate(self.calls.inputs):
            yield self.calls.run(index, batch, hidden)

    def _outputs(self, index: int) -> Activations:
        outputs = self.calls.activations()
        for output in self._each_output(index):
            outputs.append(output)
        return outputs

    def _layer_done(self, dense: dict[str, Tensor], report: LayerReport) -> None:
        weight, before = self.model.get_submodule(report.fqn).weight, dense.pop(report.fqn)
        assert isinstance(weight, AQLMTensor)
        set_quantized(self.sharing[id(before)], weight)  # of other blocks, too
        calibrated = CalibratedLayer(**asdict(report), weight_error=_weight_error(before, weight))
        if self.work is not None:
            self.work.save_layer(calibrated, weight)
        self.layers.append(calibrated)
        self._tell(calibrated)

    @contextlib.contextmanager
    def _phase(self, phase: Phase, index: int) -> Iterator[None]:
        self.now = (phase, index)
        self._tell()
        with self.watch.phase(phase):
            yield

    def _tell(self, layer: LayerReport | None = None) -> None:
        self.pace.quantized(0 if layer is None else math.prod(layer.shape))
        if self.on_progress is not None:
            phase, index = self.now
            blocks = len(self.blocks)
            total = len(self.targets) + sum(len(stack.weight) for stack in self.stacks)
            left = self.pace.left(blocks - index - 1)
            self.on_progress(Progress(phase, index, blocks, len(self.layers), total, layer, *left))

    @contextlib.contextmanager
    def remedies(self, work_dir: str | Path | None) -> Iterator[None]:
        """Add to an error where it came; for want of memory or disk also what is kept, and what to do."""
        try:
            yield
        except ValueError as error:
            phase, index = self.now
            if phase != "capture":
                error.add_note(f"This was in block {index + 1} of {len(self.blocks)} ({phase}).")
            raise
        except (MemoryError, RuntimeError, OSError) as error:
            remedy = _remedy(error, self.device)
            if remedy is not None:
                phase, index = self.now
                kept = (
                    f"{len(self.layers)} finished layers are kept in {work_dir}: go on from there with resume=True "
                    "(--resume)"
                    if self.work is not None
                    else "nothing was kept: pass work_dir to keep finished layers"
                )
                error.add_note(f"This was in block {index + 1} of {len(self.blocks)} ({phase}); {kept}. {remedy}")
            raise


def _is_quantized(target: Target) -> bool:
    return isinstance(target.module.weight, AQLMTensor)


def _tokens(module: nn.Module) -> int:
    observer = observer_of(module)
    return 0 if observer is None else observer.tokens


def _weight_of(parts: list[Tensor], device: torch.device) -> AQLMTensor:
    codes, codebooks, scales = (part.to(device) for part in parts)
    return AQLMTensor(codes, codebooks, scales)


def _remedy(error: Exception, device: torch.device) -> str | None:
    """What helps against an error for want of memory or disk; None for other errors."""
    if isinstance(error, OSError):
        return "Make room on the disk first." if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
        return None
    moved = "" if device.type == "cpu" else ", a model in CPU memory with device=... (one block at a time on the GPU)"
    return f'To need less memory: keep_inputs="cpu" or "disk" (--keep-inputs), smaller or fewer batches{moved}.'


def _weight_error(dense: Tensor, weight: AQLMTensor) -> float:
    """|W - What|^2 / |W|^2, some rows at a time."""
    error = total = 0.0
    for ours, theirs in zip(weight.dequantize().split(1024), dense.split(1024), strict=True):
        error += float((ours.float() - theirs.float()).square().sum(dtype=torch.float64))
        total += float(theirs.float().square().sum(dtype=torch.float64))
    return error / total if total else error


def _at_step(step: Literal["prepare", "convert"], targets: Sequence[Target]) -> FqnToConfig:
    return FqnToConfig(OrderedDict((target.fqn, replace(target.config, step=step)) for target in targets))
