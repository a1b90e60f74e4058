"""What `aqlm-tensor quantize` does to the model, with progress bars, and how windows become batches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torchao.quantization import FqnToConfig

from aqlm_tensor import AQLMWeightConfig, CalibrationReport, FinetuneConfig, QuantizationReport, calibrate, quantize_
from aqlm_tensor.blocks import find_blocks, in_blocks
from aqlm_tensor.calibration.experts import find_stacks
from aqlm_tensor.calibration.report import Progress
from aqlm_tensor.cli.output import bar, note
from aqlm_tensor.cli.report import block_line
from aqlm_tensor.handler import LayerReport
from aqlm_tensor.targets import find_targets

__all__ = [
    "batched",
    "quantize_on_dense_inputs",
    "quantize_with_bar",
    "quantize_without_data",
    "tuning",
    "windows_at_once",
]

_TOKENS_AT_ONCE = 2048  # more only costs memory
_BATCHES = 8  # if there are as many windows: processes share them, and their number must not change the batches
_WINDOWS_PER_STEP = 4  # of fine-tuning, as in the benchmarks
_STEPS = 32  # of an epoch, if there are as many windows


def windows_at_once(windows: int, seqlen: int) -> int:
    """How many of so many windows of so many tokens make a batch: a few thousand tokens, in batches of one shape."""
    most = max(1, min(_TOKENS_AT_ONCE // seqlen, windows // _BATCHES))
    return next(size for size in range(most, 0, -1) if windows % size == 0)


def batched(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Windows [1, seqlen] joined to batches."""
    size = windows_at_once(len(samples), samples[0].shape[1])
    return [torch.cat(samples[first : first + size]) for first in range(0, len(samples), size)]


def tuning(windows: int) -> FinetuneConfig:
    """How blocks are fine-tuned on so many windows."""
    return FinetuneConfig(batches_per_step=max(1, min(_WINDOWS_PER_STEP, windows // _STEPS)))


def quantize_with_bar(
    model: Any,
    config: AQLMWeightConfig | FqnToConfig,
    batches: list[torch.Tensor],
    *,
    max_blocks: int | None = None,
    after_block: Callable[[int], None] = lambda done: None,  # noqa: ARG005
    **options: Any,
) -> CalibrationReport:
    """`calibrate` with progress bars, the first `max_blocks` blocks (default: all), with more of its options."""
    chosen = in_blocks(model, max_blocks)
    if isinstance(config, FqnToConfig):
        layers = sum(chosen(target.module, target.fqn) for target in find_targets(model, config, None)[0])
    else:
        layers = len(find_targets(model, config, chosen)[0])
    blocks = find_blocks(model)[:max_blocks]
    layers += sum(len(stack.weight) for stack in find_stacks(model, config, list(blocks))[0])
    with bar("layers", layers, "layers", outer=("blocks", len(blocks))) as shown:
        latest: list[LayerReport] = []

        def show(progress: Progress) -> None:
            latest.extend([] if progress.layer is None else [progress.layer])
            where = f"block {progress.block + 1}/{progress.blocks}: {progress.phase}"
            where += "" if progress.block_left is None else f", {progress.block_left:.0f} s"
            shown.update(progress.done, where, progress.block, progress.left)

        def block_done(done: int) -> None:
            note(f"block {done}/{len(blocks)}: {block_line(latest)}")
            latest.clear()
            after_block(done)

        report = calibrate(model, config, batches, blocks=blocks, on_progress=show, after_block=block_done, **options)
        shown.update(layers, "", len(blocks), 0.0)
        return report


def quantize_without_data(model: Any, config: AQLMWeightConfig, layers: int) -> QuantizationReport:
    """Quantize without calibration, and say what that means."""
    note(
        "no --data: quantizing without calibration. At about 2 bits that ruins small models; for quality pass a text "
        "like what the model will be used on.",
        style="yellow",
    )
    return _with_bar(model, config, layers)


def _with_bar(model: Any, config: AQLMWeightConfig, layers: int) -> QuantizationReport:
    """`quantize_` of the blocks with a progress bar."""
    done = 0
    with bar("quantizing", layers, "layers") as shown:

        def show(report: LayerReport) -> None:
            nonlocal done
            done += 1
            shown.update(done, report.fqn)

        return quantize_(model, config, in_blocks(model), on_layer=show)


@torch.no_grad()
def quantize_on_dense_inputs(
    model: Any, config: AQLMWeightConfig, batches: list[torch.Tensor], layers: int
) -> QuantizationReport:
    """Quantize on the inputs that all layers have in the dense model."""
    chosen = in_blocks(model)
    quantize_(model, replace(config, step="prepare"), chosen)
    with bar("calibrating", len(batches), "batches") as shown:
        for number, batch in enumerate(batches, start=1):
            model(batch.to(model.device), use_cache=False)
            shown.update(number)
    return _with_bar(model, replace(config, step="convert"), layers)
