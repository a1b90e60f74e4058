"""quantize_: turn the linear layers of any module into AQLM, in place, all or nothing before it starts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_

from aqlm_tensor.handler import LayerReport, Run, current_run
from aqlm_tensor.quantizer.observers import detach_observers, observer_of
from aqlm_tensor.targets import FilterFn, Target, find_targets

__all__ = ["QuantizationReport", "quantize_"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_` did.

    Attributes:
        layers: a report for each weight that was quantized; empty after step "prepare".
        prepared: names of the layers that got an observer.
        skipped: why each layer that was passed over stays as it is, by name.
    """

    layers: tuple[LayerReport, ...]
    prepared: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = []
        if self.prepared:
            lines.append(f'prepared {len(self.prepared)} layers: run your data, then quantize_ with step="convert"')
        if self.layers:
            weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
            bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in self.layers) / weights
            seconds = sum(layer.seconds for layer in self.layers)
            lines.append(
                f"quantized {len(self.layers)} layers, {weights / 1e6:.1f} M weights at {bits:.3f} bits, "
                f"in {seconds:.1f} s"
            )
        lines += [f"left dense: {fqn} ({reason})" for fqn, reason in self.skipped.items()]
        return "\n".join(lines)


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> QuantizationReport:
    """Quantize the linear layers of a model to AQLM, in place.

    All layers are checked first, so bad input changes nothing; then each layer is replaced in one step, so an
    exception on the way (out of memory, Ctrl-C) leaves every layer either as it was or quantized.

    Args:
        model: any module; each `nn.Linear` keeps its class, only its weight changes type.
        config: an AQLMWeightConfig, or torchao's FqnToConfig for a scheme per layer (its other configs are torchao's).
        filter_fn: filter_fn(module, fqn) says which layers; None takes every nn.Linear but the output embedding of a
            Transformers model. A layer whose weight is tied to an embedding always stays dense.
        device: where each layer is moved before it is quantized, for example "cuda"; None leaves it where it is.
        on_layer: called with a report after each layer, for progress.

    Returns:
        What was quantized, prepared and passed over.

    Raises:
        ValueError: if no layer matches, one is quantized already, cannot be divided by the scheme, would not become
            smaller, has non-finite weights, or (at "convert") saw no data.
        TypeError: for a config or layer of the wrong type.
    """
    targets, skipped = find_targets(model, config, filter_fn)
    targets = _observed(targets, skipped)
    sharing: dict[int, list[nn.Linear]] = {}
    for target in targets:
        sharing.setdefault(id(target.module.weight), []).append(target.module)
    run = Run({id(target.module): target for target in targets}, sharing, on_layer)
    if any(target.config.step is None for target in targets):
        _say_data_free_once()
    token = current_run.set(run)
    try:
        filter_targets = None if isinstance(config, FqnToConfig) else lambda module, _: id(module) in run.targets
        torchao_quantize_(model, config, filter_fn=filter_targets, device=device)
    finally:
        current_run.reset(token)
    prepared = tuple(target.fqn for target in targets if target.config.step == "prepare")
    report = QuantizationReport(tuple(run.layers), prepared, skipped)
    _logger.info("%s", report)
    return report


def _observed(targets: list[Target], skipped: dict[str, str]) -> list[Target]:
    """The targets without those that saw no data and are to be skipped; raises if that is not allowed."""
    converting = [target for target in targets if target.config.step == "convert"]
    unobserved = [target for target in converting if not _tokens(target.module)]
    if not unobserved:
        return targets
    names = ", ".join(target.fqn for target in unobserved[:5]) + (", ..." if len(unobserved) > 5 else "")
    if len(unobserved) == len(converting):
        raise ValueError(f"no layer saw any data ({names}): run your batches through the model between the two steps")
    if any(target.config.on_unobserved == "raise" for target in unobserved):
        raise ValueError(
            f"{len(unobserved)} of {len(converting)} layers saw no data: {names}. Run data that reaches them, or pass "
            'on_unobserved="skip" (leave them dense) or "data_free"'
        )
    passed_over = {id(target.module) for target in unobserved if target.config.on_unobserved == "skip"}
    detach_observers(target.module for target in unobserved if id(target.module) in passed_over)
    skipped.update({target.fqn: "it saw no data" for target in unobserved if id(target.module) in passed_over})
    return [target for target in targets if id(target.module) not in passed_over]


def _tokens(module: nn.Linear) -> int:
    observer = observer_of(module)
    return 0 if observer is None else observer.tokens


@cache
def _say_data_free_once() -> None:
    _logger.warning(
        "quantizing without data: fine for trying out kernels and for large layers, but at about 2 bits it ruins small "
        'models. For quality use step="prepare", run your data, then step="convert".'
    )
