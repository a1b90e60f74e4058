"""`aqlm-tensor quantize`: load, calibrate and quantize block by block, save."""

import contextlib
import datetime as dt
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aqlm_tensor import AQLMWeightConfig, CalibrationReport, QuantizationReport
from aqlm_tensor.blocks import find_blocks
from aqlm_tensor.calibration.activations import PLACES
from aqlm_tensor.calibration.finetune import check_tunable
from aqlm_tensor.calibration.sources import Source, TextFile, TokenFile, needs_tokenizer, parse_source
from aqlm_tensor.checkpoint_io import check_replaceable
from aqlm_tensor.cli.arguments import check_writable, held_out, held_out_tokens, open_model, parse_device
from aqlm_tensor.cli.evaluation import Evaluation
from aqlm_tensor.cli.fit import Fit, check_space, find_fit
from aqlm_tensor.cli.output import UsageError, emit, note, phase, print_json, stderr, stdout, usage
from aqlm_tensor.cli.prepare import Kept, Prepared, Wanted, prepare
from aqlm_tensor.cli.progress import (
    batched,
    quantize_on_dense_inputs,
    quantize_with_bar,
    quantize_without_data,
    tuning,
)
from aqlm_tensor.cli.report import error_table
from aqlm_tensor.cli.saved_report import REPORT_NAME, write_report
from aqlm_tensor.cli.tune import check_model, check_shard, check_tune, tune_with_bar, write_tuning_report
from aqlm_tensor.hf_model import ModelSource, find_model, save_model
from aqlm_tensor.pv.report import PVReport
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import check_layer

__all__ = ["Options", "run"]

_PATIENCE = dt.timedelta(hours=12)  # of ranks that wait for one that solves a large layer


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of the command, as `aqlm-tensor quantize --help` explains them."""

    model: str
    out: Path
    scheme: str
    gguf_file: str | None
    data: str | None
    bits: float | None
    schemes: str
    nsamples: int
    seqlen: int
    seed: int
    finetune: bool
    tune: str | None
    shard: bool
    blockwise: bool
    true_sequential: bool
    keep_inputs: str
    eval_data: Path | None
    eval_seqlen: int
    eval_every: int
    work_dir: Path | None
    resume: bool
    dtype: str
    device: str
    force: bool
    as_json: bool

    @property
    def by_block(self) -> bool:
        """Whether blocks are calibrated one after another."""
        return self.data is not None and self.blockwise

    @property
    def work(self) -> Path | None:
        """The work folder, if there is to be one."""
        beside = self.out.with_name(self.out.name + ".work") if self.work_dir is None else self.work_dir
        return beside if self.by_block else None


@dataclass(frozen=True)
class _Plan:
    """What the options name, once it is known to be there."""

    config: AQLMWeightConfig
    schemes: tuple[str, ...]
    origin: Source | None
    source: ModelSource
    held_out: TextFile | TokenFile | None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a text is to be read, or written."""
        return isinstance(self.held_out, TextFile) or (self.origin is not None and needs_tokenizer(self.origin))


def run(options: Options) -> None:
    """Quantize a model on disk to a new folder; see `aqlm-tensor quantize --help`."""
    plan = _plan(options)
    with _joined(options.device, options.by_block) as (group, device):
        _run(replace(options, device=device), plan, group)


