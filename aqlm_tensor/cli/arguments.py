"""Checks of what the commands are given; all of them run before any long work and end with exit code 2."""

from pathlib import Path
from typing import Any

import torch

from aqlm_tensor.cli.output import UsageError, phase, usage
from aqlm_tensor.hf_model import ModelSource, find_model, load_model, tokenize

__all__ = ["open_model", "parse_device", "parse_dtype", "parse_rows", "read_text", "text_tokens"]

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


def read_text(path: Path, option: str = "--data") -> str:
    """The text of a file that is not empty, which an option names."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{option} {str(path)!r} does not exist: pass a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {str(path)!r} is not UTF-8 text ({error}): convert it first") from None
    except OSError as error:
        raise UsageError(f"{option} {str(path)!r} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UsageError(f"{option} {str(path)!r} is empty: pass a text with some thousand words")
    return text


def text_tokens(tokenizer: Any, text: str, at_least: int, what: str) -> torch.Tensor:
    """The tokens [n] of a text that has at least so many."""
    tokens = tokenize(tokenizer, text)
    if len(tokens) < at_least:
        raise UsageError(
            f"--data has {len(tokens)} tokens, fewer than {what}: pass a longer text or a smaller --seqlen"
        )
    return tokens


def open_model(source: ModelSource | str, gguf_file: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """(model, tokenizer), loaded after the cheap checks."""
    if isinstance(source, str):
        with usage():
            source = find_model(source, gguf_file)
    chosen = parse_dtype(dtype)
    if source.kind == "aqlm" and chosen != "auto":
        raise UsageError(
            f"--dtype {dtype!r} is for dense models: {source} is an AQLM model and keeps its own; leave it out"
        )
    target = str(parse_device(device))
    with phase(f"loading {source}"):
        return load_model(source, dtype=chosen, device=target)
