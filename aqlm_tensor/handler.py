"""The function that quantizes one layer, registered with torchao for AQLMWeightConfig.

torchao calls it for every layer that a config and filter select. On its own it checks the layer it is given;
under `aqlm_tensor.quantize_`, which has checked all layers before, it also keeps weights shared between layers shared
and reports each layer.
"""

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn
from torchao.quantization.transform_module import register_quantize_module_handler

from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.quantizer.layer import quantize_layer
from aqlm_tensor.quantizer.observers import Observer, detach_observers, observer_of
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import Target, check_layer, why_incompatible
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["LayerReport", "Run", "current_run"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """One layer that was quantized.

    Attributes:
        fqn: its name in the model; the first one if several layers share the weight.
        scheme: for example "2x8g8".
        shape: (out_features, in_features).
        bits_per_weight: stored bits per weight, codebooks and scales included.
        tokens: input vectors its X^T X was made of; 0 if it was quantized without data.
        relative_error: tr(dW H dW^T) / tr(W H W^T), H = X^T X, or the identity without data.
        seconds: wall time.
    """

    fqn: str
    scheme: str
    shape: tuple[int, int]
    bits_per_weight: float
    tokens: int
    relative_error: float
    seconds: float


@dataclass
class Run:
    """One call of `quantize_`: its targets by module, which layers share a weight, and what was done.

    Attributes:
        targets: by id of the module.
        sharing: modules with the same weight, by id of the weight.
        layers: reports of the layers done so far, in order.
        on_layer: called with each report.
    """

    targets: dict[int, Target]
    sharing: dict[int, list[nn.Linear]]
    on_layer: Callable[[LayerReport], None] | None = None
    layers: list[LayerReport] = field(default_factory=list)


current_run: ContextVar[Run | None] = ContextVar("aqlm_tensor_quantize_run", default=None)


@register_quantize_module_handler(AQLMWeightConfig)
def _quantize_module(module: nn.Module, config: AQLMWeightConfig, *, parameter_name: str = "weight") -> nn.Module:
    if parameter_name != "weight":
        raise ValueError(f"only the weight of a linear layer can be quantized to AQLM, not {parameter_name!r}")
    run = current_run.get()
    if run is not None:
        target = run.targets.get(id(module))
        if target is not None and not isinstance(target.module.weight, AQLMTensor):
            _apply(target, run)
        return module
    if not isinstance(module, nn.Linear):
        raise TypeError(f"only nn.Linear can be quantized to AQLM, got {type(module).__name__}")
    check_layer(module, config)
    reason = why_incompatible(module, config)
    if reason is not None:
        if config.on_incompatible == "skip":
            return module
        raise ValueError(f"the layer cannot be quantized to {config.scheme}: {reason}")
    _apply(Target("the layer", module, config), Run({}, {id(module.weight): [module]}))
    return module


def _apply(target: Target, run: Run) -> None:
    module, config = target.module, target.config
    if config.step == "prepare":
        Observer(module, AQLMScheme.parse(config.scheme))
        return
    start = time.perf_counter()
    sharing = run.sharing[id(module.weight)]
    hessian, tokens = _hessian(sharing) if config.step == "convert" else (None, 0)
    if config.step == "convert" and hessian is None and config.on_unobserved != "data_free":
        if config.on_unobserved == "skip":
            detach_observers(sharing)
            return
        raise ValueError(f'{target.fqn} saw no data: run your data first, or pass on_unobserved="skip" or "data_free"')
    weight, error = _quantize(module.weight, config, hessian)
    set_quantized(sharing, weight)
    detach_observers(sharing)
    report = LayerReport(
        target.fqn,
        config.scheme,
        (weight.shape[0], weight.shape[1]),
        weight.bits_per_weight,
        tokens,
        error,
        time.perf_counter() - start,
    )
    run.layers.append(report)
    _logger.info("quantized %s", report)
    if run.on_layer is not None:
        run.on_layer(report)


def _quantize(weight: Tensor, config: AQLMWeightConfig, hessian: Tensor | None) -> tuple[AQLMTensor, float]:
    dtype = config.codebook_dtype or weight.dtype
    scheme = AQLMScheme.parse(config.scheme)
    result = quantize_layer(
        weight.detach(), scheme, hessian=hessian, solver=config.solver, seed=config.seed, dtype=dtype
    )
    return AQLMTensor(result.codes, result.codebooks.to(dtype), result.scales.to(dtype)), result.error


def _hessian(sharing: list[nn.Linear]) -> tuple[Tensor | None, int]:
    """X^T X and the number of input vectors over all layers that share one weight; (None, 0) if they saw none."""
    observers = [observer for layer in sharing if (observer := observer_of(layer)) is not None]
    seen = [(hessian, observer.tokens) for observer in observers if (hessian := observer.hessian()) is not None]
    if not seen:
        return None, 0
    total = seen[0][0]
    for hessian, _ in seen[1:]:
        total = total + hessian
    return total, sum(tokens for _, tokens in seen)
