"""Between the tensors of a checkpoint and the parameters of a Transformers model, in both directions.

Transformers loads through converters: patterns of checkpoint names, a list of operations, the name of a parameter. Its
own converters merge experts, fuse gate and up, split what was fused. They work on AQLMTensors as they are, since these
can be stacked, concatenated and split; so each gets a copy that first makes one of codes, codebooks and scales. Saving
runs the reverse converters on the weights before these are taken apart.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
)

from aqlm_tensor.checkpoint import PARTS
from aqlm_tensor.tensor import AQLMTensor

__all__ = [
    "Problems",
    "checkpoint_names",
    "checkpoint_weights",
    "is_ours",
    "linear_converter",
    "original_of",
    "stack_converter",
    "with_parts",
]


class Problems:
    """Errors met while converting, by weight; Transformers would log them and raise an error that names none."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def __deepcopy__(self, memo: dict) -> "Problems":
        """The loader copies a converter for each weight; all copies write here."""
        return self

    def raise_any(self) -> None:
        """Raise a ValueError that names them, if there are any."""
        if self.found:
            raise ValueError("; ".join(f"{name}: {text}" for name, text in sorted(self.found.items())[:5]))


class Deserialize(ConversionOps):
    """(codes, codebooks, scales), each a list of tensors, to a list of AQLMTensors under the codes' pattern."""

    supports_many_to_many = True

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride] - the keywords that the loader passes
        self, input_dict: dict[str, Any], source_patterns: list[str], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Called by Transformers; records codes out of range."""
        weights = {}
        for first in range(0, len(source_patterns), len(PARTS)):
            patterns = source_patterns[first : first + len(PARTS)]
            triples = zip(*(input_dict.pop(pattern) for pattern in patterns), strict=True)
            weights[patterns[0]] = [self._weight(full_layer_name, *triple) for triple in triples]
        return weights

    def _weight(self, name: str, codes: Tensor, codebooks: Tensor, scales: Tensor) -> AQLMTensor:
        weight = AQLMTensor(codes, codebooks, scales)
        try:
            weight.check_codes()
        except ValueError as error:
            self.problems.found[name] = str(error)
        return weight


class ToParameters(ConversionOps):
    """AQLMTensors to parameters: Transformers would make ones that require a gradient."""

    supports_many_to_many = True

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, Any], target_patterns: list[str], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Called by Transformers."""
        weights = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        parameters = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
        if len(target_patterns) == 1 and len(parameters) == 1:
            return {full_layer_name: next(iter(parameters.values()))}
        return parameters


def linear_converter(problems: Problems, *then: ConversionOps) -> WeightConverter:
    """X.codes, X.codebooks, X.scales to X.weight, for whatever no other converter takes, and further operations."""
    sources = [rf"^(.+)\.{part}$" for part in PARTS]
    return WeightConverter(sources, r"\1.weight", [Deserialize(problems), ToParameters(), *then])


def stack_converter(model: nn.Module, problems: Problems) -> WeightConverter | None:
    """X.codes, X.codebooks, X.scales to X, for stacks of experts that checkpoints hold as such; None without any."""
    names = {name for name, weight in model.named_parameters() if weight.dim() == 3 and not name.endswith(".weight")}
    if not names:
        return None
    patterns = sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names})
    # the checkpoint's names may lack the name of the base model, or have it where the model lacks it
    base = re.escape(f"{getattr(model, 'base_model_prefix', '')}.")
    stacks = "|".join(pattern.removeprefix(base) for pattern in patterns)
    sources = [rf"^((?:.+\.)?(?:{stacks}))\.{part}$" for part in PARTS]
    return WeightConverter(sources, r"\1", [Deserialize(problems), ToParameters()])


def with_parts(converter: WeightConverter, problems: Problems) -> WeightConverter | None:
    """A copy of a model's converter that reads quantized weights; None if it does not read weights."""
    sources = [pattern.removesuffix("$") for pattern in converter._original_source_patterns]
    if not all(pattern.endswith("weight") for pattern in sources):
        return None
    parts = [pattern.removesuffix("weight") + part for pattern in sources for part in PARTS]
    operations = [Deserialize(problems), *converter.operations, ToParameters()]
    copy = converter.copy(parts, list(converter._original_target_patterns), operations=operations)
    return cast("WeightConverter", copy)


def is_ours(transform: WeightTransform) -> bool:
    """Whether a transform was made by `linear_converter` or `with_parts`."""
    return isinstance(transform, WeightConverter) and isinstance(transform.operations[0], Deserialize)


def original_of(transform: WeightTransform, transforms: Iterable[WeightTransform]) -> WeightTransform | None:
    """The model's converter that one of `with_parts` was copied from."""
    for other in transforms:
        if isinstance(other, WeightConverter) and not is_ours(other):
            targets = other._original_target_patterns == transform._original_target_patterns
            if targets and other.scope_prefix == transform.scope_prefix:
                return other
    return None


def checkpoint_weights(model: Any, weights: dict[str, AQLMTensor]) -> dict[str, tuple[str, AQLMTensor]]:
    """The pieces in which a model's quantized weights are stored.

    Args:
        model: a Transformers model.
        weights: by parameter name; fused and merged ones come apart as the model's conversions say.

    Returns:
        For each name that `save_pretrained` will still rename, its layer's name in the checkpoint and the piece.

    Raises:
        ValueError: for a weight that the reversed conversion cannot handle as codes.
    """
    transforms = _reversed_transforms(model)
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    pending: dict[str, WeightConverter] = {}
    pieces: dict[str, Any] = {}
    for name, weight in weights.items():
        renamed, pattern = apply_converters(name, converters)
        if pattern is None:
            pieces[name] = weight
        else:
            converter = pending.setdefault(renamed, deepcopy(by_pattern[pattern]))
            converter.add_tensor(renamed, name, pattern, cast("Any", weight))
    for name, converter in pending.items():
        for target, value in converter.convert(name, model=model, config=model.config).items():
            pieces[target] = value[0] if isinstance(value, list) else value
    return {name: (_stored_layer(name, renamings), piece) for name, piece in pieces.items()}


def _stored_layer(name: str, renamings: list[WeightRenaming]) -> str:
    """What save_pretrained makes of the X in the names X.codes, X.codebooks and X.scales of a weight's parts."""
    return apply_renamings(f"{name.removesuffix('.weight')}.codes", renamings).removesuffix(".codes")


def checkpoint_names(model: Any, names: Iterable[str]) -> list[str]:
    """What parameters that no converter touches are called in the checkpoint."""
    renamings = [entry for entry in _reversed_transforms(model) if isinstance(entry, WeightRenaming)]
    return [apply_renamings(name, renamings) for name in names]


def _reversed_transforms(model: Any) -> list[WeightTransform]:
    """The conversions that `save_pretrained` will apply."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:  # it was not loaded by from_pretrained
        loading = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [entry for entry in loading if not isinstance(entry, PrefixChange)]
    return [entry.reverse_transform() for entry in reversed(transforms)]
