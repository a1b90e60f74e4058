"""calibrate: quantize a model block by block, each on the inputs it will really have.

`quantize_` with "prepare" and "convert" sees the inputs of the dense model. Here a block sees what the quantized blocks
before it put out, as in GPTQ and AQLM, so that errors are not multiplied from block to block; its continuous parameters
can then be fine-tuned against the output that the dense block has for the same inputs; and only one block's X^T X is in
memory, and on request only one block on the GPU. It costs a second forward pass of each block.

With a work folder every layer is kept as soon as it is done (`work_folder.py`), and a run that was killed, ran
out of memory or filled the disk resumes to the same bits: forward passes are repeated, finished layers and finished
fine-tuning are not.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from aqlm_tensor.blocks import find_blocks, linears_of, members
from aqlm_tensor.calibration.activations import PLACES, Place
from aqlm_tensor.calibration.block_calls import Batch, tensors_of
from aqlm_tensor.calibration.block_run import BlockRun
from aqlm_tensor.calibration.experts import find_stacks
from aqlm_tensor.calibration.finetune import FinetuneConfig, check_tunable
from aqlm_tensor.calibration.report import CalibrationReport, Progress, Stopwatch
from aqlm_tensor.calibration.work_folder import WorkFolder, as_json, fingerprint
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.targets import Target, find_targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    group: "ProcessGroup | None" = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    data_origin: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    after_block: Callable[[int], None] | None = None,
) -> CalibrationReport:
    """Quantize the linear layers of a model's blocks in place, in order, on the inputs they will really have.

    Experts that are one stack of weights [E, O, I] are quantized, too, each with the tokens that it sees
    (`experts.py`); fine-tuning leaves them alone. Their routers stay dense unless an FqnToConfig names them. What
    several blocks share is calibrated on what the first of them gives it. An exception leaves every layer either dense
    or quantized, and a layer that was done in `work_dir`.

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
        group: divide batches and layers over the ranks of this process group (torch.distributed), as
            `aqlm_tensor.ranks` says; each calls this function with the same model and arguments but for `device`, and
            gets the bits that one process would. `work_dir` must then be one folder for all. If one process fails, the
            others wait for it: let torchrun end them.
        work_dir: keep finished layers and blocks in this folder.
        resume: go on with what `work_dir` holds; the model must be the dense one again, and everything else the same.
        data_origin: JSON-able notes on where the batches come from, for the report ("data", "origin").
        on_progress: called at each change of phase and after each layer.
        after_block: called with the number of blocks quantized so far, when the model may be run (to evaluate it, say).

    Returns:
        The layers that were quantized (those taken from `work_dir` included), the blocks that were fine-tuned, the
        layers left dense (the others outside of the blocks are not listed), and what the run was made from and took.

    Raises:
        ValueError: as `quantize_`, before any change; for a model that is not a plain sequence of blocks; for layers
            that cannot be fine-tuned; for fewer batches than ranks, or ranks with different arguments; and if what
            `work_dir` holds was made from another model, config or data. On the way, for layers that saw no data, if
            their config says so.
        TypeError: for batches of another type.
        FileExistsError: if `work_dir` holds something and `resume` was not asked for.
        MemoryError, torch.OutOfMemoryError, OSError: if memory or the disk do not suffice, with a note on the remedy.
    """
    ranks = Ranks(group)
    _check_batches(batches, finetune, ranks)
    if keep_inputs not in PLACES:
        raise ValueError(f"keep_inputs must be one of {', '.join(map(repr, PLACES))}, got {keep_inputs!r}")
    if resume and work_dir is None:
        raise ValueError("resume needs the work_dir of the run to go on with")
    chosen = list(find_blocks(model) if blocks is None else blocks)
    stacks, dense_stacks = find_stacks(model, config, chosen)
    config, targets, skipped = _to_prepare(model, config, chosen)
    if finetune is not None:
        check_tunable({target.fqn: target.module for target in targets}, "finetune")
        _check_apart(chosen)
    settings = {"config": config, "finetune": finetune, "true_sequential": true_sequential}
    settings = {name: as_json(value) for name, value in settings.items()}
    tensors = [tensor for batch in batches for tensor in tensors_of(batch)]
    data: dict[str, Any] = {"batches": len(batches), "tokens": _tokens(batches), "sha256": fingerprint(tensors)}
    data["origin"] = None if data_origin is None else dict(data_origin)
    if len(set(map(str, ranks.everyones((settings, data["sha256"]))))) > 1:
        raise ValueError("the processes were given different settings or batches: give all of them the same")
    where = next(chosen[0].parameters()).device if device is None else torch.empty(0, device=device).device
    watch = Stopwatch(where)
    run = BlockRun(
        model, finetune, true_sequential, chosen, targets, stacks, where, keep_inputs, ranks, watch, on_progress
    )
    training = model.training
    model.eval()
    try:
        with run.remedies(work_dir), contextlib.ExitStack() as opened:
            if work_dir is not None:
                with ranks.first_alone():
                    work = WorkFolder(Path(work_dir), resume=resume, rank=ranks.rank)
                    opened.enter_context(contextlib.closing(work))
                    work.check_same(settings, chosen, data["sha256"])
                run.use(work)
            run.capture(batches)
            for index, block in enumerate(chosen):
                run.quantize(index, block)
                if after_block is not None:
                    after_block(index + 1)
    finally:
        model.train(training)
    record = watch.record({**settings, "blocks": len(chosen)}, data, resumed=bool(run.finished_layers))
    return CalibrationReport(tuple(run.layers), (), skipped | dense_stacks | run.skipped, tuple(run.tuned), record)


def _to_prepare(
    model: nn.Module, config: AQLMWeightConfig | FqnToConfig, blocks: Sequence[nn.Module]
) -> tuple[AQLMWeightConfig | FqnToConfig, list[Target], dict[str, str]]:
    """The config at step "prepare", the layers of the blocks that it applies to, and why not to the others."""
    if isinstance(config, AQLMWeightConfig):
        config = replace(config, step="prepare")
        return config, *find_targets(model, config, members(linears_of(blocks)))
    inside = members([module for block in blocks for module in block.modules()])
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


def _check_apart(blocks: Sequence[nn.Module]) -> None:
    """Raise if fine-tuning one block would change another."""
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            first = owners.setdefault(id(parameter), index)
            if first != index:
                raise ValueError(
                    f"blocks {first} and {index} share {name}, so that tuning one would change the other: leave out "
                    "finetune"
                )


def _check_batches(batches: Sequence[Batch], finetune: FinetuneConfig | None, ranks: Ranks) -> None:
    if isinstance(batches, Tensor) or not isinstance(batches, Sequence):
        raise TypeError(f"batches must be a list of batches, got {type(batches).__name__}: make a list of it first")
    if not batches:
        raise ValueError("no batches to calibrate on: pass some, of real inputs")
    if len(batches) < ranks.size:
        raise ValueError(
            f"{len(batches)} batches cannot be divided over {ranks.size} processes: pass smaller batches or more data, "
            "or start fewer processes"
        )
    for batch in batches:
        if not isinstance(batch, Tensor | Mapping):
            raise TypeError(
                f"a batch must be a tensor or a mapping of keywords to tensors, got {type(batch).__name__}: pass a "
                'list of such batches, for example [{"input_ids": ids, "pixel_values": images}]'
            )
        if not any(tensor.numel() for tensor in tensors_of(batch)):
            raise ValueError("a batch without any values: leave it out")
    if finetune is not None:
        finetune.held_out(len(batches))  # raises for too few, before any work


def _tokens(batches: Sequence[Batch]) -> int:
    """Tokens in all, where batches are, or hold, token ids."""
    ids = [batch if isinstance(batch, Tensor) else batch.get("input_ids") for batch in batches]
    return sum(tensor.numel() for tensor in ids if isinstance(tensor, Tensor) and not tensor.is_floating_point())
