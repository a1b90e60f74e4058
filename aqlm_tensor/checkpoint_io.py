"""Checkpoint folders on disk: reading tensors by name, and writing a folder all at once or not at all.

Reads safetensors (one file or shards with an index) and `.bin` files; the latter with weights_only=True, so that no
arbitrary object is ever unpickled. Writes safetensors only.
"""

import contextlib
import errno
import json
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "CONFIG_NAME",
    "TensorFiles",
    "check_replaceable",
    "flush",
    "new_folder",
    "parse_size",
    "read_json",
    "write_file",
    "write_tensors",
]

CONFIG_NAME = "config.json"
_STEMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if the file is missing or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is {path.parent} a checkpoint folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the file is damaged or was cut short") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


class TensorFiles:
    """The tensors of a checkpoint folder by name, read when asked for.

    Args:
        folder: holds model.safetensors, pytorch_model.bin, or shards of either with their index.
        files: take these files, wherever they lie, and not what the folder holds.

    Raises:
        ValueError: if there are no such files, the index is damaged, or a file is cut short or of another format.
    """

    def __init__(self, folder: Path, files: Sequence[str | Path] = ()) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        # an absolute path stays what it is when joined to the folder
        self._files = {name: str(file) for file in files for name in self._keys(str(file))} or self._find()

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def header(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of a tensor; of a safetensors file only the header is read."""
        opened = self._opened(self._files[name])
        if isinstance(opened, Mapping):
            return tuple(opened[name].shape), opened[name].dtype
        part = opened.get_slice(name)
        return tuple(part.get_shape()), _SAFETENSORS_DTYPES[part.get_dtype()]

    def tensor(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        opened = self._opened(self._files[name])
        return opened[name] if isinstance(opened, Mapping) else opened.get_tensor(name)

    def _find(self) -> dict[str, str]:
        for stem, suffix in _STEMS:
            index = self.folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return self._read_index(index)
            if (self.folder / f"{stem}{suffix}").is_file():
                return dict.fromkeys(self._keys(f"{stem}{suffix}"), f"{stem}{suffix}")
        accepted = ", ".join(f"{stem}{suffix}[.index.json]" for stem, suffix in _STEMS)
        raise ValueError(f"{self.folder} holds no checkpoint: expected one of {accepted}")

    def _read_index(self, index: Path) -> dict[str, str]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to files: the index is damaged")
        for file in set(files.values()):
            if Path(file).name != file:
                raise ValueError(f"{index} names {file!r}: shards must lie in the folder itself")
            present = set(self._keys(file))
            expected = {name for name, home in files.items() if home == file}
            if present != expected:
                raise ValueError(f"{index} and {file} disagree about tensors {sorted(present ^ expected)[:5]}")
        return files

    def _keys(self, file: str) -> list[str]:
        return list(self._opened(file).keys())

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = _load_bin(path) if path.suffix == ".bin" else safe_open(path, framework="pt")
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
            except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
                raise ValueError(
                    f"{path} cannot be read as a checkpoint: it is damaged, cut short or of another format ({error})"
                ) from None
        return self._open[file]


def _load_bin(path: Path) -> dict[str, Tensor]:
    # mapped into memory where the format allows it, so that headers can be read without the data
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors")
    return tensors


_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


def parse_size(size: int | str) -> int:
    """Bytes of 5_000_000_000, "5GB" or "500MiB".

    Raises:
        ValueError: for any other form, or a size that is not positive.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]i?B)?", str(size), re.IGNORECASE)
    number = int(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if number <= 0:
        raise ValueError(f"a size is a positive number of bytes, such as 5000000000, '5GB' or '500MiB'; got {size!r}")
    return number


def write_file(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file.

    Raises:
        OSError: if the disk is full or cannot be written, which the library safetensors has an error of its own for.
    """
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None


def write_tensors(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors as model.safetensors, or as shards of at most `max_shard_bytes` (at least one tensor each)."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    homes: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, folder / file, {"format": "pt"})
        homes.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path, *, force: bool, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` if the block succeeds and vanishes if it does not.

    Args:
        folder: where the result appears; must not exist, unless `force`.
        force: replace an existing checkpoint folder (or an empty one); anything else is never removed.
        needed_bytes: checked against the free space first.

    Raises:
        FileExistsError: if `folder` exists and may not be replaced.
        OSError: if the disk is too small or the folder cannot be written.
    """
    check_replaceable(folder, force=force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"not enough space: the checkpoint takes {needed_bytes / 1e6:.1f} MB, free are {free / 1e6:.1f} MB; choose "
            "another folder or make room",
            str(folder),
        )
    temporary = _sibling(folder)
    try:
        yield temporary
        for path in temporary.iterdir():
            path.chmod(temporary.stat().st_mode & 0o666)  # safetensors would leave its files to the owner alone
            flush(path)
        flush(temporary)
        _move_into_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_replaceable(folder: Path, *, force: bool) -> None:
    """Raise FileExistsError unless `folder` is free, or may be replaced because of `force`."""
    if not os.path.lexists(folder):
        return
    if not force:
        raise FileExistsError(f"{folder} exists: choose another folder, or pass force to replace it")
    if not folder.is_dir() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists and is not a folder: force replaces checkpoint folders only")
    if any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        raise FileExistsError(
            f"{folder} exists and is no checkpoint (it has no {CONFIG_NAME}): force replaces checkpoint folders only"
        )


def _sibling(folder: Path) -> Path:
    """A new hidden folder beside `folder`, so that a rename within one file system puts it in place."""
    sibling = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    sibling.mkdir()
    return sibling


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's entries, before anything depends on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, folder: Path) -> None:
    old = None
    if folder.exists():
        old = _sibling(folder)
        folder.rename(old / folder.name)
    try:
        temporary.rename(folder)
    except BaseException:
        if old is not None:
            (old / folder.name).rename(folder)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    flush(folder.parent)
