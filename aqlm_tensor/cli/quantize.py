"""`aqlm-tensor quantize`: load, calibrate and quantize block by block, save."""

import contextlib
import datetime as dt
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchao.quantization import FqnToConfig

from aqlm_tensor import (
    AQLMWeightConfig,
    CalibrationReport,
    FinetuneConfig,
    QuantizationReport,
    calibrate,
    quantize_,
)
from aqlm_tensor.blocks import find_blocks, in_blocks, linears_of
from aqlm_tensor.calibration.activations import PLACES
from aqlm_tensor.calibration.experts import find_stacks
from aqlm_tensor.calibration.report import Progress
from aqlm_tensor.calibration.sources import parse_source
from aqlm_tensor.checkpoint_io import check_replaceable
from aqlm_tensor.cli.arguments import open_model, parse_device
from aqlm_tensor.cli.output import UsageError, bar, emit, note, phase, print_json, stderr, stdout, usage
from aqlm_tensor.cli.prepare import Kept, Wanted, prepare
from aqlm_tensor.cli.report import block_line, error_table
from aqlm_tensor.cli.tune import check_tune, tune_with_bar, write_tuning_report
from aqlm_tensor.handler import LayerReport
from aqlm_tensor.hf_model import find_model, save_model
from aqlm_tensor.pv.report import PVReport
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import find_targets

__all__ = ["REPORT_NAME", "batched", "quantize_with_bar", "run"]

REPORT_NAME = "quantization_report.json"
_TOKENS_AT_ONCE = 2048  # more only costs memory
_BATCHES = 8  # if there are as many windows: processes share them, and their number must not change the batches
_PATIENCE = dt.timedelta(hours=12)  # of ranks that wait for one that solves a large layer


