"""How long `calibrate` will take on one H100, from the shapes of a model: it may be on the meta device.

The layer solver is counted by its float32 products, its search of pairs of codes and the launches of a round; the rest
by products, the memory that sums touch, and launches. The constants were measured on one H100 with torch 2.11. With
them layers of 4096x4096, 4096x14336 and 8192x28672 come out within 16 % of what they took (0.77, 2.6 and 13.8 s), the
first two with a codebook of 2^16 entries within 2 % of 4.0 and 5.8 s, SmolLM2-135M with fine-tuning within 6 % of 60 s,
and fine-tuning of two 8B blocks within 10 % of 8.1 s; the last two sets of constants were fitted to these runs. Where
early stopping ends fine-tuning it takes less. On another GPU take the ratio of float32 products a second.

Of several processes the one with most to do counts, and not the time in which they send each other sums and layers.
"""

import math
from collections.abc import Sequence

from torch import nn

from aqlm_tensor.blocks import find_blocks, linears_of
from aqlm_tensor.calibration.finetune import FinetuneConfig
from aqlm_tensor.calibration.memory_model import (
    SolvedParts,
    expert_parts,
    owners_of,
    share_of_tokens,
    shared_inputs,
    solved_parts,
    used_experts,
)
from aqlm_tensor.calibration.report import Phase
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.quantizer.solver import SolverConfig
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["estimate_seconds", "layer_seconds"]

_PRODUCTS = 48e12  # floating point operations a second in float32
_HALF_PRODUCTS = 250e12  # the same of forward passes in 16 bits, attention included
_PAIRS = 5.7e12  # of entries of two codebooks, compared in a second
_ENTRIES = 5.8e12  # of a codebook that is searched alone
_DISTANCES = 3.4e11  # of k-means
_BYTES = 2.5e12  # read and written in a second
_GROUP = 35e-6  # s: the search of one group, however few rows there are
_ROUND = 9e-3  # s: the launches of a round
_LAYER = 30e-3  # s: what every layer takes
_PASS = 3e-3  # s: the launches of a block's forward pass
_EXPERT = 1e-3  # s: the launches of one expert in a pass in which X^T X is added up
_STEP = 2.5e-3  # s: the launches of a step of fine-tuning, replayed, and its optimizer
_DECODING = 0.005e-9  # s a weight: decoding and gathering gradients in a step of fine-tuning
_STARTING = 8.0  # s: kernels are compiled


def layer_seconds(out_features: int, in_features: int, scheme: AQLMScheme, solver: SolverConfig) -> float:
    """Seconds of `quantize_layer` with X^T X."""
    count, size = scheme.num_codebooks, 2**scheme.nbits_per_codebook
    rows, groups = out_features // scheme.out_group_size, in_features // scheme.in_group_size
    pairs = {1: 0, 2: 1}.get(count, 1.7 * count)  # searched in a round; more than two go round twice in most rounds
    alone = size * count / _ENTRIES if pairs == 0 or size > 256 else 0.0
    sweep = groups * max(_GROUP, rows * (pairs * min(size, 256) ** 2 / _PAIRS + alone))
    product = 2 * out_features * in_features**2 / _PRODUCTS
    rounds = solver.max_rounds
    points = min(rows * groups, max(1 << 14, 16 * size) if count > 1 else 1 << 20)
    iterations = solver.kmeans_iterations * (2 if count == 1 else 1)
    start = _LAYER + count * points * size * iterations / _DISTANCES + in_features**3 / _PRODUCTS
    return start + sweep + rounds * (sweep + max(_ROUND, (solver.conjugate_gradient_steps + 4) * product))


def estimate_seconds(
    model: nn.Module,
    config: AQLMWeightConfig,
    *,
    tokens: int,
    batch_tokens: int,
    blocks: Sequence[nn.Module] | None = None,
    finetune: FinetuneConfig | None = None,
    processes: int = 1,
) -> dict[Phase, float]:
    """Predict the seconds that `calibrate` takes on one H100 for each process, by phase.

    Args:
        model: of the shapes in question.
        config: what will be done with each layer.
        tokens: of all batches.
        batch_tokens: of one batch.
        blocks: as for `calibrate`.
        finetune: as for `calibrate`; all its epochs are counted.
        processes: that share batches and layers.

    Raises:
        ValueError: if the model has no blocks with linear layers.
    """
    seconds: dict[Phase, float] = dict.fromkeys(("capture", "calibrate", "quantize", "propagate"), 0.0)
    seconds["capture"] = _STARTING
    scheme, batches = AQLMScheme.parse(config.scheme), math.ceil(tokens / batch_tokens)
    own = math.ceil(batches / processes)
    for block in find_blocks(model) if blocks is None else blocks:
        linears, parts = linears_of([block]), solved_parts(model, block, config)
        weights = sum(layer.weight.numel() for layer in linears)
        active = weights + sum(stack.weight[0].numel() * used_experts(stack) for stack in parts.stacks)
        half = linears[0].weight.element_size() == 2
        forward = own * max(_PASS, 2 * batch_tokens * active / (_HALF_PRODUCTS if half else _PRODUCTS))
        one_by_one = own * _EXPERT * max((len(stack.weight) for stack in parts.stacks), default=0)
        seen = share_of_tokens(tokens, batch_tokens, processes)
        seconds["calibrate"] += forward + one_by_one + _summing(block, parts, seen, own)
        seconds["quantize"] += max(_solving(parts, scheme, config.solver, rank, processes) for rank in range(processes))
        seconds["propagate"] += forward
        if finetune is not None:
            now = seconds.get("fine-tune", 0.0)
            seconds["fine-tune"] = now + _tuning_seconds(finetune, weights, active, batches, batch_tokens, processes)
    return seconds


def _summing(block: nn.Module, parts: SolvedParts, tokens: int, batches: int) -> float:
    """X^T X of the layers and experts of a block."""
    squares = sum(group[0].in_features ** 2 for group in shared_inputs(block, parts.layers))
    products, touched = squares, squares
    for stack in parts.stacks:
        products += used_experts(stack) * stack.weight.shape[2] ** 2
        touched += len(stack.weight) * stack.weight.shape[2] ** 2
    return products * 2 * tokens / _PRODUCTS + touched * 20 * batches / _BYTES


def _solving(parts: SolvedParts, scheme: AQLMScheme, solver: SolverConfig, rank: int, processes: int) -> float:
    """One process's layers and experts of a block."""
    owners = owners_of(parts.layers, processes)
    mine = [layer for layer in parts.layers if owners[layer] == rank]
    for stack in parts.stacks:
        mine += expert_parts(stack) * len(range(rank, len(stack.weight), processes))
    return sum(layer_seconds(layer.out_features, layer.in_features, scheme, solver) for layer in mine)


def _tuning_seconds(
    config: FinetuneConfig, weights: int, active: int, batches: int, batch_tokens: int, processes: int
) -> float:
    """Of a block with so many decoded weights, and so many that a token is multiplied with."""
    held_out = config.held_out(batches)
    product = 2 * batch_tokens * active / _HALF_PRODUCTS
    training = _STEP + 3 * product + _DECODING * weights
    validating = max(_PASS, product) + _DECODING * weights / 2
    together = math.ceil(config.batches_per_step / processes) / config.batches_per_step  # passes one after another
    validated = math.ceil(len(held_out) / processes)
    return config.epochs * held_out.start * together * training + (config.epochs + 1) * validated * validating
