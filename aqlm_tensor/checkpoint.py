"""save and load: the AQLM checkpoint format, for any nn.Module.

A weight `X.weight` is stored as `X.codes`, `X.codebooks` and `X.scales`; everything else as in state_dict. config.json
holds `quantization_config` as the official AQLM code and Transformers write it, with the commonest scheme in its base
fields; layers that differ are listed in its "aqlm_tensor" entry, which other readers ignore.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aqlm_tensor.checkpoint_config import CheckpointConfig, quantization_config, read_config
from aqlm_tensor.checkpoint_io import CONFIG_NAME, TensorFiles, new_folder, parse_size, write_tensors
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["PARTS", "TensorInfo", "check_scheme", "inspect", "load", "save", "stored_weights", "whole_state"]

PARTS = ("codes", "codebooks", "scales")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class TensorInfo:
    """One weight of a checkpoint, quantized or not.

    Attributes:
        name: of the weight in the model.
        scheme: None for a dense tensor.
        shape: of the (dequantized) weight.
        dtype: of the values; of the codebooks if quantized.
        nbytes: bytes stored.
    """

    name: str
    scheme: AQLMScheme | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight; nan for an empty tensor."""
        weights = torch.Size(self.shape).numel()
        return 8 * self.nbytes / weights if weights else float("nan")


def save(model: nn.Module, folder: str | Path, *, force: bool = False, max_shard_size: int | str = "5GB") -> None:
    """Write a quantized model as an AQLM checkpoint.

    The folder appears complete or not at all. Parameters that share memory (tied embeddings) are written once, under
    the first of their names. A model with a Transformers `config` gets a config.json that Transformers understands.

    Args:
        model: with at least one AQLM weight; also while it is trained, inside `trainable`.
        folder: must not exist, unless `force`.
        force: replace an existing checkpoint folder; a folder that is no checkpoint is never replaced.
        max_shard_size: bytes per file, such as "5GB".

    Raises:
        ValueError: if the model has no AQLM weight, or one that the format cannot hold (a transposed view).
        FileExistsError: if the folder exists and may not be replaced.
        OSError: if it does not fit on the disk or cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    shard_bytes = parse_size(max_shard_size)
    tensors, schemes = _flatten(model)
    if not schemes:
        raise ValueError("the model has no AQLM weight: quantize_ it first, or save it with torch or safetensors")
    section = quantization_config(schemes, _dense_layers(model))
    text = json.dumps({**_model_config(model), "quantization_config": section}, indent=2)
    needed = sum(tensor.nbytes for tensor in tensors.values()) + len(text)
    with new_folder(folder, force=force, needed_bytes=needed) as temporary:
        write_tensors(temporary, tensors, shard_bytes)
        (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load(model: Module, folder: str | Path) -> Module:
    """Load an AQLM checkpoint, ours or one of the official code, into a model of that architecture.

    Everything is read and checked before the model is touched. Tensors keep the dtype they are stored in and go to the
    device of the parameter they replace (from the meta device to the CPU). Parameters that are tied in the model may
    be stored once.

    Args:
        model: freshly built, also on the meta device; its values are replaced.
        folder: with config.json and safetensors or .bin files.

    Returns:
        The same model.

    Raises:
        ValueError: if files are missing or damaged, tensors are missing, surplus or do not fit the model or the config,
            or codes are out of range.
    """
    config = read_config(folder)
    files = TensorFiles(Path(folder))
    homes = _homes(model)
    stored = {_home_name(info, homes): info for info in stored_weights(files).values()}
    _check_names(model, homes, stored)
    _check_no_meta(model, homes)
    loaded: dict[str, Tensor] = {}
    for name, info in stored.items():
        if name in homes:
            _check_fits(name, info, config, homes[name][0])
            loaded[name] = _read(files, info)
    for name, tensor in loaded.items():
        _assign(homes[name], tensor)
    return model


def inspect(folder: str | Path) -> list[TensorInfo]:
    """The weights of a checkpoint folder in stored order, from file headers only.

    Raises:
        ValueError: if files are missing or damaged, or quantized tensors do not fit together.
    """
    return list(stored_weights(TensorFiles(Path(folder))).values())


def _dense_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that are not quantized."""
    return [
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module.weight, AQLMTensor)
    ]


