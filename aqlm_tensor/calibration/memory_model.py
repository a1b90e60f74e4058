"""How much memory and disk `calibrate` will take, from the shapes of a model: it may be on the meta device.

A block is on the device with its inputs, the X^T X of its layers, and what the phase at hand needs. The layer solver
needs most: factorising X^T X in float64 takes 4 float32 matrices [I, I] and some columns of them, the search 2 of those
and 5.5 of the weight's size, and a codebook of 2^16 entries some more. These factors were measured on H100 and H200
(layers of 4096x4096 to 8192x28672); the largest phase of blocks of a 7B shape took within 1 % of what is predicted
here, the others within 3 %. Fine-tuning took 15 % more than was predicted when it still computed in float32, and was
not measured by itself since.

Of a stack of experts each one has an X^T X of its own, and all of these are there until the last expert of the stack is
solved. Several processes share the batches and the layers to be solved; each has the block and every X^T X that it
added to, until it knows which layers are its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from aqlm_tensor.blocks import find_blocks, linears_of
from aqlm_tensor.calibration.activations import Place
from aqlm_tensor.calibration.experts import ExpertStack, find_stacks
from aqlm_tensor.calibration.report import Phase
from aqlm_tensor.config import AQLMWeightConfig
from aqlm_tensor.fusion import SIBLINGS
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.targets import why_incompatible

__all__ = [
    "MemoryEstimate",
    "SolvedParts",
    "estimate_memory",
    "expert_parts",
    "owners_of",
    "share_of_tokens",
    "shared_inputs",
    "solved_parts",
    "used_experts",
]

_FLOAT = 4
_HALF = 2
_PLACE = 8  # bytes
_GRADIENT = 14  # bytes for each weight of a layer: its decoded gradient in 16 bits and 32, and products of that
_FACTORISING = (4, 16384)  # float32 matrices [I, I], and bytes for each I: 512 columns at a time
_SEARCH = (2, 5.5)  # float32 matrices [I, I], and copies of the weight in float32
_BYTES_PER_ENTRY = 10_000  # of k-means
_LIBRARIES = 32 << 20  # workspace of cuBLAS
_CHUNK_TOKENS = 8192  # that X^T X is made of at once
_EXPERT_ERROR = 3  # copies of an expert's weight in float32 while its error is measured


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run of `calibrate` will take.

    Attributes:
        device: bytes on the device of each process by phase, for the block and the process that need most.
        host: bytes in CPU memory of each process, for the model and inputs that are kept there.
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
    processes: int = 1,
) -> MemoryEstimate:
    """Predict the memory that `calibrate` takes.

    Layers share an input if their names say so (q, k, v; gate, up). Of a forward pass the widest tensors count;
    attention without a fused kernel takes more, and so does fine-tuning a block whose router keeps the activations of
    many experts.

    Args:
        model: of the shapes in question.
        config: what will be done with each layer.
        tokens: of all batches.
        batch_tokens: of one batch.
        blocks: as for `calibrate`.
        finetune: whether blocks are fine-tuned.
        keep_inputs: as for `calibrate`.
        model_on_device: the whole model is there, not a block at a time.
        processes: that share batches and layers, each with a device of its own.

    Raises:
        ValueError: if the model has no blocks with linear layers.
    """
    chosen = list(find_blocks(model) if blocks is None else blocks)
    scheme = AQLMScheme.parse(config.scheme)
    whole = _nbytes(model)
    own = share_of_tokens(tokens, batch_tokens, processes)
    peaks: dict[Phase, int] = {}
    stored = dense = 0
    for block in chosen:
        parts = solved_parts(model, block, config)
        needed = _BlockMemory(block, parts, scheme, own, batch_tokens, finetune, keep_inputs, processes)
        for phase, size in needed.peaks().items():
            beside = whole - _nbytes(block) if model_on_device else 0
            peaks[phase] = max(peaks.get(phase, 0), size + beside + _LIBRARIES)
        stored += sum(_stored(scheme, part) for part in (*parts.layers, *parts.experts()))
        dense += sum(layer.weight.nbytes for layer in parts.layers)
        dense += sum(stack.weight.nbytes for stack in parts.stacks)
    sets = 3 if finetune else 2
    inputs = sets * own * _width(chosen[0]) * _item(chosen[0])
    return MemoryEstimate(
        peaks,
        host=(0 if model_on_device else whole) + (inputs if keep_inputs == "cpu" else 0),
        work_dir=stored + (inputs * processes if keep_inputs == "disk" else 0),
        result=whole - dense + stored,
    )


def share_of_tokens(tokens: int, batch_tokens: int, processes: int) -> int:
    """Tokens of the process that has most of them; batches are not divided."""
    batches = math.ceil(tokens / batch_tokens)
    return min(tokens, math.ceil(batches / processes) * batch_tokens)


@dataclass(frozen=True)
class SolvedParts:
    """What is quantized in a block.

    Attributes:
        layers: linear layers.
        stacks: of experts.
    """

    layers: list[nn.Linear]
    stacks: list[ExpertStack]

    def experts(self) -> list[nn.Linear]:
        """Each part of each expert that is solved by itself, as a layer on the meta device."""
        return [part for stack in self.stacks for part in expert_parts(stack) * len(stack.weight)]


def solved_parts(model: nn.Module, block: nn.Module, config: AQLMWeightConfig) -> SolvedParts:
    """What a config quantizes in a block."""
    layers = [layer for layer in linears_of([block]) if why_incompatible(layer, config) is None]
    return SolvedParts(layers, find_stacks(model, config, [block])[0])


def expert_parts(stack: ExpertStack) -> list[nn.Linear]:
    """The parts of one expert that are solved one by one, as layers on the meta device."""
    rows, inputs = stack.weight.shape[1:]
    one = nn.Linear(inputs, rows // stack.partitions, bias=False, device="meta", dtype=stack.weight.dtype)
    return [one] * stack.partitions


@dataclass(frozen=True)
class _BlockMemory:
    """Bytes on the device, with the dense block there and nothing else of the model."""

    block: nn.Module
    parts: SolvedParts
    scheme: AQLMScheme
    tokens: int
    batch_tokens: int
    finetune: bool
    keep_inputs: Place
    processes: int

    def peaks(self) -> dict[Phase, int]:
        """By phase."""
        dense, item, width = _nbytes(self.block), _item(self.block), _width(self.block)
        inputs = (self.tokens if self.keep_inputs == "device" else self.batch_tokens) * width * item
        kept = inputs * (2 if self.finetune else 1)
        sums = [_sum(group[0].in_features) for group in shared_inputs(self.block, self.parts.layers)]
        sums += [_sum(stack.weight.shape[2]) for stack in self.parts.stacks for _ in range(len(stack.weight))]
        passing = self.batch_tokens * item * (3 * self._widest() + 4 * width)
        product = max(sums) // 2 + _FLOAT * min(self.batch_tokens, _CHUNK_TOKENS) * self._most_inputs()
        peaks: dict[Phase, int] = {
            "capture": max(dense + passing, inputs),
            "calibrate": dense + kept + sum(sums) + product + passing,
            "propagate": 2 * dense + 2 * inputs + passing,
            "quantize": kept + max(self._solving(rank) for rank in range(self.processes)),
        }
        if self.finetune:
            peaks["fine-tune"] = kept + self._tuning()
        return peaks

    def _solving(self, rank: int) -> int:
        """Of one process, while it solves its layers and experts."""
        left, most = _nbytes(self.block), 0
        groups = shared_inputs(self.block, self.parts.layers)
        of_experts = sum(_sum(stack.weight.shape[2]) * len(stack.weight) for stack in self.parts.stacks)
        owners = owners_of(self.parts.layers, self.processes)
        mine = [[layer for layer in group if owners[layer] == rank] for group in groups]
        mine = [group for group in mine if group]
        reads = [group[0].in_features for group in mine]
        for number, group in enumerate(mine):
            # of this group rounded to float32, of later ones as they were added up
            sums = _sum(reads[number]) // 2 + sum(map(_sum, reads[number + 1 :])) + of_experts
            for layer in group:
                most = max(most, left + sums + _solver(layer, self.scheme))
                left += _stored(self.scheme, layer) - layer.weight.nbytes
        left = _nbytes(self.block)  # of all layers, which others have solved as well
        left += sum(_stored(self.scheme, layer) - layer.weight.nbytes for layer in self.parts.layers)
        for stack in self.parts.stacks:
            parts = expert_parts(stack)
            solved = len(stack.weight) * sum(_stored(self.scheme, part) for part in parts)
            error = _EXPERT_ERROR * _FLOAT * sum(part.weight.numel() for part in parts)
            own = _sum(stack.weight.shape[2]) // 2 + max(error, *(_solver(part, self.scheme) for part in parts))
            most = max(most, left + of_experts + solved + max(own, solved))  # joined to a stack in the end
            left += solved - stack.weight.nbytes
            of_experts -= _sum(stack.weight.shape[2]) * len(stack.weight)
        return most

    def _tuning(self) -> int:
        """While the block is fine-tuned."""
        layers, stacks = self.parts.layers, self.parts.stacks
        left = _nbytes(self.block) + sum(_stored(self.scheme, layer) - layer.weight.nbytes for layer in layers)
        left += sum(_stored(self.scheme, part) for part in self.parts.experts())
        left += sum(_FLOAT * stack.weight.numel() - stack.weight.nbytes for stack in stacks)  # decoded, in float32
        weights = sum(layer.weight.numel() for layer in layers)  # decoded, kept for the backward pass like the places
        scheme, largest = self.scheme, max(layer.weight.numel() for layer in layers)
        places = _PLACE * scheme.num_codebooks * weights // (scheme.in_group_size * scheme.out_group_size)  # of codes
        # kept for the backward pass, which computes in 16 bits and adds in 32
        features = sum(group[0].in_features for group in shared_inputs(self.block, layers)) + 4 * _width(self.block)
        features += sum(layer.out_features for layer in layers)
        for stack in stacks:
            rows, inputs = stack.weight.shape[1:]
            features += (2 * rows + inputs) * used_experts(stack)
        kept = _HALF * (weights + self.batch_tokens * features)
        return left + kept + places + _GRADIENT * largest + _FLOAT * self.batch_tokens * 2 * self._widest()

    def _widest(self) -> int:
        """Of what a layer reads and writes."""
        sizes = [max(layer.weight.shape) for layer in self.parts.layers]
        return max(sizes + [max(stack.weight.shape[1:]) for stack in self.parts.stacks])

    def _most_inputs(self) -> int:
        sizes = [layer.in_features for layer in self.parts.layers]
        return max(sizes + [stack.weight.shape[2] for stack in self.parts.stacks])


def owners_of(layers: Sequence[nn.Linear], processes: int) -> dict[nn.Linear, int]:
    """Which of so many processes solves each layer."""
    return dict(zip(layers, Ranks.divided([layer.weight.numel() for layer in layers], processes), strict=True))


def used_experts(stack: ExpertStack) -> int:
    """How many experts a token goes to, as far as the model's config says; all otherwise."""
    return getattr(getattr(stack.module, "config", None), "num_experts_per_tok", None) or len(stack.weight)


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
    factorising = _FACTORISING[0] * square + _FACTORISING[1] * layer.in_features
    return int(max(factorising, _SEARCH[0] * square + _SEARCH[1] * size + entries))


def _stored(scheme: AQLMScheme, layer: nn.Linear) -> int:
    return scheme.stored_bits(layer.out_features, layer.in_features, float_bits=8 * layer.weight.element_size()) // 8


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _width(block: nn.Module) -> int:
    """Width of the hidden state: what the block's first layer reads."""
    return linears_of([block])[0].in_features


def _item(block: nn.Module) -> int:
    return linears_of([block])[0].weight.element_size()