def _run(options: Options, plan: _Plan, group: Any) -> None:
    start, ranks = time.monotonic(), Ranks(group)
    if options.shard:
        check_shard(options.tune, ranks)
    # block by block, one block at a time goes to the device
    home = "cpu" if options.by_block else options.device
    model, tokenizer = open_model(plan.source, None, options.dtype, home, needs_tokenizer=plan.needs_tokenizer)
    if tokenizer is None:
        note(f"{plan.source} holds no tokenizer, so {options.out} will not, either", style="yellow")
    fit = _fit(options, plan, model, ranks)
    measured = None
    if plan.held_out is not None and ranks.rank == 0:
        measured = held_out_tokens(plan.held_out, tokenizer, model)
    evaluated = Evaluation(model, measured, options.eval_seqlen, options.eval_every, options.device)
    kept = None if options.work is None else Kept(options.work)
    prepared = _prepare(options, plan, model, tokenizer, ranks, kept)
    with _resumable(options.work):
        evaluated.measure("dense", 0)
        report = _quantize(options, plan, model, prepared, len(fit.layers), group, evaluated)
        tuned = _tune(options, plan, model, prepared, group)
        if tuned is not None:
            evaluated.measure("tuned", len(find_blocks(model)))
        if ranks.rank > 0:  # the first one saves
            return
        if isinstance(report, CalibrationReport):
            report = replace(report, perplexity=tuple(evaluated.points))
        _save(options, plan, model, tokenizer, report, tuned, prepared)
    if options.work is not None and options.work_dir is None:
        shutil.rmtree(options.work)
    if kept is not None:
        kept.remove()
    tokens = sum(batch.numel() for batch in prepared.batches)
    _print(report, tuned, options.out, tokens, time.monotonic() - start, options.as_json)


def _plan(options: Options) -> _Plan:
    """Check the options before any long work.

    Raises:
        UsageError: naming what is wrong and what is accepted.
    """
    _check_options(options)
    check_tune(options.tune, options.nsamples)
    with usage():
        plan = _Plan(
            AQLMWeightConfig(options.scheme, seed=options.seed, on_incompatible="skip", on_unobserved="skip"),
            tuple(str(AQLMScheme.parse(one)) for one in options.schemes.split(",")),
            None if options.data is None else parse_source(options.data),
            find_model(options.model, options.gguf_file),
            None if options.eval_data is None else held_out(options.eval_data),
        )
        check_replaceable(options.out, force=options.force)
    if plan.source.kind == "aqlm":
        raise UsageError(f"{plan.source} is quantized already: pass the dense model")
    if options.out.resolve() == plan.source.folder.resolve():
        raise UsageError(f"OUT {str(options.out)!r} is the model's own folder: choose another one")
    work = options.work
    if work is not None and not options.resume and work.exists() and any(work.iterdir()):
        raise UsageError(f"{work} holds an earlier run: go on with it with --resume, or delete it")
    for path in (options.out, *([] if work is None else [work])):
        check_writable(path)
    parse_device(options.device)
    return plan


def _check_options(options: Options) -> None:
    """Refuse options that only a calibration block by block has, if there is none."""
    given = (options.finetune, options.true_sequential, options.resume)
    given += tuple(value is not None for value in (options.tune, options.work_dir, options.bits, options.eval_data))
    names = "--bits, --finetune, --tune, --true-sequential, --eval-data, --work-dir and --resume"
    if any(given) and options.data is None:
        raise UsageError(
            f"{names} need --data: without it there is nothing to calibrate on (--data generated lets the model "
            "write some)"
        )
    if any(given) and not options.by_block:
        raise UsageError(f"{names} work block by block: leave out --no-blockwise")
    if options.eval_every and options.eval_data is None:
        raise UsageError("--eval-every needs --eval-data: the text to measure perplexity on")
    if options.keep_inputs not in PLACES:
        raise UsageError(f"--keep-inputs {options.keep_inputs!r} is unknown: choose one of {', '.join(PLACES)}")


def _fit(options: Options, plan: _Plan, model: Any, ranks: Ranks) -> Fit:
    """What will be quantized, after checking that all of it, and what else was asked for, can be done."""
    configs = [plan.config]
    if options.bits is not None:
        configs = [replace(plan.config, scheme=scheme) for scheme in plan.schemes]
    fit = find_fit(model, configs, stacks_too=options.by_block and options.bits is None)
    if options.tune is not None:
        check_model(fit, options.shard, ranks)
    with usage():
        for fqn, layer in fit.layers.items():
            check_layer(layer, plan.config, fqn)
        if options.finetune:
            check_tunable(fit.layers, "--finetune")
    check_space(model, fit, AQLMScheme.parse(plan.config.scheme), options.bits, options.out, options.work)
    return fit


