"""calibrate: quantize a decoder block by block, each on the inputs it will really have.

`quantize_` with "prepare" and "convert" sees the inputs of the dense model. Here a block sees what the quantized blocks
before it put out, as in GPTQ and AQLM, so that errors are not multiplied from block to block; its continuous parameters
can then be fine-tuned against the output that the dense block has for the same inputs; and only one block's X^T X is in
memory. It costs a second forward pass of each block.

With a work folder every layer is kept as soon as it is done (`aqlm_tensor.work_folder`), and a run that was killed
resumes to the same bits: forward passes are repeated, finished layers and finished fine-tuning are not.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from aqlm_tensor.api import QuantizationReport, quantize_
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.finetune import FinetuneConfig, finetune_block
from aqlm_tensor.handler import LayerReport
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.quantizer.observers import detach_observers
from aqlm_tensor.sequential import BlockCalls, dense_weights, find_blocks, linears_of, members
from aqlm_tensor.targets import Target, find_targets
from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.work_folder import WorkFolder

__all__ = ["BlockReport", "CalibrationReport", "Progress", "calibrate"]

Phase = Literal["calibrate", "quantize", "fine-tune", "propagate"]


@dataclass(frozen=True)
class Progress:
    """Where `calibrate` is.

    Attributes:
        phase: "calibrate" (collecting X^T X), "quantize", "fine-tune", or "propagate" (computing the next block's
            input).
        block: index of the block.
        blocks: blocks in all.
        done: layers quantized so far.
        layers: layers to quantize in all.
        layer: report of the layer that was just quantized, if one was.
    """

    phase: Phase
    block: int
    blocks: int
    done: int
    layers: int
    layer: LayerReport | None = None


@dataclass(frozen=True)
class BlockReport:
    """One block that was fine-tuned.

    Attributes:
        block: its index.
        error_before: mean over held-out tokens of |output - target|^2 / |target|^2 before fine-tuning.
        error_after: the same after it.
        seconds: wall time of fine-tuning.
    """

    block: int
    error_before: float
    error_after: float
    seconds: float


@dataclass(frozen=True)
class CalibrationReport(QuantizationReport):
    """What `calibrate` did.

    Attributes:
        blocks: a report for each block that was fine-tuned.
    """

    blocks: tuple[BlockReport, ...] = ()

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.blocks:
            before, after = (
                sum(getattr(block, name) for block in self.blocks) for name in ("error_before", "error_after")
            )
            seconds = sum(block.seconds for block in self.blocks)
            lines.append(
                f"fine-tuned {len(self.blocks)} blocks, error of their outputs {before / len(self.blocks):.3g} -> "
                f"{after / len(self.blocks):.3g} on average, in {seconds:.1f} s"
            )
        return "\n".join(lines)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    config: AQLMWeightConfig,
    batches: Sequence[Tensor],
    *,
    blocks: Iterable[nn.Module] | None = None,
    finetune: FinetuneConfig | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    after_block: Callable[[int], None] | None = None,
) -> CalibrationReport:
    """Quantize the linear layers of a model's blocks in place, in order, on the inputs they will really have.

    An exception leaves every layer either dense or quantized.

    Args:
        model: a decoder; called as model(batch).
        config: what to do with each layer; its `step` is ignored.
        batches: token ids, all of one shape [B, seqlen], without padding.
        blocks: the blocks to quantize, in the order in which the model calls them; by default those of `find_blocks`.
            They must begin with the first one that the model calls.
        finetune: fine-tune each block so; None does not.
        work_dir: keep finished layers and blocks in this folder.
        resume: go on with what `work_dir` holds; the model must be the dense one again, and everything else the same.
        on_progress: called at each change of phase and after each layer.
        after_block: called with the number of blocks quantized so far, when the model may be run (to evaluate it, say).

    Returns:
        The layers that were quantized (those taken from `work_dir` included), the blocks that were fine-tuned and the
        layers left dense (the others outside of the blocks are not listed).

    Raises:
        ValueError: as `quantize_`, before any change; for batches of different shapes; for a model that is not a plain
            sequence of blocks; and if what `work_dir` holds was made from another model, config or data.
        FileExistsError: if `work_dir` holds something and `resume` was not asked for.
    """
    if not batches or len({batch.shape for batch in batches}) != 1:
        raise ValueError(f"batches must be token ids of one shape, got {sorted({tuple(b.shape) for b in batches})}")
    if finetune is not None:
        finetune.held_out(len(batches))  # raises for too few, before any work
    if resume and work_dir is None:
        raise ValueError("resume needs the work_dir of the run to go on with")
    chosen = list(find_blocks(model) if blocks is None else blocks)
    config = replace(config, step="prepare")
    targets, skipped = find_targets(model, config, members(linears_of(chosen)))
    work = None
    if work_dir is not None:
        work = WorkFolder(Path(work_dir), resume=resume)
        work.check_same({"config": config, "finetune": finetune}, chosen, batches)
    training = model.training
    model.eval()
    try:
        calls = BlockCalls(model, chosen, batches)
        run = _Run(model, config, finetune, calls, len(chosen), targets, work, on_progress)
        for index, block in enumerate(chosen):
            run.quantize(index, block)
            if after_block is not None:
                after_block(index + 1)
    finally:
        model.train(training)
    return CalibrationReport(tuple(run.layers), (), skipped, tuple(run.tuned))


@dataclass
class _Run:
    """One call of `calibrate`, block by block."""

    model: nn.Module
    config: AQLMWeightConfig
    finetune: FinetuneConfig | None
    calls: BlockCalls
    blocks: int
    targets: list[Target]
    work: WorkFolder | None
    on_progress: Callable[[Progress], None] | None
    layers: list[LayerReport] = field(default_factory=list)
    tuned: list[BlockReport] = field(default_factory=list)

    def quantize(self, index: int, block: nn.Module) -> None:
        """Calibrate, quantize and fine-tune a block, and compute what the next one gets."""
        chosen = set(map(id, linears_of([block])))
        targets = [target for target in self.targets if id(target.module) in chosen]
        finished = self.work is not None and self.work.has_block(index)
        if targets and not finished:
            outputs = self._quantize_layers(index, block, targets)
            if self.finetune is not None:
                self._fine_tune(index, block, outputs)
            if self.work is not None:
                self.work.save_block(index, block, self.tuned[-1] if self.finetune is not None else None)
        elif finished:
            assert self.work is not None
            for target in targets:
                self._take(index, target)
            tuned = self.work.load_block(index, block)
            self.tuned += [] if tuned is None else [BlockReport(**tuned)]
        if index + 1 < self.blocks:
            with dense_weights(block):
                self.calls.hidden = self._pass("propagate", index)

    def _quantize_layers(self, index: int, block: nn.Module, targets: list[Target]) -> list[Tensor]:
        """Quantize the layers of a block; the outputs that the dense block has for its inputs."""
        linears = [target.module for target in targets]
        try:
            quantize_(self.model, self.config, members(linears))
            outputs = self._pass("calibrate", index)
            self._tell("quantize", index)
            for target in targets:
                if self.work is not None and self.work.has_layer(target.fqn):
                    self._take(index, target)
                    detach_observers([target.module])
            dense = [layer for layer in linears if not isinstance(layer.weight, AQLMTensor)]
            done = functools.partial(self._layer_done, index)
            if dense:
                quantize_(self.model, replace(self.config, step="convert"), members(dense), on_layer=done)
            return outputs
        finally:
            detach_observers(block.modules())

    def _fine_tune(self, index: int, block: nn.Module, outputs: list[Tensor]) -> None:
        assert self.finetune is not None
        self._tell("fine-tune", index)
        start = time.perf_counter()

        def call(_batch: int, hidden: Tensor) -> Tensor:
            return self.calls.run(index, hidden)

        errors = finetune_block(block, call, self.calls.hidden, outputs, self.finetune, seed=self.config.seed)
        self.tuned.append(BlockReport(index, *errors, time.perf_counter() - start))

    def _take(self, index: int, target: Target) -> None:
        """Take a finished layer from the work folder."""
        assert self.work is not None
        report, weight = self.work.load_layer(target.fqn, target.module.weight.device)
        dense = target.module.weight
        sharing = [layer for layer in linears_of([self.model]) if layer.weight is dense]
        set_quantized(sharing, weight)
        self.layers.append(report)
        self._tell("quantize", index, report)

    def _pass(self, phase: Phase, index: int) -> list[Tensor]:
        self._tell(phase, index)
        return [self.calls.run(index, hidden) for hidden in self.calls.hidden]

    def _layer_done(self, index: int, report: LayerReport) -> None:
        if self.work is not None:
            weight = self.model.get_submodule(report.fqn).weight
            assert isinstance(weight, AQLMTensor)
            self.work.save_layer(report, weight)
        self.layers.append(report)
        self._tell("quantize", index, report)

    def _tell(self, phase: Phase, index: int, layer: LayerReport | None = None) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(phase, index, self.blocks, len(self.layers), len(self.targets), layer))