def run(
    model_path: str,
    out: Path,
    scheme: str,
    *,
    gguf_file: str | None,
    data: str | None,
    bits: float | None,
    schemes: str,
    nsamples: int,
    seqlen: int,
    seed: int,
    finetune: bool,
    tune: str | None,
    blockwise: bool,
    true_sequential: bool,
    keep_inputs: str,
    work_dir: Path | None,
    resume: bool,
    dtype: str,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize a model on disk to a new folder; see `aqlm-tensor quantize --help`."""
    start = time.monotonic()
    by_block = data is not None and blockwise
    work = (out.with_name(out.name + ".work") if work_dir is None else work_dir) if by_block else None
    _check_options(
        by_block,
        keep_inputs,
        needing=(finetune, tune is not None, true_sequential, work_dir is not None, resume),
        has_data=data is not None,
        mixed=bits is not None,
    )
    check_tune(tune, nsamples)
    with usage():
        config = AQLMWeightConfig(scheme, seed=seed)
        candidates = tuple(str(AQLMScheme.parse(one)) for one in schemes.split(","))
        origin = None if data is None else parse_source(data)
        source = find_model(model_path, gguf_file)
        check_replaceable(out, force=force)
    if source.kind == "aqlm":
        raise UsageError(f"{source} is quantized already: pass the dense model")
    if out.resolve() == source.folder.resolve():
        raise UsageError(f"OUT {str(out)!r} is the model's own folder: choose another one")
    if work is not None and not resume and work.exists() and any(work.iterdir()):
        raise UsageError(f"{work} holds an earlier run: go on with it with --resume, or delete it")
    parse_device(device)
    group, device = join_ranks(device, by_block)
    ranks = Ranks(group)
    # block by block, one block at a time goes to the device
    model, tokenizer = open_model(source, None, dtype, "cpu" if by_block else device)
    layers = _check_space(model, config, out, bits)
    batches, provenance, mixed = [], {}, None
    kept = None if work is None else Kept(work)
    if origin is not None and data is not None:
        wanted = Wanted(data, nsamples, seqlen, seed, bits, candidates)
        prepared = None
        if ranks.rank == 0:
            prepared = prepare(model, tokenizer, config, origin, wanted, device=device, kept=kept, resume=resume)
        found, mixed = ranks.shared(prepared, 0)
        batches, provenance = found.batches, found.provenance
        note(f"calibrating on {len(batches)} windows of {batches[0].shape[1]} tokens")
    check_tune(tune, len(batches))
    tokens = sum(batch.numel() for batch in batches)
    with _resumable(work):
        if work is not None:
            report = quantize_with_bar(
                model,
                config if mixed is None else mixed.config(config),
                batches if finetune else batched(batches),  # to tune, one step for each window
                finetune=FinetuneConfig() if finetune else None,
                true_sequential=true_sequential,
                device=device,
                group=group,
                keep_inputs=keep_inputs,
                work_dir=work,
                resume=resume,
                data_origin={**provenance, "nsamples": nsamples, "seqlen": seqlen, "model": str(source)},
            )
        elif batches:
            report = _on_dense_inputs(model, config, batched(batches), layers)
        else:
            report = _without_data(model, config, layers)
        if ranks.rank > 0:  # the first one saves
            return
        tuned = None
        if tune is not None and work is not None:
            tuned = tune_with_bar(model, source, batches, work, dtype=dtype, device=device, resume=resume)
        with phase(f"saving {out}"):
            save_model(model, tokenizer, out, force=force)
            if tuned is not None:
                write_tuning_report(tuned, out)
            if isinstance(report, CalibrationReport):
                (out / REPORT_NAME).write_text(report.to_json() + "\n", encoding="utf-8")
            if mixed is not None:
                (out / "allocation.json").write_text(json.dumps(mixed.as_dict(), indent=1) + "\n", encoding="utf-8")
    if work is not None and work_dir is None:
        shutil.rmtree(work)
    if kept is not None:
        kept.remove()
    _print(report, tuned, out, tokens, time.monotonic() - start, as_json)


def join_ranks(device: str, by_block: bool) -> tuple[Any, str]:
    """The process group and this rank's device, if torchrun started this process; only the first rank speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None, device
    if not by_block:
        raise UsageError("several processes (torchrun) share the work block by block only: pass --data")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
    if dist.get_rank() > 0:
        stdout.quiet = stderr.quiet = True
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return dist.group.WORLD, device


def _check_options(by_block: bool, keep_inputs: str, *, needing: tuple[bool, ...], has_data: bool, mixed: bool) -> None:
    """Refuse options that only a calibration block by block has, if there is none."""
    options = "--bits, --finetune, --tune, --true-sequential, --work-dir and --resume"
    if any((*needing, mixed)) and not has_data:
        raise UsageError(
            f"{options} need --data: without it there is nothing to calibrate on (--data generated lets the model "
            "write some)"
        )
    if any((*needing, mixed)) and not by_block:
        raise UsageError(f"{options} work block by block: leave out --no-blockwise")
    if keep_inputs not in PLACES:
        raise UsageError(f"--keep-inputs {keep_inputs!r} is unknown: choose one of {', '.join(PLACES)}")


@contextlib.contextmanager
def _resumable(work: Path | None) -> Iterator[None]:
    """Say how to go on after an interruption."""
    try:
        yield
    except KeyboardInterrupt as error:
        if work is not None and work.is_dir():
            error.add_note(f"finished layers are kept in {work}: run the same command with --resume to go on")
        raise


def batched(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Windows [1, seqlen] joined to batches of one shape and a few thousand tokens."""
    most = max(1, min(_TOKENS_AT_ONCE // samples[0].shape[1], len(samples) // _BATCHES))
    size = next(size for size in range(most, 0, -1) if len(samples) % size == 0)
    return [torch.cat(samples[first : first + size]) for first in range(0, len(samples), size)]


def quantize_with_bar(
    model: Any,
    config: AQLMWeightConfig | FqnToConfig,
    batches: list[torch.Tensor],
    *,
    max_blocks: int | None = None,
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
            shown.update(progress.done, where, progress.block)

        def block_done(done: int) -> None:
            note(f"block {done}/{len(blocks)}: {block_line(latest)}")
            latest.clear()

        return calibrate(model, config, batches, blocks=blocks, on_progress=show, after_block=block_done, **options)


def _without_data(model: Any, config: AQLMWeightConfig, layers: int) -> QuantizationReport:
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
def _on_dense_inputs(
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


def _check_space(model: Any, config: AQLMWeightConfig, out: Path, bits: float | None) -> int:
    """The number of layers that will be quantized, after checking that the scheme fits and the result has space."""
    with usage():
        if bits is None:
            weights = [target.module.weight for target in find_targets(model, config, in_blocks(model))[0]]
        else:
            weights = [layer.weight for layer in linears_of(find_blocks(model))]
    scheme = AQLMScheme.parse(config.scheme)
    needed = sum(parameter.nbytes for parameter in model.parameters())
    for weight in weights:
        stored = scheme.stored_bits(*weight.shape, float_bits=8 * weight.element_size())
        needed += int(stored if bits is None else bits * weight.numel()) // 8 - weight.nbytes
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"not enough space: the result takes {needed / 1e6:.0f} MB, free are {free / 1e6:.0f} MB; choose another "
            "folder or make room",
            str(out),
        )
    return len(weights)


def _print(
    report: QuantizationReport, tuned: PVReport | None, out: Path, tokens: int, seconds: float, as_json: bool
) -> None:
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if as_json:
        found = {"layers": [asdict(layer) for layer in report.layers], "blocks": [], "skipped": report.skipped}
        if isinstance(report, CalibrationReport):
            found = json.loads(report.to_json())
        facts = {"folder": str(out), "bytes": size, "calibration_tokens": tokens, "wall_seconds": seconds}
        print_json({**facts, **found, **({} if tuned is None else {"tuning": asdict(tuned)})})
        return
    if isinstance(report, CalibrationReport):
        stdout.print(error_table(report))
    emit(str(report))
    if tuned is not None:
        emit(str(tuned))
    emit(f"saved {out}: {size / 1e6:.1f} MB of weights, {seconds:.0f} s in all")
    if isinstance(report, CalibrationReport):
        emit(f"report: {out / REPORT_NAME}")
    emit(f"next: aqlm-tensor eval {out} --data TEXT   or   aqlm-tensor generate {out} --prompt ...")
