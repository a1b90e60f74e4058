"""What a checkpoint holds for a Transformers model, from file headers alone, before anything is loaded.

Transformers reports tensors without a home and weights without a value, and goes on with random numbers in them. Here
they raise. What may be missing or left over is only what differs between a model and another with the same base: a
classification head that is to be trained, the lm_head of a checkpoint from which only the base model is taken.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from aqlm_tensor.checkpoint import PARTS, check_scheme, stored_weights
from aqlm_tensor.checkpoint_config import CheckpointConfig
from aqlm_tensor.checkpoint_io import TensorFiles

__all__ = ["check_checkpoint", "homes_of"]


def check_checkpoint(
    model: Any, files: Sequence[str], transforms: list[WeightTransform], config: CheckpointConfig
) -> dict[str, int]:
    """Check that a checkpoint fits a model.

    Args:
        model: a Transformers model, on the meta device.
        files: of the checkpoint.
        transforms: with which Transformers will load it; left unchanged.
        config: of the checkpoint.

    Returns:
        The stored bytes of each parameter and buffer, by name in the model.

    Raises:
        ValueError: naming quantized tensors that are incomplete or contradict the config, tensors that have no place
            in the model, parameters that would stay unfilled, and weights of another shape.
    """
    tensors = TensorFiles(Path(), files)
    headers = {name: tensors.header(name) for name in tensors.names()}
    weights = stored_weights(tensors)
    for name, info in weights.items():
        if info.scheme is not None:
            check_scheme(name.removesuffix(".weight"), info.scheme, config)
    homes = homes_of(model, list(headers), transforms)
    state = model.state_dict()
    _check_experts(state, homes)
    unexpected = {key: target for key, targets in homes.items() for target in targets if target not in state}
    filled = {target for targets in homes.values() for target in targets}
    _check_names(model, unexpected, set(state) - filled)
    _check_shapes(state, homes, {name: info.shape for name, info in weights.items()})
    sizes: dict[str, int] = defaultdict(int)
    for key, targets in homes.items():
        shape, dtype = headers[key]
        for target in targets:
            sizes[target] += math.prod(shape) * dtype.itemsize // len(targets)
    return dict(sizes)


def homes_of(model: Any, keys: list[str], transforms: list[WeightTransform]) -> dict[str, list[str]]:
    """For each tensor of the checkpoint the parameters it goes to, found as Transformers will."""
    transforms = deepcopy(transforms)  # they note whether they were used
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    homes = {}
    for key in sorted(keys, key=dot_natural_key):
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if renamed not in state and key in state:
            renamed, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        targets = [""] if pattern is None else by_pattern[pattern].target_patterns
        homes[key] = [renamed.replace(targets[0], target) if target else renamed for target in targets]
    return homes


_EXPERT = re.compile(r"\.experts\.\d+\.")


def _check_experts(state: dict[str, Any], homes: dict[str, list[str]]) -> None:
    """Raise unless a stack of experts gets a tensor of every kind from each expert."""
    kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
    for key, targets in homes.items():
        if _EXPERT.search(key) and targets[0] in state and not _EXPERT.search(targets[0]):
            kinds[targets[0], _EXPERT.sub(".experts.*.", key)].add(key)
    for (target, kind), found in kinds.items():
        missing = {kind.replace("*", str(expert)) for expert in range(state[target].shape[0])} - found
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing)[:5])} for {target}")


def _check_names(model: Any, unexpected: dict[str, str], missing: set[str]) -> None:
    """Raise for tensors without a home and parameters without a value.

    Args:
        model: the model.
        unexpected: the name in the model that a tensor of the checkpoint would have, by its own name.
        missing: parameters and buffers that no tensor goes to.
    """
    report = LoadStateDictInfo(
        missing_keys=missing,
        unexpected_keys=set(unexpected.values()),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(report)  # what the model's class declares to be harmless
    missing = {name for name in report.missing_keys if not _is_tied(model, name, missing)}
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or [type(model).__name__]):
        missing = {name for name in missing if _in_base(model, name)}
        report.unexpected_keys = {
            target for key, target in unexpected.items() if _in_base(model, key) and target in report.unexpected_keys
        }
    surplus = sorted(key for key, target in unexpected.items() if target in report.unexpected_keys)
    if surplus:
        raise ValueError(
            f"{len(surplus)} tensors of the checkpoint have no place in {type(model).__name__}: "
            f"{', '.join(surplus[:5])}; is it a checkpoint of another architecture or configuration?"
        )
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} weights of {type(model).__name__}: {', '.join(sorted(missing)[:5])}"
        )


def _in_base(model: Any, name: str) -> bool:
    """Whether a name belongs to the model's base, which all models of a family have in common, and not to a head."""
    prefix = f"{model.base_model_prefix}."
    return name.startswith(prefix) or (model.base_model is model and name in model.state_dict())


def _is_tied(model: Any, name: str, missing: set[str]) -> bool:
    """Whether a parameter will be tied to one that the checkpoint has."""
    ties = getattr(model, "all_tied_weights_keys", {})
    source = ties.get(name, name)
    return any(other not in missing for other in {source, *(key for key in ties if ties[key] == source)})


def _check_shapes(state: dict[str, Any], homes: dict[str, list[str]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise for quantized weights of another shape than the parameter that they alone become."""
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        targets = homes.get(f"{layer}.{PARTS[0]}", [])
        alone = len(targets) == 1 and re.sub(r".*\.", "", targets[0]) == "weight"
        if alone and targets[0] in state and tuple(state[targets[0]].shape) != shape:
            raise ValueError(f"{layer} is {shape} in the checkpoint but {tuple(state[targets[0]].shape)} in the model")
