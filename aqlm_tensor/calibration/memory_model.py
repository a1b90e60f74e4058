"""How much memory and disk `calibrate` will take, from the shapes of a model: it may be on the meta device.

A block is on the device with its inputs, the X^T X of its layers, and what the phase at hand needs. The layer solver
needs most: factorising X^T X in float64 takes 4 float32 matrices [I, I], the search 3 of those and 5.5 of the weight's
size, and a codebook of 2^16 entries some more. These factors were measured on one H100 (layers of 4096x4096 to
8192x28672); the largest phase of blocks of a 7B shape took within 1 % of what is predicted here, the others within 3 %.
Since then fine-tuning keeps decoded weights, which are counted and not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from aqlm_tensor.blocks import find_blocks, linears_of
from aqlm_tensor.calibration.activations import Place
from aqlm_tensor.calibration.report import Phase
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.fusion import SIBLINGS
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import why_incompatible

__all__ = ["MemoryEstimate", "estimate_memory", "shared_inputs"]

_FLOAT = 4
_PLACE = 8  # bytes
_FACTORISING = 4  # float32 matrices [I, I]
_SEARCH = (3, 5.5)  # float32 matrices [I, I], and copies of the weight in float32
_BYTES_PER_ENTRY = 10_000  # of k-means
_LIBRARIES = 32 << 20  # workspace of cuBLAS
_CHUNK_TOKENS = 8192  # that X^T X is made of at once


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run of `calibrate` will take.

    Attributes:
        device: bytes on the device by phase, for the block that needs most.
        host: bytes in CPU memory of the model and of inputs that are kept there.
        work_dir: bytes that finished layers will take on disk, inputs on disk included.
        result: bytes of the quantized model.
    """

    device: dict[Phase, int]
    host: int
    work_dir: int
    result: int

    @property
    def peak(self) -> int:
        """Bytes on the device in the phase that needs most."""
        return max(self.device.values())


def estimate_memory(
    model: nn.Module,
    config: AQLMWeightConfig,
    *,
    tokens: int,
    batch_tokens: int,
    blocks: Sequence[nn.Module] | None = None,
    finetune: bool = False,
    keep_inputs: Place = "device",
    model_on_device: bool = False,
) -> MemoryEstimate:
    """Predict the memory that `calibrate` takes.

    Layers share an input if their names say so (q, k, v; gate, up). Of a forward pass the widest tensors count;
    attention without a fused kernel takes more. Stacks of experts are not counted. Processes that share the batches
    each keep their part of the inputs: pass the tokens of one.

    Args:
        model: of the shapes in question.
        config: what will be done with each layer.
        tokens: of all batches.
        batch_tokens: of one batch.
        blocks: as for `calibrate`.
        finetune: whether blocks are fine-tuned.
        keep_inputs: as for `calibrate`.
        model_on_device: the whole model is there, not a block at a time.

    Raises:
        ValueError: if the model has no blocks with linear layers.
    """
    chosen = list(find_blocks(model) if blocks is None else blocks)
    scheme = AQLMScheme.parse(config.scheme)
    whole = _nbytes(model)
    peaks: dict[Phase, int] = {}
    stored = 0
    for block in chosen:
        layers = [layer for layer in linears_of([block]) if why_incompatible(layer, config) is None]
        for phase, size in _block_peaks(block, layers, scheme, tokens, batch_tokens, finetune, keep_inputs).items():
            beside = whole - _nbytes(block) if model_on_device else 0
            peaks[phase] = max(peaks.get(phase, 0), size + beside + _LIBRARIES)
        stored += sum(_stored(scheme, layer) for layer in layers)
    dense = sum(layer.weight.nbytes for block in chosen for layer in linears_of([block]))
    sets = 3 if finetune else 2
    inputs = sets * tokens * _width(chosen[0]) * _item(chosen[0])
    return MemoryEstimate(
        peaks,
        host=(0 if model_on_device else whole) + (inputs if keep_inputs == "cpu" else 0),
        work_dir=stored + (inputs if keep_inputs == "disk" else 0),
        result=whole - dense + stored,
    )


def _block_peaks(
    block: nn.Module,
    layers: list[nn.Linear],
    scheme: AQLMScheme,
    tokens: int,
    batch_tokens: int,
    finetune: bool,
    keep_inputs: Place,
) -> dict[Phase, int]:
    """Bytes on the device by phase, with the dense block there and nothing else of the model."""
    dense, item, width = _nbytes(block), _item(block), _width(block)
    inputs = tokens * width * item if keep_inputs == "device" else batch_tokens * width * item
    targets = inputs if finetune else 0
    shared = shared_inputs(block, layers)
    reads = [group[0].in_features for group in shared]
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)
    passing = batch_tokens * item * (3 * widest + 4 * width)
    chunk = _FLOAT * min(batch_tokens, _CHUNK_TOKENS) * max(reads)
    peaks: dict[Phase, int] = {
        "capture": max(dense + passing, inputs),
        "calibrate": dense + inputs + targets + sum(map(_sum, reads)) + _sum(max(reads)) // 2 + chunk + passing,
        "propagate": 2 * dense + 2 * inputs + passing,
        "quantize": 0,
    }
    left = dense
    for number, group in enumerate(shared):
        # of this group rounded to float32, of later ones as they were added up
        sums = _sum(reads[number]) // 2 + sum(map(_sum, reads[number + 1 :]))
        for layer in group:
            peaks["quantize"] = max(peaks["quantize"], left + inputs + targets + sums + _solver(layer, scheme))
            left += _stored(scheme, layer) - layer.weight.nbytes
    if finetune:
        largest = max(layer.weight.numel() for layer in layers)
        features = sum(reads) + sum(layer.out_features for layer in layers) + 4 * width  # kept for the backward pass
        weights = sum(layer.weight.numel() for layer in layers)  # decoded, kept for the backward pass like the places
        places = _PLACE * scheme.num_codebooks * weights // (scheme.in_group_size * scheme.out_group_size)  # of codes
        kept = _FLOAT * (weights + largest + batch_tokens * (features + 2 * widest)) + places
        peaks["fine-tune"] = left + inputs + targets + kept
    return peaks


def shared_inputs(block: nn.Module, layers: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """Layers of a block in groups that read the same tensor, by their names."""
    names = {module: name for name, module in block.named_modules()}
    groups: dict[tuple[str, ...], list[nn.Linear]] = {}
    for layer in layers:
        parent, _, name = names[layer].rpartition(".")
        family = next((tuple(family) for family in SIBLINGS if name in family), (name,))
        groups.setdefault((parent, *family), []).append(layer)
    return list(groups.values())


def _sum(in_features: int) -> int:
    """Bytes of X^T X while batches are added."""
    return 2 * _FLOAT * in_features**2


def _solver(layer: nn.Linear, scheme: AQLMScheme) -> int:
    square, size = _FLOAT * layer.in_features**2, _FLOAT * layer.weight.numel()
    entries = scheme.num_codebooks * 2**scheme.nbits_per_codebook * _BYTES_PER_ENTRY
    return int(max(_FACTORISING * square, _SEARCH[0] * square + _SEARCH[1] * size + entries))


def _stored(scheme: AQLMScheme, layer: nn.Linear) -> int:
    return scheme.stored_bits(layer.out_features, layer.in_features, float_bits=8 * layer.weight.element_size()) // 8


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _width(block: nn.Module) -> int:
    """Width of the hidden state: what the block's first layer reads."""
    return linears_of([block])[0].in_features


def _item(block: nn.Module) -> int:
    return linears_of([block])[0].weight.element_size()
