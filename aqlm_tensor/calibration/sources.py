"""Calibration data from what is at hand: a text, a data set, tokens, ready batches, or the model itself.

Every source ends as windows of token ids of one length, with a record of where they came from that goes into reports.
A text is cut into windows that do not overlap, spread evenly over it; nothing is padded.

A chat model that is calibrated on prose alone loses the ability to answer before it loses the language: to a text add
conversations that the model writes itself ("text.txt+conversations").
"""

import itertools
import pickle
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor, nn

from aqlm_tensor.blocks import sample_windows
from aqlm_tensor.calibration.self_generation import GeneratedData, generate_windows, interleaved
from aqlm_tensor.calibration.work_folder import fingerprint
from aqlm_tensor.hf_model import tokenize

__all__ = [
    "CalibrationData",
    "DatasetText",
    "Mixture",
    "Source",
    "TextFile",
    "TokenFile",
    "calibration_data",
    "needs_tokenizer",
    "parse_source",
    "read_file",
    "tokens_of",
    "windows_written",
]

_GENERATED = "generated"
_CONVERSATIONS = "conversations"
_DATASET = "dataset:"
_TOKEN_SUFFIXES = (".npy", ".pt")
_SHUFFLED_ROWS = 10_000  # how far apart rows of a streamed data set can be exchanged


@dataclass(frozen=True)
class CalibrationData:
    """Batches to calibrate on.

    Attributes:
        batches: windows of token ids [1, seqlen], int64; from an iterable, what it gave.
        provenance: where they came from, JSON-able: kind, counts, seed where one was used, and a SHA-256 of the tokens.
    """

    batches: list[Any]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class TextFile:
    """A text.

    Attributes:
        path: where it was read.
        text: its content.
    """

    path: Path
    text: str


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk.

    Attributes:
        path: where they were read.
        tokens: integers, [n] (a text, which is cut into windows) or [windows, seqlen].
    """

    path: Path
    tokens: Tensor


@dataclass(frozen=True)
class DatasetText:
    """Text of a data set that the library `datasets` can load.

    Attributes:
        name: on the Hugging Face hub, or a local folder (of data files, or written by `save_to_disk`).
        config: which of its configurations, if it has several.
        split: which part.
        column: where the text is.
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"


@dataclass(frozen=True)
class Mixture:
    """Windows of several sources, about as many of each, one after another in turns.

    Attributes:
        sources: at least one.
    """

    sources: "tuple[Source, ...]"


Source = TextFile | TokenFile | DatasetText | GeneratedData | Mixture


def parse_source(text: str | Path) -> Source:
    """Read what a user writes for a source, and check what can be checked without a model.

    Args:
        text: a UTF-8 text file; a .npy or .pt file of token ids; "generated" (by the model; half of it conversations,
            if it is a chat model); "conversations" (nothing else); "dataset:NAME?config=...&split=...&column=..." (all
            but the name optional); or several of these joined by "+".

    Raises:
        ValueError: if the file does not hold what it should, naming what is accepted.
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
    """
    if text in (_GENERATED, _CONVERSATIONS):
        return GeneratedData() if text == _GENERATED else GeneratedData(conversations=1.0)
    path = Path(text)
    parts = [] if path.exists() else str(text).split("+")
    if len(parts) > 1:
        return Mixture(tuple(map(parse_source, parts)))
    if isinstance(text, str) and text.startswith(_DATASET):
        return _parse_dataset(text)
    if not path.exists():
        raise FileNotFoundError(
            f"data {str(path)!r} does not exist: pass a text file, a .npy or .pt file of token ids, "
            f"{_DATASET}NAME, {_CONVERSATIONS!r}, or {_GENERATED!r}, or some of them joined by '+'"
        )
    if path.is_dir():
        raise ValueError(
            f"data {str(path)!r} is a folder and cannot be read as a text: write {_DATASET}{path} if it is one of the "
            "library datasets"
        )
    return read_file(path)


def read_file(path: Path) -> TextFile | TokenFile:
    """Read a UTF-8 text, or a .npy or .pt file of token ids.

    Raises:
        ValueError: if the file does not hold what it should.
        OSError: if it cannot be read.
    """
    if path.suffix in _TOKEN_SUFFIXES:
        return TokenFile(path, _read_tokens(path))
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data {str(path)!r} is not UTF-8 text ({error}): convert it first") from None
    if not content.strip():
        raise ValueError(f"data {str(path)!r} is empty: pass a text with some thousand words")
    return TextFile(path, content)


