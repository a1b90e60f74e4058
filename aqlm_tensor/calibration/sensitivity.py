"""How much each layer's loss of precision costs the model, scheme by scheme: the table that mixed bits are chosen from.

Each layer is quantized with each scheme on the dense model's inputs, with little effort: the order of schemes and
layers shows early. What an error dW costs is read off the gradient of the whole model: for labels that are drawn from
the model's own predictions, half the mean square of <dW, gradient of a window's loss> is the second-order term of the
Kullback-Leibler divergence from the dense model (the Fisher information along dW). One backward pass serves all layers
and schemes.

That costs a quantization per scheme with one round, a forward pass per block, and forward and backward passes over a
few thousand tokens with the whole model in memory. The divergence is taken to be proportional to the error of a layer's
outputs (the linearity theorem of HIGGS, arXiv 2411.17525, section 3), so that all schemes of a layer share one factor;
it is a mean of squares over windows and schemes, with a relative standard error of about the root of 2 over their
number. What errors of different layers do to each other is left out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aqlm_tensor.blocks import find_blocks, linears_of, members
from aqlm_tensor.calibration.allocation import Allocation, Choice, LayerGroup, check_budget, choose_schemes
from aqlm_tensor.calibration.block_calls import BlockCalls
from aqlm_tensor.calibration.experts import find_stacks
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.fusion import SIBLINGS
from aqlm_tensor.quantizer.layer import quantize_layer
from aqlm_tensor.quantizer.observers import Observer, detach_observers, observer_of
from aqlm_tensor.quantizer.solver import SolverConfig
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import find_targets
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["SCHEMES", "allocate", "measure_schemes"]

SCHEMES = ("1x8g8", "2x8g8", "3x8g8", "4x8g8")  # what `allocate` chooses from, unless told otherwise
_EFFORT = SolverConfig(max_rounds=1, kmeans_iterations=4)
_WINDOW = 128  # tokens; short windows give more samples of the gradient from the same number of tokens
_AT_ONCE = 8  # windows in a backward pass


@dataclass
class _Layer:
    """A layer's candidates, kept on the CPU, and what they were found to cost.

    Attributes:
        fqn: its name.
        module: the layer.
        schemes: those that fit it.
        weights: the quantized weight, by scheme.
        errors: tr(dW H dW^T), by scheme.
        total: tr(W H W^T).
        squares: sum over windows of <dW, gradient>^2, by scheme.
    """

    fqn: str
    module: nn.Linear
    schemes: tuple[str, ...]
    weights: dict[str, AQLMTensor]
    errors: dict[str, float]
    total: float
    squares: Tensor

    def bits(self, scheme: str, config: AQLMWeightConfig) -> int:
        """What a scheme takes, stored."""
        weight = self.module.weight
        float_bits = 8 * (config.codebook_dtype or weight.dtype).itemsize
        return AQLMScheme.parse(scheme).stored_bits(weight.shape[0], weight.shape[1], float_bits=float_bits)

    def sensitivity(self, predicted: int) -> float:
        """Loss, in nats for each of so many tokens, per unit of tr(dW H dW^T): the mean over schemes."""
        ratios = [
            0.5 * float(square) / predicted / self.errors[scheme]
            for scheme, square in zip(self.schemes, self.squares, strict=True)
            if self.errors[scheme] > 0
        ]
        return sum(ratios) / max(len(ratios), 1)


def allocate(
    model: nn.Module,
    config: AQLMWeightConfig,
    batches: Sequence[Tensor],
    bits: float,
    schemes: Sequence[str] = SCHEMES,
    *,
    blocks: Iterable[nn.Module] | None = None,
    **options: Any,
) -> Allocation:
    """Choose a scheme for each layer of a decoder's blocks, from measured sensitivity, under a size budget.

    `allocate(...).config(config)` is what `calibrate` and `quantize_` then take. The model is left as it is.

    Args:
        model: a causal language model; the whole of it must fit into memory with the gradients of a few windows.
        config: seed and codebook dtype are used; its scheme and solver are not.
        batches: token ids [B, seqlen], as for `calibrate`; a few thousand tokens suffice.
        bits: stored bits a weight on average, codebooks and scales included, at most.
        schemes: to choose from.
        blocks: those whose layers are to be quantized; by default those of `find_blocks`.
        options: those of `measure_schemes`.

    Raises:
        ValueError: as `measure_schemes` and `choose_schemes`.
    """
    chosen = list(find_blocks(model) if blocks is None else blocks)
    layers = list({id(layer.module.weight): layer for layer in _layers(model, config, schemes, chosen)}.values())
    least = sum(min(layer.bits(scheme, config) for scheme in layer.schemes) for layer in layers)
    check_budget(bits, least, sum(layer.module.weight.numel() for layer in layers))  # before the long work
    return choose_schemes(measure_schemes(model, config, batches, schemes, blocks=chosen, **options), bits)


def measure_schemes(
    model: nn.Module,
    config: AQLMWeightConfig,
    batches: Sequence[Tensor],
    schemes: Sequence[str] = SCHEMES,
    *,
    blocks: Iterable[nn.Module] | None = None,
    solver: SolverConfig = _EFFORT,
    windows: int = 64,
    siblings: Sequence[Sequence[str]] = SIBLINGS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[LayerGroup]:
    """Measure, for each group of layers, what each scheme would take and cost.

    Args:
        model: a causal language model, dense; it is left as it is.
        config: seed and codebook dtype are used.
        batches: token ids [B, seqlen].
        schemes: to measure. A scheme that does not fit a layer, or would not make it smaller, is no choice for it.
        blocks: those whose layers are measured, in the order of their calls; by default those of `find_blocks`.
        solver: effort of each quantization.
        windows: windows of 128 tokens, cut from the batches, that gradients are taken of (fewer if there are not so
            many).
        siblings: names, within one parent module, of layers that get one scheme.
        on_progress: called with (steps done, steps in all).

    Raises:
        ValueError: if no layer can be quantized with any of the schemes, there are stacks of experts, or batches are
            not token ids.
    """
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError(f"batches must be a list with at least one batch, got {type(batches).__name__}")
    if any(not isinstance(batch, Tensor) or batch.dim() != 2 or batch.numel() == 0 for batch in batches):
        raise ValueError("batches must be token ids [B, seqlen], not empty")
    chosen = list(find_blocks(model) if blocks is None else blocks)
    layers = _layers(model, config, schemes, chosen)
    pieces = _pieces(batches, windows)
    progress = _Progress(len(chosen) + len(pieces), on_progress)
    training = model.training
    model.eval()
    try:
        _quantize(model, config, batches, chosen, layers, solver, progress)
        _differentiate(model, chosen, layers, pieces, config.seed, progress)
    finally:
        model.train(training)
    predicted = sum(piece.numel() for piece in pieces)
    return [_group(group, config, predicted) for group in _grouped(layers, siblings)]


class _Progress:
    """Counts steps."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def _layers(
    model: nn.Module, config: AQLMWeightConfig, schemes: Sequence[str], blocks: Sequence[nn.Module]
) -> list[_Layer]:
    """The layers that at least one scheme fits."""
    stacks, _ = find_stacks(model, replace(config, on_incompatible="skip"), blocks)
    if stacks:
        raise ValueError(
            f"the sensitivity of stacks of experts ({stacks[0].fqn}) cannot be measured: choose one scheme"
        )
    fitting: dict[str, list[str]] = {}
    modules: dict[str, nn.Linear] = {}
    wanted, reasons = members(linears_of(blocks)), []
    for scheme in dict.fromkeys(str(AQLMScheme.parse(scheme)) for scheme in schemes):
        try:
            targets, _ = find_targets(model, replace(config, scheme=scheme, step=None, on_incompatible="skip"), wanted)
        except ValueError as error:
            reasons.append(error)
            continue
        for target in targets:
            fitting.setdefault(target.fqn, []).append(scheme)
            modules[target.fqn] = target.module
    if not modules:
        raise ValueError(f"none of the schemes {', '.join(schemes)} fits any layer: {reasons[-1] if reasons else ''}")
    return [
        _Layer(fqn, module, tuple(fitting[fqn]), {}, {}, 0.0, torch.zeros(len(fitting[fqn]), dtype=torch.float64))
        for fqn, module in modules.items()
    ]


