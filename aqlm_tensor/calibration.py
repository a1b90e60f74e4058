"""calibrate: quantize a model block by block, each on the inputs it will really have.

`quantize_` with "prepare" and "convert" sees the inputs of the dense model. Here a block sees what the quantized blocks
before it put out, as in GPTQ and AQLM, so that errors are not multiplied from block to block; its continuous parameters
can then be fine-tuned against the output that the dense block has for the same inputs; and only one block's X^T X is in
memory, and on request only one block on the GPU. It costs a second forward pass of each block.

With a work folder every layer is kept as soon as it is done (`aqlm_tensor.work_folder`), and a run that was killed, ran
out of memory or filled the disk resumes to the same bits: forward passes are repeated, finished layers and finished
fine-tuning are not.
"""

import contextlib
import errno
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from aqlm_tensor.activations import PLACES, Activations, Place
from aqlm_tensor.api import quantize_
from aqlm_tensor.block_calls import Batch, BlockCalls, on_device, tensors_of
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.experts import ExpertObserver, ExpertStack, find_stacks, one_by_one, quantize_expert
from aqlm_tensor.finetune import FinetuneConfig, finetune_block
from aqlm_tensor.handler import LayerReport
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.quantizer.observers import detach_observers
from aqlm_tensor.run_report import BlockReport, CalibratedLayer, CalibrationReport, Phase, Progress, Stopwatch
from aqlm_tensor.sequential import dense_weights, find_blocks, linears_of, members, reading_order
from aqlm_tensor.targets import Target, find_targets
from aqlm_tensor.tensor import AQLMTensor
from aqlm_tensor.work_folder import WorkFolder, as_json, fingerprint

__all__ = ["calibrate"]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    config: AQLMWeightConfig | FqnToConfig,
    batches: Sequence[Batch],
    *,
    blocks: Iterable[nn.Module] | None = None,
    finetune: FinetuneConfig | None = None,
    true_sequential: bool = False,
    device: torch.device | str | None = None,
    keep_inputs: Place = "device",
    work_dir: str | Path | None = None,
    resume: bool = False,
    data_origin: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    after_block: Callable[[int], None] | None = None,
) -> CalibrationReport:
    """Quantize the linear layers of a model's blocks in place, in order, on the inputs they will really have.

    Experts that are one stack of weights [E, O, I] are quantized, too, each with the tokens that it sees
    (`aqlm_tensor.experts`); fine-tuning leaves them alone. An exception leaves every layer either dense or quantized,
    and a layer that was done in `work_dir`.

    Args:
        model: a decoder or encoder that is a plain sequence of blocks; only the hidden state may depend on what earlier
            blocks compute.
        config: what to do with each layer, or torchao's FqnToConfig for a scheme per layer; `step` is ignored.
        batches: each a tensor (token ids [B, seqlen], say), called as model(batch), or a mapping of keywords, called as
            model(**batch). Shapes may differ. Padded positions count like others: rather cut texts than pad them.
        blocks: the blocks to quantize, in the order in which the model calls them; by default those of `find_blocks`.
            They must begin with the first one that the model calls.
        finetune: fine-tune each block so; None does not.
        true_sequential: calibrate the layers of a block one group after another (q, k, v; o; gate, up; down), each on
            what the quantized groups before it put out, as GPTQ's option of that name; it takes a forward pass of the
            block for each group.
        device: where to compute. Each block is moved there and back, so the model can stay in (or be mapped to) CPU
            memory; None computes where the first block is.
        keep_inputs: where the inputs of a block wait: "device", "cpu" or "disk" (in `work_dir`, or with the system's
            temporary files).
        work_dir: keep finished layers and blocks in this folder.
        resume: go on with what `work_dir` holds; the model must be the dense one again, and everything else the same.
        data_origin: JSON-able notes on where the batches come from, for the report ("data", "origin").
        on_progress: called at each change of phase and after each layer.
        after_block: called with the number of blocks quantized so far, when the model may be run (to evaluate it, say).

    Returns:
        The layers that were quantized (those taken from `work_dir` included), the blocks that were fine-tuned, the
        layers left dense (the others outside of the blocks are not listed), and what the run was made from and took.

    Raises:
        ValueError: as `quantize_`, before any change; for a model that is not a plain sequence of blocks; and if what
            `work_dir` holds was made from another model, config or data.
        TypeError: for batches of another type.
        FileExistsError: if `work_dir` holds something and `resume` was not asked for.
        MemoryError, torch.OutOfMemoryError, OSError: if memory or the disk do not suffice, with a note on the remedy.
    """
    _check_batches(batches, finetune)
    if keep_inputs not in PLACES:
        raise ValueError(f"keep_inputs must be one of {', '.join(map(repr, PLACES))}, got {keep_inputs!r}")
    if resume and work_dir is None:
        raise ValueError("resume needs the work_dir of the run to go on with")
    chosen = list(find_blocks(model) if blocks is None else blocks)
    stacks, dense_stacks = find_stacks(model, config, chosen)
    config, targets, skipped = _to_prepare(model, config, chosen)
    settings = {"config": config, "finetune": finetune, "true_sequential": true_sequential}
    settings = {name: as_json(value) for name, value in settings.items()}
    tensors = [tensor for batch in batches for tensor in tensors_of(batch)]
    data: dict[str, Any] = {"batches": len(batches), "tokens": _tokens(batches), "sha256": fingerprint(tensors)}
    data["origin"] = None if data_origin is None else dict(data_origin)
    where = next(chosen[0].parameters()).device if device is None else torch.empty(0, device=device).device
    watch = Stopwatch(where)
    run = _Run(model, finetune, true_sequential, chosen, targets, stacks, where, keep_inputs, watch, on_progress)
    training = model.training
    model.eval()
    try:
        with run.remedies(work_dir):
            if work_dir is not None:
                run.work = WorkFolder(Path(work_dir), resume=resume)
                run.work.check_same(settings, chosen, data["sha256"])
            resumed = run.work is not None and run.work.finished_layers > 0
            run.capture(batches)
            for index, block in enumerate(chosen):
                run.quantize(index, block)
                if after_block is not None:
                    after_block(index + 1)
    finally:
        model.train(training)
    record = watch.record({**settings, "blocks": len(chosen)}, data, resumed=resumed)
    return CalibrationReport(tuple(run.layers), (), skipped | dense_stacks, tuple(run.tuned), record)