def _model_config(model: nn.Module) -> dict[str, Any]:
    """The model's own config as JSON, if it has one as Transformers models do."""
    to_json = getattr(getattr(model, "config", None), "to_json_string", None)
    if not callable(to_json):
        return {}
    config = {**json.loads(str(to_json(use_diff=False))), "architectures": [type(model).__name__]}
    dtype = getattr(model, "dtype", None)  # the config's own is what the model had when it was loaded
    return {**config, "dtype": str(dtype).removeprefix("torch.")} if isinstance(dtype, torch.dtype) else config


def _flatten(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, AQLMScheme]]:
    """Plain tensors by stored name, without repetitions of tied ones, and the scheme of each quantized module."""
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, AQLMScheme] = {}
    written: set[tuple[Any, ...]] = set()
    for name, value in whole_state(model).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} in the model's state_dict is a {type(value).__name__}: only tensors can be saved")
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to save: load the model first")
        parts = value.parts() if isinstance(value, AQLMTensor) else (value,)
        key = tuple((part.data_ptr(), part.shape, part.stride(), part.dtype) for part in parts)
        if parts[0].numel() and key in written:
            continue
        written.add(key)
        if not isinstance(value, AQLMTensor):
            tensors[name] = _own(value)
            continue
        if value.orientation != "matrix":
            raise ValueError(f"{name} is a {value.orientation} view of an AQLMTensor: save the matrix it came from")
        layer = name.removesuffix(".weight")
        schemes[layer] = value.scheme
        for part_name, part in zip(PARTS, parts, strict=True):
            tensors[f"{layer}.{part_name}"] = _own(part)
    return tensors, schemes


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The model's state dict; weights whose parts are parameters, inside `trainable`, are AQLMTensors here, too."""
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith(".codes")]:
        layer = name.removesuffix(".codes")
        if not all(f"{layer}.{part}" in state for part in PARTS):
            continue
        module = model.get_submodule(layer)
        parts = [state.pop(f"{layer}.{part}").detach() for part in PARTS]
        weight = AQLMTensor(*parts, orientation=getattr(module, "orientation", "matrix"))
        state[f"{layer}.weight" if isinstance(module, nn.Linear) else layer] = weight
    return state


def _own(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous and alone in its memory, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def stored_weights(files: TensorFiles) -> dict[str, TensorInfo]:
    """Each weight in the files by its name; `X.codes` and its siblings are the weight `X.weight`.

    Raises:
        ValueError: if the three tensors of a quantized weight are not complete or do not fit together.
    """
    names = files.names()
    layers = {name.removesuffix(".codes") for name in names if name.endswith(".codes")}
    parts = {f"{layer}.{part}": layer for layer in layers for part in PARTS}
    weights: dict[str, TensorInfo] = {}
    for name in names:
        layer = parts.get(name)
        if layer is None:
            shape, dtype = files.header(name)
            weights[name] = TensorInfo(name, None, shape, dtype, torch.Size(shape).numel() * dtype.itemsize)
        elif name.endswith(".codes"):
            weights[f"{layer}.weight"] = _quantized_info(files, layer)
    return weights


def _quantized_info(files: TensorFiles, layer: str) -> TensorInfo:
    """Shape and scheme of a quantized layer, checked by making the tensor on the meta device."""
    missing = [f"{layer}.{part}" for part in PARTS if f"{layer}.{part}" not in set(files.names())]
    if missing:
        raise ValueError(f"{layer} has codes but lacks {', '.join(missing)}: the checkpoint is incomplete")
    headers = [files.header(f"{layer}.{part}") for part in PARTS]
    try:
        codes, codebooks, scales = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in headers)
        weight = AQLMTensor(codes, codebooks, scales)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the tensors of {layer} do not fit together: {error}") from None
    nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in headers)
    return TensorInfo(f"{layer}.weight", weight.scheme, tuple(weight.shape), weight.dtype, nbytes)


