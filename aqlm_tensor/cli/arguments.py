"""Checks of what the commands are given; all of them run before any long work and end with exit code 2."""

import os
from pathlib import Path
from typing import Any

import torch

from aqlm_tensor.calibration.sources import TextFile, TokenFile, read_file, tokens_of
from aqlm_tensor.cli.output import UsageError, phase, usage
from aqlm_tensor.hf_model import ModelSource, UnsuitableModelError, find_model, load_model

__all__ = [
    "check_writable",
    "held_out",
    "held_out_tokens",
    "open_model",
    "parent_of",
    "parse_device",
    "parse_dtype",
    "parse_rows",
]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_dtype(name: str, *, auto: bool = True) -> Any:
    """A torch dtype by name, or "auto" where that is accepted."""
    if auto and name == "auto":
        return name
    if name not in _DTYPES:
        accepted = [*(["auto"] if auto else []), *_DTYPES]
        raise UsageError(f"--dtype {name!r} is unknown: choose one of {', '.join(accepted)}")
    return _DTYPES[name]


def parse_device(name: str) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {name!r} cannot be used here ({reason}): leave it out to compute on the CPU"
        ) from None
    return device


def parse_rows(text: str) -> list[int]:
    """Numbers of rows separated by commas."""
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1:
        raise UsageError(f"--rows {text!r}: write numbers from 1 up, separated by commas, such as 1,8,512")
    return rows


def held_out(path: Path) -> TextFile | TokenFile:
    """A text, or token ids, to measure perplexity on."""
    with usage():
        return read_file(path)


def held_out_tokens(source: TextFile | TokenFile, tokenizer: Any | None, model: Any) -> torch.Tensor:
    """Its tokens [n], at least 2."""
    with usage():
        tokens = tokens_of(source, tokenizer, model)
    if len(tokens) < 2:
        raise UsageError(f"{str(source.path)!r} has {len(tokens)} tokens, of which none can be predicted: pass more")
    return tokens


def parent_of(path: Path) -> Path:
    """The innermost folder around a path that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def check_writable(path: Path) -> None:
    """Raise a UsageError unless a folder could be made there, or be written to if it exists."""
    place = path if path.is_dir() else parent_of(path)
    if not os.access(place, os.W_OK):
        raise UsageError(f"{str(path)!r} cannot be written: {place} is read-only for you; choose another folder")


def open_model(
    source: ModelSource | str, gguf_file: str | None, dtype: str, device: str, *, needs_tokenizer: bool = True
) -> tuple[Any, Any]:
    """(model, tokenizer), loaded after the cheap checks; without need the tokenizer may be None."""
    if isinstance(source, str):
        with usage():
            source = find_model(source, gguf_file)
    chosen = parse_dtype(dtype)
    if source.kind == "aqlm" and chosen != "auto":
        raise UsageError(
            f"--dtype {dtype!r} is for dense models: {source} is an AQLM model and keeps its own; leave it out"
        )
    target = str(parse_device(device))
    try:
        with phase(f"loading {source}"):
            return load_model(source, dtype=chosen, device=target, needs_tokenizer=needs_tokenizer)
    except UnsuitableModelError as error:
        raise UsageError(str(error)) from None