def _to_prepare(
    model: nn.Module, config: AQLMWeightConfig | FqnToConfig, blocks: Sequence[nn.Module]
) -> tuple[AQLMWeightConfig | FqnToConfig, list[Target], dict[str, str]]:
    """The config at step "prepare", the layers of the blocks that it applies to, and why not to the others."""
    inside = members(linears_of(blocks))
    if isinstance(config, AQLMWeightConfig):
        config = replace(config, step="prepare")
        return config, *find_targets(model, config, inside)
    at_step = {
        key: replace(one, step="prepare") if isinstance(one, AQLMWeightConfig) else one
        for key, one in config.fqn_to_config.items()
    }
    config = FqnToConfig(OrderedDict(at_step))
    found, skipped = find_targets(model, config, None)
    targets = [target for target in found if inside(target.module, target.fqn)]
    outside = [target.fqn for target in found if not inside(target.module, target.fqn)]
    if not targets:
        raise ValueError(f"no layer that config names is in the blocks: it names {', '.join(list(at_step)[:5])}")
    return config, targets, skipped | dict.fromkeys(outside, "it is in none of the blocks")


def _at_step(step: Literal["prepare", "convert"], targets: Sequence[Target]) -> FqnToConfig:
    return FqnToConfig(OrderedDict((target.fqn, replace(target.config, step=step)) for target in targets))


def _check_batches(batches: Sequence[Batch], finetune: FinetuneConfig | None) -> None:
    if not batches:
        raise ValueError("no batches to calibrate on: pass some, of real inputs")
    for batch in batches:
        if not isinstance(batch, Tensor | Mapping):
            raise TypeError(
                f"a batch must be a tensor or a mapping of keywords to tensors, got {type(batch).__name__}: pass a "
                'list of such batches, for example [{"input_ids": ids, "pixel_values": images}]'
            )
    if finetune is not None:
        finetune.held_out(len(batches))  # raises for too few, before any work


def _tokens(batches: Sequence[Batch]) -> int:
    """Tokens in all, where batches are, or hold, token ids."""
    ids = [batch if isinstance(batch, Tensor) else batch.get("input_ids") for batch in batches]
    return sum(tensor.numel() for tensor in ids if isinstance(tensor, Tensor) and not tensor.is_floating_point())


