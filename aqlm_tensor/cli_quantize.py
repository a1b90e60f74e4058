"""`aqlm-tensor quantize`: load, calibrate and quantize block by block, save."""

import errno
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aqlm_tensor import (
    AQLMWeightConfig,
    CalibrationReport,
    FinetuneConfig,
    QuantizationReport,
    calibrate,
    quantize_,
)
from aqlm_tensor.checkpoint_io import check_replaceable
from aqlm_tensor.cli_arguments import open_model, read_text, text_tokens
from aqlm_tensor.cli_output import UsageError, bar, emit, note, phase, print_json, usage
from aqlm_tensor.handler import LayerReport
from aqlm_tensor.hf_model import find_model, save_model
from aqlm_tensor.run_report import Progress
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.sequential import find_blocks, in_blocks, sample_windows
from aqlm_tensor.targets import find_targets

__all__ = ["batched", "quantize_with_bar", "run"]

_TOKENS_AT_ONCE = 2048  # more only costs memory


def run(
    model_path: str,
    out: Path,
    scheme: str,
    *,
    gguf_file: str | None,
    data: Path | None,
    nsamples: int,
    seqlen: int,
    seed: int,
    finetune: bool,
    work_dir: Path | None,
    resume: bool,
    dtype: str,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize a model on disk to a new folder; see `aqlm-tensor quantize --help`."""
    start = time.monotonic()
    if data is None and (finetune or work_dir is not None or resume):
        raise UsageError("--finetune, --work-dir and --resume need --data: without it there is nothing to calibrate on")
    if resume and work_dir is None:
        raise UsageError("--resume needs the --work-dir of the run to go on with")
    with usage():
        config = AQLMWeightConfig(scheme, seed=seed)
        source = find_model(model_path, gguf_file)
        check_replaceable(out, force=force)
    if source.kind == "aqlm":
        raise UsageError(f"{source} is quantized already: pass the dense model")
    if out.resolve() == source.folder.resolve():
        raise UsageError(f"OUT {str(out)!r} is the model's own folder: choose another one")
    text = None if data is None else read_text(data)
    model, tokenizer = open_model(source, None, dtype, device)
    layers = _check_space(model, config, out)
    if text is None:
        note(
            "no --data: quantizing without calibration. At about 2 bits that ruins small models; for quality pass a "
            "text like what the model will be used on.",
            style="yellow",
        )
        report = _data_free(model, config, layers)
        tokens = 0
    else:
        batches = sample_windows(text_tokens(tokenizer, text, seqlen, f"one window of {seqlen}"), nsamples, seqlen)
        tokens = sum(batch.numel() for batch in batches)
        note(f"calibrating on {len(batches)} windows of {seqlen} tokens")
        tuning = FinetuneConfig() if finetune else None
        joined = batches if finetune else batched(batches)  # to tune, one step for each window
        report = quantize_with_bar(model, config, joined, finetune=tuning, work_dir=work_dir, resume=resume)
    with phase(f"saving {out}"):
        save_model(model, tokenizer, out, force=force)
    _print(report, out, tokens, time.monotonic() - start, as_json)


def batched(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Windows [1, seqlen] joined to batches of one shape and a few thousand tokens."""
    most = max(1, _TOKENS_AT_ONCE // samples[0].shape[1])
    size = next(size for size in range(min(most, len(samples)), 0, -1) if len(samples) % size == 0)
    return [torch.cat(samples[first : first + size]) for first in range(0, len(samples), size)]


def quantize_with_bar(
    model: Any,
    config: AQLMWeightConfig,
    batches: list[torch.Tensor],
    *,
    max_blocks: int | None = None,
    **options: Any,
) -> CalibrationReport:
    """`calibrate` with a progress bar, the first `max_blocks` blocks (default: all), with more of its options."""
    layers = len(find_targets(model, config, in_blocks(model, max_blocks))[0])
    with bar("quantizing", layers, "layers") as shown:

        def show(progress: Progress) -> None:
            shown.update(progress.done, f"block {progress.block + 1}/{progress.blocks}: {progress.phase}")

        blocks = find_blocks(model)[:max_blocks]
        return calibrate(model, config, batches, blocks=blocks, on_progress=show, **options)


def _data_free(model: Any, config: AQLMWeightConfig, layers: int) -> QuantizationReport:
    done = 0
    with bar("quantizing", layers, "layers") as shown:

        def show(report: LayerReport) -> None:
            nonlocal done
            done += 1
            shown.update(done, report.fqn)

        return quantize_(model, config, in_blocks(model), on_layer=show)


def _check_space(model: Any, config: AQLMWeightConfig, out: Path) -> int:
    """The number of layers that will be quantized, after checking that the scheme fits and the result has space."""
    with usage():
        targets, _ = find_targets(model, config, in_blocks(model))
    scheme = AQLMScheme.parse(config.scheme)
    needed = sum(parameter.nbytes for parameter in model.parameters())
    for target in targets:
        weight = target.module.weight
        needed += scheme.stored_bits(*weight.shape, float_bits=8 * weight.element_size()) // 8 - weight.nbytes
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"not enough space: the result takes {needed / 1e6:.0f} MB, free are {free / 1e6:.0f} MB; choose another "
            "folder or make room",
            str(out),
        )
    return len(targets)


def _print(report: QuantizationReport, out: Path, tokens: int, seconds: float, as_json: bool) -> None:
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if as_json:
        print_json(
            {
                "folder": str(out),
                "bytes": size,
                "calibration_tokens": tokens,
                "seconds": seconds,
                "layers": [asdict(layer) for layer in report.layers],
                "blocks": [asdict(block) for block in report.blocks] if isinstance(report, CalibrationReport) else [],
                "skipped": report.skipped,
            }
        )
        return
    emit(str(report))
    emit(f"saved {out}: {size / 1e6:.1f} MB of weights, {seconds:.0f} s in all")
    emit(f"next: aqlm-tensor eval {out} --data TEXT   or   aqlm-tensor generate {out} --prompt ...")