def _pieces(batches: Sequence[Tensor], windows: int) -> list[Tensor]:
    """Token windows of equal length in batches for the backward pass, spread evenly over the data."""
    length = min(_WINDOW, *(batch.shape[1] for batch in batches))
    cut = torch.cat([batch[:, : batch.shape[1] // length * length].reshape(-1, length) for batch in batches])
    count = min(windows, len(cut))
    return list(cut[torch.arange(count) * len(cut) // count].split(_AT_ONCE))


@torch.no_grad()
def _quantize(
    model: nn.Module,
    config: AQLMWeightConfig,
    batches: Sequence[Tensor],
    blocks: Sequence[nn.Module],
    layers: Sequence[_Layer],
    solver: SolverConfig,
    progress: _Progress,
) -> None:
    """Fill in weights, errors and totals, block by block, on the dense model's inputs."""
    calls = BlockCalls(model, blocks, batches, device=next(blocks[0].parameters()).device)
    for index, block in enumerate(blocks):
        inside = set(map(id, linears_of([block])))
        here = [layer for layer in layers if id(layer.module) in inside]
        try:
            for layer in here:
                Observer(layer.module, AQLMScheme.parse(layer.schemes[0]))
            outputs = calls.activations()
            for batch, hidden in enumerate(calls.inputs):
                outputs.append(calls.run(index, batch, hidden))
            calls.inputs = outputs
            for layer in here:
                observer = observer_of(layer.module)
                assert observer is not None
                _quantize_layer(layer, observer.hessian(), config, solver)
        finally:
            detach_observers(block.modules())
        progress.step()


def _quantize_layer(layer: _Layer, hessian: Tensor | None, config: AQLMWeightConfig, solver: SolverConfig) -> None:
    weight = layer.module.weight.detach()
    dtype = config.codebook_dtype or weight.dtype
    wide = weight.float()
    layer.total = float((wide.square() if hessian is None else (wide @ hessian) * wide).sum(dtype=torch.float64))
    for scheme in layer.schemes:
        found = quantize_layer(
            weight, AQLMScheme.parse(scheme), hessian=hessian, solver=solver, seed=config.seed, dtype=dtype
        )
        layer.weights[scheme] = AQLMTensor(
            found.codes.cpu(), found.codebooks.to(dtype).cpu(), found.scales.to(dtype).cpu()
        )
        layer.errors[scheme] = found.error * layer.total


def _differentiate(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    layers: Sequence[_Layer],
    pieces: Sequence[Tensor],
    seed: int,
    progress: _Progress,
) -> None:
    """Add up <dW, gradient>^2 over windows, for every layer and scheme."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"use_cache": False} if hasattr(model, "generation_config") else {}
    handles: list[RemovableHandle] = [layer.module.register_forward_hook(_watch(layer)) for layer in layers]
    handles.append(blocks[0].register_forward_pre_hook(_start_gradient, with_kwargs=True))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            for piece in pieces:
                output = model(piece.to(device), **options)
                logits = getattr(output, "logits", output).flatten(0, 1).float()
                drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, drawn.to(device), reduction="sum").backward()
                progress.step()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _start_gradient(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make what enters the first block require a gradient: no parameter does."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: kwargs[name].detach().requires_grad_()}


def _watch(layer: _Layer) -> Callable[..., None]:
    """A forward hook of the layer that makes the backward pass add to its sums."""

    def forward(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()

        def backward(gradient: Tensor) -> None:
            # an expert gets tokens of all windows in one list, which then counts as one window
            by_window = [
                part.float().reshape(len(part) if part.dim() == 3 else 1, -1, part.shape[-1]) for part in (x, gradient)
            ]
            gradients = [g.T @ rows for rows, g in zip(*by_window, strict=True)]  # of the weight, [O, I]
            for index, scheme in enumerate(layer.schemes):
                change = layer.weights[scheme].to(x.device).dequantize().float() - layer.module.weight.float()
                along = torch.stack([(change * one).sum() for one in gradients])
                layer.squares[index] += along.double().square().sum().cpu()

        output.register_hook(backward)

    return forward


def _grouped(layers: Sequence[_Layer], siblings: Sequence[Sequence[str]]) -> list[list[_Layer]]:
    """Layers in groups that get one scheme: siblings, and those that share a weight."""
    groups: dict[Any, list[_Layer]] = {}
    key_of_weight: dict[int, Any] = {}
    for layer in layers:
        parent, _, name = layer.fqn.rpartition(".")
        family = next((tuple(names) for names in siblings if name in names), (name,))
        key = key_of_weight.setdefault(id(layer.module.weight), (parent, family))
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _group(layers: Sequence[_Layer], config: AQLMWeightConfig, predicted: int) -> LayerGroup:
    """The table of one group, with losses for each of `predicted` tokens."""
    names = tuple(layer.fqn for layer in layers)
    once = list({id(layer.module.weight): layer for layer in layers}.values())
    common = [scheme for scheme in once[0].schemes if all(scheme in layer.schemes for layer in once)]
    if not common:
        raise ValueError(
            f"no scheme fits all of {', '.join(names)}, which are to have one: pass others, or siblings=()"
        )
    total = sum(layer.total for layer in once)
    choices = []
    for scheme in common:
        error = sum(layer.errors[scheme] for layer in once)
        loss = sum(layer.sensitivity(predicted) * layer.errors[scheme] for layer in layers)
        bits = sum(layer.bits(scheme, config) for layer in once)
        choices.append(Choice(scheme, bits, error / total if total else error, loss))
    return LayerGroup(names, sum(layer.module.weight.numel() for layer in once), tuple(choices))