_Home = tuple[Tensor, list[tuple[nn.Module, str]]]


def _homes(model: nn.Module) -> dict[str, _Home]:
    """For each name in state_dict the parameter or buffer and every place in the model that holds it."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[str, Tensor] = {}
    persistent = set(model.state_dict().keys())
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if tensor is not None and name in persistent:
                tensors[name] = tensor
                places.setdefault(id(tensor), []).append((module, attribute))
    return {name: (tensor, places[id(tensor)]) for name, tensor in tensors.items()}


def _home_name(info: TensorInfo, homes: dict[str, _Home]) -> str:
    """The model's name of a stored weight: a quantized parameter need not be called `weight`."""
    layer = info.name.removesuffix(".weight")
    return layer if info.scheme is not None and info.name not in homes and layer in homes else info.name


def _check_names(model: nn.Module, homes: dict[str, _Home], stored: dict[str, TensorInfo]) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    surplus = [name for name in stored if name not in homes and not any(re.search(p, name) for p in ignored)]
    if surplus:
        raise ValueError(
            f"{len(surplus)} tensors of the checkpoint have no place in the model: {', '.join(surplus[:5])}; is it a "
            f"checkpoint of a {type(model).__name__}?"
        )
    covered = {id(homes[name][0]) for name in stored if name in homes}
    missing = [name for name, (tensor, _) in homes.items() if id(tensor) not in covered]
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors of the model: {', '.join(missing[:5])}")


def _check_fits(name: str, info: TensorInfo, config: CheckpointConfig, target: Tensor) -> None:
    if info.shape != tuple(target.shape):
        raise ValueError(f"{name} is {info.shape} in the checkpoint but {tuple(target.shape)} in the model")
    if info.scheme is None:
        if target.is_floating_point() != info.dtype.is_floating_point:
            raise ValueError(f"{name} is {info.dtype} in the checkpoint but {target.dtype} in the model")
        return
    check_scheme(name.removesuffix(".weight"), info.scheme, config)


def check_scheme(layer: str, scheme: AQLMScheme, config: CheckpointConfig) -> None:
    """Raise ValueError unless the config says that a quantized layer of the checkpoint has this scheme.

    Args:
        layer: its name in the checkpoint, without ".weight".
        scheme: of its tensors.
        config: of the checkpoint.
    """
    if layer in config.dense:
        raise ValueError(f"{layer} is quantized in the checkpoint, but its config lists it as not quantized")
    expected = config.scheme_of(layer)
    if scheme != expected:
        raise ValueError(f"the tensors of {layer} are {scheme}, but the checkpoint's config says {expected}")


def _read(files: TensorFiles, info: TensorInfo) -> Tensor:
    if info.scheme is None:
        return files.tensor(info.name)
    layer = info.name.removesuffix(".weight")
    codes, codebooks, scales = (files.tensor(f"{layer}.{part}") for part in PARTS)
    weight = AQLMTensor(codes, codebooks, scales)
    try:
        weight.check_codes()
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from None
    return weight


def _assign(home: _Home, tensor: Tensor) -> None:
    old, places = home
    tensor = tensor if old.is_meta else tensor.to(old.device)
    if isinstance(old, nn.Parameter):
        trains = old.requires_grad and not isinstance(tensor, AQLMTensor) and tensor.is_floating_point()
        tensor = nn.Parameter(tensor, requires_grad=trains)
    for module, attribute in places:
        if isinstance(tensor, AQLMTensor) and isinstance(module, nn.Linear):
            set_quantized([module], tensor)
        else:
            setattr(module, attribute, tensor)


def _check_no_meta(model: nn.Module, homes: dict[str, _Home]) -> None:
    covered = {id(tensor) for tensor, _ in homes.values()}
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta and id(buffer) not in covered]
    if left:
        raise ValueError(
            f"{', '.join(left[:5])} are on the meta device and no checkpoint holds them (non-persistent buffers): "
            "build the model with real buffers, for example under accelerate.init_empty_weights(include_buffers=False)"
        )