def calibration_data(
    source: str | Path | Source | Tensor | np.ndarray | Iterable[Any],
    *,
    model: nn.Module | None = None,
    tokenizer: Any | None = None,
    nsamples: int = 128,
    seqlen: int = 1024,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> CalibrationData:
    """Make calibration batches, for `calibrate` or to run through a prepared model.

    Args:
        source: what `parse_source` accepts; a text, data set or description of generated data; token ids [n] or
            [windows, seqlen]; or an iterable of ready batches (tensors, or mappings with images and the like), of which
            the first `nsamples` are taken as they are.
        model: writes the tokens where they are to be generated, and says which token ids exist.
        tokenizer: of the model; needed for text, data sets and conversations.
        nsamples: windows, at most.
        seqlen: tokens a window; for token ids [windows, seqlen] their own length counts.
        seed: of generated data and of the order of a data set's rows.
        on_token: called with (tokens written, tokens in all) while the model writes.

    Raises:
        ValueError: if a source is too short, holds no token ids or ids that the model lacks, or needs a model or
            tokenizer that was not given.
        TypeError: for a source of another kind.
        ImportError: for a data set, if `datasets` is not installed.
        OSError: if a file cannot be read.
    """
    if isinstance(source, str | Path):
        source = parse_source(source)
    if isinstance(source, Mixture):
        return _mixed(source, nsamples, model=model, tokenizer=tokenizer, seqlen=seqlen, seed=seed, on_token=on_token)
    if isinstance(source, TokenFile | Tensor | np.ndarray):
        batches = _windows_of_tokens(source, nsamples, seqlen)
        record: dict[str, Any] = {"kind": "tokens"}
        record |= {"file": str(source.path)} if isinstance(source, TokenFile) else {}
    elif isinstance(source, TextFile):
        batches = sample_windows(tokens_of(source, tokenizer), nsamples, seqlen)
        record = {"kind": "text", "file": str(source.path)}
    elif isinstance(source, DatasetText):
        tokens, rows = _dataset_tokens(source, _needed("tokenizer", tokenizer, source), nsamples * seqlen, seed)
        batches = sample_windows(tokens, nsamples, seqlen)
        record = {"kind": "dataset", **asdict(source), "rows": rows, "seed": seed}
    elif isinstance(source, GeneratedData):
        writer = _needed("model", model, source)
        if source.conversations == 1 and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{_CONVERSATIONS!r} needs a tokenizer with a chat template: pass tokenizer=... of a chat model, or "
                f"{_GENERATED!r}"
            )
        batches = generate_windows(writer, nsamples, seqlen, source, tokenizer=tokenizer, seed=seed, on_token=on_token)
        record = {"kind": "generated", **asdict(source), "seed": seed}
    elif isinstance(source, Iterable):
        return _ready(source, nsamples)
    else:
        raise TypeError(f"calibration data cannot be made from a {type(source).__name__}: see calibration_data")
    _check_ids(batches, model)
    return CalibrationData(batches, record | _counts(batches))


def tokens_of(source: TextFile | TokenFile, tokenizer: Any | None, model: nn.Module | None = None) -> Tensor:
    """The token ids [n] of a file, int64 on the CPU, windows one after another.

    Args:
        source: from `read_file`.
        tokenizer: of the model; needed for a text.
        model: says which token ids exist, if it is given.

    Raises:
        ValueError: for a text without a tokenizer, what are no token ids, or ids that the model lacks.
    """
    if isinstance(source, TextFile):
        found = tokenize(_needed("tokenizer", tokenizer, source), source.text)
    else:
        found = _checked_tokens(source.tokens).flatten()
    if model is not None:
        _check_ids([found], model)
    return found


def needs_tokenizer(source: Source) -> bool:
    """Whether calibration data from a source cannot be had without a tokenizer."""
    if isinstance(source, Mixture):
        return any(map(needs_tokenizer, source.sources))
    return isinstance(source, TextFile | DatasetText) or (
        isinstance(source, GeneratedData) and source.conversations == 1
    )


def windows_written(source: Source, nsamples: int) -> int:
    """How many of so many windows the model writes."""
    if isinstance(source, Mixture):
        shares = _shares(source, nsamples)
        return sum(windows_written(one, share) for one, share in zip(source.sources, shares, strict=True))
    return nsamples if isinstance(source, GeneratedData) else 0


def _shares(source: Mixture, nsamples: int) -> list[int]:
    """Windows of each source; the first ones give those that cannot be divided."""
    count = len(source.sources)
    return [len(range(number, nsamples, count)) for number in range(count)]


