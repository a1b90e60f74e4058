"""`aqlm-tensor quantize --tune pv`: tune the quantized model end to end, against the dense one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqlm_tensor import PVConfig, tune_pv
from aqlm_tensor.calibration.finetune import check_tunable
from aqlm_tensor.cli.arguments import open_model
from aqlm_tensor.cli.fit import Fit
from aqlm_tensor.cli.output import UsageError, bar, usage
from aqlm_tensor.cli.progress import tuning
from aqlm_tensor.hf_model import ModelSource
from aqlm_tensor.pv.report import PVReport, PVRound
from aqlm_tensor.pv.sharded import gather_into, sharded_copy
from aqlm_tensor.ranks import Ranks

__all__ = ["TUNING_REPORT_NAME", "check_model", "check_shard", "check_tune", "tune_with_bar", "write_tuning_report"]

TUNING_REPORT_NAME = "tuning_report.json"
_GRADIENT_MEMORY = 4 << 30  # of each process, for choosing codes of a sharded model


def check_tune(tune: str | None, windows: int) -> None:
    """Refuse an unknown way of tuning, or too little to tune on.

    Raises:
        UsageError: naming what is accepted.
    """
    if tune not in (None, "pv"):
        raise UsageError(f"--tune {tune!r} is unknown: the only choice is pv")
    if tune is not None and windows < 2:
        raise UsageError(
            "--tune needs at least 2 windows, one to validate on: pass more --nsamples, a longer text or a smaller "
            "--seqlen"
        )


def check_shard(tune: str | None, ranks: Ranks) -> None:
    """Refuse to divide models without need.

    Raises:
        UsageError: naming what is missing.
    """
    if tune is None or ranks.size == 1:
        raise UsageError("--shard divides models while --tune tunes them, over several processes: start it by torchrun")


def check_model(fit: Fit, shard: bool, ranks: Ranks) -> None:
    """Refuse, before anything is quantized, to tune what cannot be tuned, and to divide what cannot be divided.

    Raises:
        UsageError: naming what stands in the way.
    """
    if fit.stacks:
        raise UsageError(f"--tune cannot tune stacks of experts, such as {fit.stacks[0].fqn}: leave it out")
    with usage():
        check_tunable(fit.layers, "--tune")
    for layer in fit.layers.values():
        if shard and layer.out_features % ranks.size:
            raise UsageError(
                f"--shard: {ranks.size} processes do not divide the {layer.out_features} rows of a layer: use another "
                "number"
            )


def tune_with_bar(
    model: Any,
    source: ModelSource,
    windows: Sequence[Tensor],
    work: Path,
    *,
    dtype: str,
    device: str,
    resume: bool,
    group: Any = None,
    shard: bool = False,
) -> PVReport:
    """`tune_pv` on the windows that the model was calibrated on, with a progress bar.

    Args:
        model: quantized, on any device; it is on the CPU afterwards.
        source: where the dense model, the teacher, is loaded from again.
        windows: token ids, [1, seqlen] each.
        work: the work folder; the state is kept in a folder inside.
        dtype: the dense model's, as given.
        device: where to compute.
        resume: go on with what `work` holds.
        group: processes that share each step's windows, of which there are then at least as many.
        shard: divide both models over these, too; each still loads the dense one into CPU memory.
    """
    processes = Ranks(group).size
    wanted = tuning(len(windows)).batches_per_step
    config = PVConfig(batches_per_step=-(-wanted // processes) * processes)
    if shard:
        config = replace(config, gradient_checkpointing=True, gradient_memory=_GRADIENT_MEMORY)
    teacher, _ = open_model(source, None, dtype, "cpu" if shard else device, needs_tokenizer=False)
    tuned, teacher = (sharded_copy(one, torch.device(device)) if shard else one.to(device) for one in (model, teacher))
    folder = work / "tuning"
    with bar("tuning", config.steps(len(windows)), "steps") as shown:

        def show(done: PVRound) -> None:
            shown.update(done.step, f"held-out loss {done.validation:.4f}")

        try:
            return tune_pv(
                tuned, teacher, windows, config=config, work_dir=folder, resume=resume, group=group, on_round=show
            )
        finally:
            if shard:
                gather_into(model, tuned)
            model.cpu()


def write_tuning_report(report: PVReport, out: Path) -> None:
    """Keep a report beside the model."""
    (out / TUNING_REPORT_NAME).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
