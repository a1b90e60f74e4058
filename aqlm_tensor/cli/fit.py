"""What `aqlm-tensor quantize` will quantize of a model, what stays dense and whether the result fits on the disk.

Layers that no scheme fits (an odd size, a handful of rows) stay dense and are named. If that were more than a little,
the result would not be what was asked for, and nothing is done.
"""

import errno
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from aqlm_tensor import AQLMWeightConfig
from aqlm_tensor.blocks import find_blocks, linears_of
from aqlm_tensor.calibration.experts import ExpertStack, find_stacks
from aqlm_tensor.calibration.memory_model import expert_parts
from aqlm_tensor.cli.arguments import parent_of
from aqlm_tensor.cli.output import UsageError, note, usage
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import why_incompatible

__all__ = ["Fit", "check_space", "find_fit"]

_MOST_LEFT_DENSE = 0.05  # of the weights in the blocks


@dataclass(frozen=True)
class Fit:
    """What is to be quantized.

    Attributes:
        layers: by name.
        stacks: of experts.
    """

    layers: dict[str, nn.Linear]
    stacks: list[ExpertStack]


def find_fit(model: nn.Module, configs: Sequence[AQLMWeightConfig], *, stacks_too: bool) -> Fit:
    """The layers that at least one of the configs fits; a note on the others.

    Args:
        model: on any device, the meta device included.
        configs: they differ in the scheme only; with on_incompatible="skip".
        stacks_too: whether stacks of experts can be quantized in the way that was asked for.

    Raises:
        UsageError: if there are no blocks, or much would stay dense.
    """
    with usage():
        blocks = list(find_blocks(model))
        stacks, reasons = find_stacks(model, configs[0], blocks)
    if not stacks_too:
        reasons |= dict.fromkeys(
            (stack.fqn for stack in stacks), "experts are quantized block by block only, with --data and one --scheme"
        )
        stacks = []
    names = {module: fqn for fqn, module in model.named_modules()}
    layers = {names[layer]: layer for layer in linears_of(blocks)}
    for fqn, layer in list(layers.items()):
        unfit = [why_incompatible(layer, config) for config in configs]
        if all(unfit):
            reasons[fqn] = str(unfit[0])
            del layers[fqn]
    dense = {name: model.get_parameter(f"{name}.weight" if name in names.values() else name) for name in reasons}
    quantized = [*(layer.weight for layer in layers.values()), *(stack.weight for stack in stacks)]
    _tell_dense(
        reasons,
        sum(weight.numel() for weight in dense.values()),
        sum(weight.numel() for weight in quantized),
        ", ".join(config.scheme for config in configs),
    )
    return Fit(layers, stacks)


def _tell_dense(reasons: dict[str, str], dense: int, quantized: int, schemes: str) -> None:
    if not reasons:
        return
    share = dense / (dense + quantized)
    name, reason = next(iter(reasons.items()))
    others = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    if share > _MOST_LEFT_DENSE:
        raise UsageError(
            f"{share:.0%} of the weights in the model's blocks would stay dense with {schemes}: {name} ({reason})"
            f"{others}; nothing was done"
        )
    note(f"{share:.2%} of the weights in the model's blocks stay dense: {name} ({reason}){others}", style="yellow")


def check_space(
    model: nn.Module, fit: Fit, scheme: AQLMScheme, bits: float | None, out: Path, work: Path | None
) -> None:
    """Raise unless there is space for the quantized model, and for the finished layers that are kept until the end.

    Args:
        model: dense.
        fit: what will be quantized.
        scheme: to what, if bits is None.
        bits: a weight.
        out: the folder to come.
        work: where finished layers are kept, if anywhere; it may hold some.

    Raises:
        OSError: naming what is needed and what is free.
    """
    weights = list({id(layer.weight): layer.weight for layer in fit.layers.values()}.values())
    weights += [part.weight for stack in fit.stacks for part in expert_parts(stack) * len(stack.weight)]
    stored = 0
    for weight in weights:
        own = scheme.stored_bits(*weight.shape, float_bits=8 * weight.element_size())
        stored += int(own if bits is None else bits * weight.numel()) // 8
    dense = sum(parameter.nbytes for parameter in model.parameters()) - sum(weight.nbytes for weight in weights)
    wanted = {out: dense + stored}
    if work is not None:
        wanted[work] = max(0, stored - sum(file.stat().st_size for file in work.glob("layer.*")))
    parents = {path: parent_of(path) for path in wanted}
    for parent in parents.values():
        here = [path for path in wanted if parents[path].stat().st_dev == parent.stat().st_dev]
        needed, free = sum(wanted[path] for path in here), shutil.disk_usage(parent).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"not enough space: {' and '.join(map(str, here))} take {needed / 1e6:.1f} MB, free are "
                f"{free / 1e6:.1f} MB; choose another folder or make room",
                str(parent),
            )