def _mixed(source: Mixture, nsamples: int, **options: Any) -> CalibrationData:
    shares = _shares(source, nsamples)
    if min(shares) == 0:
        raise ValueError(f"{nsamples} windows cannot come from {len(shares)} sources: ask for at least as many")
    parts = [
        calibration_data(one, nsamples=share, **options) for one, share in zip(source.sources, shares, strict=True)
    ]
    batches = interleaved(*(part.batches for part in parts))
    record = {"kind": "mixture", "sources": [part.provenance for part in parts]}
    return CalibrationData(batches, record | _counts(batches))


def _needed(name: str, value: Any, source: Source) -> Any:
    if value is None:
        raise ValueError(f"calibration data from {type(source).__name__} needs a {name}: pass {name}=...")
    return value


def _parse_dataset(text: str) -> DatasetText:
    name, _, query = text.removeprefix(_DATASET).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = options.keys() - {"config", "split", "column"}
    if not name or unknown:
        what = f"unknown options {sorted(unknown)}" if unknown else "the name is missing"
        raise ValueError(f"{text!r}: {what}; write {_DATASET}NAME?config=...&split=...&column=...")
    return DatasetText(name, **options)


def _read_tokens(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (ValueError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"data {str(path)!r} holds no array of token ids: {error}") from None
    if not isinstance(found, Tensor):
        raise ValueError(f"data {str(path)!r} holds a {type(found).__name__}, not one tensor of token ids")
    return found


def _windows_of_tokens(source: TokenFile | Tensor | np.ndarray, nsamples: int, seqlen: int) -> list[Tensor]:
    tokens = _checked_tokens(source.tokens if isinstance(source, TokenFile) else source)
    return sample_windows(tokens, nsamples, seqlen) if tokens.dim() == 1 else list(tokens[:nsamples].split(1))


def _checked_tokens(raw: Tensor | np.ndarray) -> Tensor:
    """Token ids as int64 on the CPU."""
    tokens = torch.as_tensor(raw)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool or tokens.dim() not in (1, 2):
        raise ValueError(
            f"token ids must be integers [n] or [windows, seqlen], got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    if tokens.numel() == 0:
        raise ValueError(f"there are no token ids in a tensor of shape {tuple(tokens.shape)}")
    return tokens.detach().cpu().to(torch.int64)


def _dataset_tokens(source: DatasetText, tokenizer: Any, wanted: int, seed: int) -> tuple[Tensor, int]:
    """Tokens of the rows of a data set in random order until there are enough, and how many rows that took."""
    parts: list[Tensor] = []
    total = 0
    for row in _dataset_rows(source, seed):
        if source.column not in row:
            raise ValueError(
                f"data set {source.name!r} has no column {source.column!r}: its columns are {', '.join(map(str, row))}"
            )
        parts.append(tokenize(tokenizer, row[source.column]))
        total += len(parts[-1])
        if total >= wanted:
            break
    if not parts:
        raise ValueError(f"split {source.split!r} of data set {source.name!r} has no rows")
    return torch.cat(parts), len(parts)


def _dataset_rows(source: DatasetText, seed: int) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "reading a data set needs the library datasets: pip install 'aqlm-tensor[data]', or pass a text file"
        ) from None
    folder = Path(source.name)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        stored = datasets.load_from_disk(folder)
        rows = stored[source.split] if isinstance(stored, dict) else stored
        return rows.shuffle(seed=seed)
    rows = datasets.load_dataset(source.name, source.config, split=source.split, streaming=True)
    return rows.shuffle(seed=seed, buffer_size=_SHUFFLED_ROWS)


def _ready(source: Iterable[Any], nsamples: int) -> CalibrationData:
    batches = list(itertools.islice(source, nsamples))
    if not batches:
        raise ValueError("the iterable of batches is empty")
    counts = _counts(batches) if all(isinstance(batch, Tensor) for batch in batches) else {"batches": len(batches)}
    return CalibrationData(batches, {"kind": "batches"} | counts)


def _counts(batches: list[Tensor]) -> dict[str, Any]:
    tokens = sum(batch.numel() for batch in batches)
    return {"batches": len(batches), "tokens": tokens, "sha256": fingerprint(batches)}


def _check_ids(batches: list[Tensor], model: nn.Module | None) -> None:
    """Raise if a token id is negative or beyond the model's vocabulary."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    size = getattr(embedding, "num_embeddings", None)
    lowest = min(int(batch.min()) for batch in batches)
    highest = max(int(batch.max()) for batch in batches)
    if lowest < 0 or (size is not None and highest >= size):
        known = "0 and up" if size is None else f"0 to {size - 1}"
        raise ValueError(
            f"token ids lie between {lowest} and {highest}, but the model knows {known}: they were made with another "
            "tokenizer"
        )