@dataclass
class _Run:
    """One call of `calibrate`, block by block."""

    model: nn.Module
    finetune: FinetuneConfig | None
    true_sequential: bool
    blocks: list[nn.Module]
    targets: list[Target]
    stacks: list[ExpertStack]
    device: torch.device
    place: Place
    watch: Stopwatch
    on_progress: Callable[[Progress], None] | None
    work: WorkFolder | None = None
    layers: list[LayerReport] = field(default_factory=list)
    tuned: list[BlockReport] = field(default_factory=list)
    now: tuple[Phase, int] = ("capture", 0)

    def capture(self, batches: Sequence[Batch]) -> None:
        """Learn what the blocks are called with."""
        with self._phase("capture", 0):
            folder = None if self.work is None else self.work.path
            self.calls = BlockCalls(
                self.model, self.blocks, batches, device=self.device, place=self.place, folder=folder
            )

    def quantize(self, index: int, block: nn.Module) -> None:
        """Calibrate, quantize and fine-tune a block, and compute what the next one gets."""
        chosen = set(map(id, linears_of([block])))
        targets = [target for target in self.targets if id(target.module) in chosen]
        inside = set(map(id, block.modules()))
        stacks = [stack for stack in self.stacks if id(stack.module) in inside]
        finished = self.work is not None and self.work.has_block(index)
        with on_device(block, self.device):
            if (targets or stacks) and not finished:
                outputs = self._quantize_layers(index, block, targets, stacks)
                if self.finetune is not None:
                    with dense_weights(nn.ModuleList(stack.module for stack in stacks)):
                        self._fine_tune(index, block, outputs)
                if self.work is not None:
                    self.work.save_block(index, block, self.tuned[-1] if self.finetune is not None else None)
            elif finished:
                self._take_block(index, block, targets, stacks)
            if index + 1 < len(self.blocks):
                with dense_weights(block), self._phase("propagate", index):
                    self.calls.inputs = self._outputs(index)

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
                with self._phase("quantize", index):
                    self._convert(group)
                    for stack in watched:
                        self._convert_experts(stack, observer)
        finally:
            detach_observers(block.modules())
        return outputs

    def _convert(self, targets: list[Target]) -> None:
        """Quantize prepared layers, but for those that the work folder holds."""
        for target in targets:
            if self.work is not None and self.work.has_layer(target.fqn):
                self._take(target)
                detach_observers([target.module])
        dense = [target for target in targets if not isinstance(target.module.weight, AQLMTensor)]
        weights = {target.fqn: target.module.weight for target in dense}
        done = functools.partial(self._layer_done, weights)
        if dense:
            quantize_(self.model, _at_step("convert", dense), on_layer=done)

    def _convert_experts(self, stack: ExpertStack, observer: ExpertObserver | None) -> None:
        """Quantize each expert of a stack, but for those that the work folder holds; all, without an observer."""
        weights: list[Tensor] = []
        for expert in range(len(stack.weight)):
            name, dense = stack.expert(expert), stack.weight[expert]
            if self.work is not None and self.work.has_layer(name):
                report, weight = self.work.load_layer(name, dense.device)
            else:
                assert observer is not None
                weight, plain = quantize_expert(stack, expert, observer)
                report = CalibratedLayer(**asdict(plain), weight_error=_weight_error(dense, weight))
                if self.work is not None:
                    self.work.save_layer(report, weight)
            weights.append(weight)
            self.layers.append(report)
            self._tell(report)
        stacked = torch.stack(weights)
        assert isinstance(stacked, AQLMTensor)
        stack.replace(stacked)

    def _groups(
        self, index: int, block: nn.Module, targets: list[Target], stacks: list[ExpertStack]
    ) -> list[tuple[list[Target], list[ExpertStack]]]:
        """The layers and expert stacks of a block that are calibrated in one pass, for each pass."""
        if not self.true_sequential or not targets:
            return [(targets, stacks)]
        first = functools.partial(self.calls.run, index, 0, self.calls.inputs[0])
        by_layer = {id(target.module): target for target in targets}
        groups = reading_order(block, [target.module for target in targets], first)
        passes: list[tuple[list[Target], list[ExpertStack]]] = []
        passes += [([by_layer[id(layer)] for layer in group], []) for group in groups]
        return [*passes, ([], stacks)] if stacks else passes

    def _fine_tune(self, index: int, block: nn.Module, outputs: Activations | None) -> None:
        assert self.finetune is not None
        assert outputs is not None
        start = time.perf_counter()
        call = functools.partial(self.calls.run, index)
        with self._phase("fine-tune", index):
            errors = finetune_block(
                block, call, self.calls.inputs, outputs, self.finetune, seed=self.targets[0].config.seed
            )
        self.tuned.append(BlockReport(index, *errors, time.perf_counter() - start))

    def _take(self, target: Target) -> None:
        """Take a finished layer from the work folder."""
        assert self.work is not None
        report, weight = self.work.load_layer(target.fqn, target.module.weight.device)
        dense = target.module.weight
        sharing = [layer for layer in linears_of([self.model]) if layer.weight is dense]
        set_quantized(sharing, weight)
        self.layers.append(report)
        self._tell(report)

    def _take_block(self, index: int, block: nn.Module, targets: list[Target], stacks: list[ExpertStack]) -> None:
        """Take a finished block from the work folder."""
        assert self.work is not None
        with self._phase("quantize", index):
            for target in targets:
                self._take(target)
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
        weight = self.model.get_submodule(report.fqn).weight
        assert isinstance(weight, AQLMTensor)
        calibrated = CalibratedLayer(**asdict(report), weight_error=_weight_error(dense.pop(report.fqn), weight))
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
        if self.on_progress is not None:
            phase, index = self.now
            total = len(self.targets) + sum(len(stack.weight) for stack in self.stacks)
            self.on_progress(Progress(phase, index, len(self.blocks), len(self.layers), total, layer))

    @contextlib.contextmanager
    def remedies(self, work_dir: str | Path | None) -> Iterator[None]:
        """Add to an error for want of memory or disk where it came, what is kept, and what to do."""
        try:
            yield
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