def _prepare(options: Options, plan: _Plan, model: Any, tokenizer: Any, ranks: Ranks, kept: Kept | None) -> Prepared:
    """The calibration data and the schemes, which the first process finds for all."""
    if plan.origin is None or options.data is None:
        return Prepared([], {}, None)
    wanted = Wanted(options.data, options.nsamples, options.seqlen, options.seed, options.bits, plan.schemes)
    found = None
    if ranks.rank == 0:
        found = prepare(
            model,
            tokenizer,
            plan.config,
            plan.origin,
            wanted,
            device=options.device,
            kept=kept,
            resume=options.resume,
        )
    found = ranks.shared(found, 0)
    note(f"calibrating on {len(found.batches)} windows of {found.batches[0].shape[1]} tokens")
    check_tune(options.tune, len(found.batches))
    return found


def _quantize(
    options: Options, plan: _Plan, model: Any, prepared: Prepared, layers: int, group: Any, evaluated: Evaluation
) -> QuantizationReport:
    """Quantize the model in place, in the way that the options ask for."""
    windows = prepared.batches
    if not options.by_block:
        if windows:
            return quantize_on_dense_inputs(model, plan.config, batched(windows), layers)
        return quantize_without_data(model, plan.config, layers)
    return quantize_with_bar(
        model,
        plan.config if prepared.allocation is None else prepared.allocation.config(plan.config),
        windows if options.finetune else batched(windows),  # to tune, some windows at a time
        after_block=evaluated.after_block,
        finetune=tuning(len(windows)) if options.finetune else None,
        true_sequential=options.true_sequential,
        device=options.device,
        group=group,
        keep_inputs=options.keep_inputs,
        work_dir=options.work,
        resume=options.resume,
        data_origin={
            **prepared.provenance,
            "nsamples": options.nsamples,
            "seqlen": options.seqlen,
            "model": str(plan.source),
        },
    )


def _tune(options: Options, plan: _Plan, model: Any, prepared: Prepared, group: Any) -> PVReport | None:
    """Tune the whole model, if the options ask for it."""
    if options.tune is None or options.work is None:
        return None
    return tune_with_bar(
        model,
        plan.source,
        prepared.batches,
        options.work,
        dtype=options.dtype,
        device=options.device,
        resume=options.resume,
        group=group,
        shard=options.shard,
    )


def _save(
    options: Options,
    plan: _Plan,
    model: Any,
    tokenizer: Any,
    report: QuantizationReport,
    tuned: PVReport | None,
    prepared: Prepared,
) -> None:
    """Write the folder, with what there is to report."""
    out = options.out
    with phase(f"saving {out}"):
        save_model(model, tokenizer, out, source=plan.source, force=options.force)
        if tuned is not None:
            write_tuning_report(tuned, out)
        if isinstance(report, CalibrationReport):
            write_report(report, out)
        if prepared.allocation is not None:
            allocation = json.dumps(prepared.allocation.as_dict(), indent=1)
            (out / "allocation.json").write_text(allocation + "\n", encoding="utf-8")


@contextlib.contextmanager
def _joined(device: str, by_block: bool) -> Iterator[tuple[Any, str]]:
    """The process group and this rank's device, if torchrun started this process; only the first rank speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None, device
        return
    if not by_block:
        raise UsageError("several processes (torchrun) share the work block by block only: pass --data")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
    if dist.get_rank() > 0:
        stdout.quiet = stderr.quiet = True
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    yield dist.group.WORLD, device
    dist.destroy_process_group()  # not after an error: it might wait for ranks that are gone


@contextlib.contextmanager
def _resumable(work: Path | None) -> Iterator[None]:
    """Say how to go on after an interruption, or for want of memory or disk."""
    try:
        yield
    except (KeyboardInterrupt, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if work is not None and work.is_dir() and not getattr(error, "__notes__", []):
            error.add_note(f"finished work is kept in {work}: run the same command with --resume to go on")
        raise


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
