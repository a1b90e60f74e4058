"""Calibration data from every kind of source: the same tokens where they must be, and what bad sources get."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from aqlm_tensor.blocks import sample_windows
from aqlm_tensor.calibration.self_generation import GeneratedData, generate_windows
from aqlm_tensor.calibration.sources import DatasetText, TextFile, TokenFile, calibration_data, parse_source
from tests.tiny_llama import TEXT, WORDS, write_dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dense(root / "model")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(TEXT)["input_ids"])


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_text_tokens_and_files_of_them_agree(folder: Path, tokenizer: Any, tokens: Tensor) -> None:
    expected = sample_windows(tokens, 5, 32)
    np.save(folder / "tokens.npy", tokens.to(torch.int32).numpy())
    torch.save(tokens, folder / "tokens.pt")
    sources = [str(folder / "text.txt"), folder / "tokens.npy", folder / "tokens.pt", tokens, tokens.numpy()]
    found = [calibration_data(source, tokenizer=tokenizer, nsamples=5, seqlen=32) for source in sources]
    assert all(same(data.batches, expected) for data in found)
    assert {data.provenance["sha256"] for data in found} == {found[0].provenance["sha256"]}
    assert [data.provenance["kind"] for data in found] == ["text", "tokens", "tokens", "tokens", "tokens"]
    assert found[0].provenance["file"] == str(folder / "text.txt")
    assert found[0].provenance["tokens"] == 160
    json.dumps([data.provenance for data in found])
    assert calibration_data(tokens + 1, nsamples=5, seqlen=32).provenance["sha256"] != found[0].provenance["sha256"]


def test_rows_of_tokens_are_windows_of_their_own_length(tokens: Tensor) -> None:
    rows = tokens[:60].view(6, 10)
    assert same(calibration_data(rows, nsamples=4, seqlen=1024).batches, list(rows[:4].split(1)))


def test_ready_batches_pass_through() -> None:
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.int64), "pixel_values": torch.rand(1, 3)} for _ in range(3)]
    data = calibration_data(iter(batches), nsamples=2)
    assert data.batches[0] is batches[0]
    assert data.provenance == {"kind": "batches", "batches": 2}
    tensors = calibration_data([torch.ones(2, 4, dtype=torch.int64)] * 3)
    assert tensors.provenance["tokens"] == 24


def test_generated_by_the_model(model: Any) -> None:
    data = calibration_data("generated", model=model, nsamples=3, seqlen=16, seed=4)
    assert same(data.batches, generate_windows(model, 3, 16, seed=4))
    assert data.provenance["kind"] == "generated"
    assert (data.provenance["temperature"], data.provenance["seed"]) == (1.0, 4)


def write_dataset(folder: Path) -> list[str]:
    choose = random.Random(0)
    rows = [" ".join(choose.choices(WORDS, k=30)) for _ in range(20)]
    (folder / "rows").mkdir()
    lines = [json.dumps({"text": row, "number": index}) for index, row in enumerate(rows)]
    (folder / "rows" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return rows


def test_data_sets_in_local_folders(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = write_dataset(tmp_path)
    Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "stored")
    known = {tuple(tokenizer(row)["input_ids"]) for row in rows}
    for name in ("rows", "stored"):
        source = f"dataset:{tmp_path / name}"
        one, again, other = (
            calibration_data(source, tokenizer=tokenizer, nsamples=4, seqlen=30, seed=seed) for seed in (0, 0, 1)
        )
        assert same(one.batches, again.batches)
        assert not same(one.batches, other.batches)
        assert {tuple(batch[0].tolist()) for batch in one.batches} <= known  # each row has 30 tokens
        assert one.provenance["rows"] == 4
        assert one.provenance["name"] == str(tmp_path / name)
    with pytest.raises(ValueError, match=r"no column 'body': its columns are text, number"):
        calibration_data(f"dataset:{tmp_path / 'rows'}?column=body", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"has 600 tokens, fewer than one window of 1024"):
        calibration_data(f"dataset:{tmp_path / 'rows'}", tokenizer=tokenizer)


def test_without_the_library_datasets_the_remedy_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'aqlm-tensor\[data\]'"):
        calibration_data("dataset:somewhere/something", tokenizer=tokenizer)


def test_sources_are_parsed(folder: Path) -> None:
    assert parse_source("generated") == GeneratedData()
    assert parse_source(folder / "text.txt") == TextFile(folder / "text.txt", TEXT)
    assert parse_source("dataset:a/b?config=c&split=test&column=body") == DatasetText("a/b", "c", "test", "body")
    assert parse_source("dataset:a/b") == DatasetText("a/b")


BAD_FILES = {
    "empty.txt": (b" \n", "is empty"),
    "latin.txt": ("déjà vu".encode("latin-1"), "is not UTF-8 text"),
    "damaged.npy": (b"no array", "holds no array of token ids"),
    "empty.npy": (b"", "holds no array of token ids"),
    "damaged.pt": (b"no tensor", "holds no array of token ids"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parse_source(tmp_path / name)


def test_other_bad_sources_are_refused(tmp_path: Path, tokens: Tensor, model: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist: pass a text file, .* or 'generated'"):
        parse_source(tmp_path / "no.txt")
    with pytest.raises(ValueError, match=r"is a folder and cannot be read as a text: write dataset:"):
        parse_source(tmp_path)
    with pytest.raises(ValueError, match=r"unknown options \['part'\]"):
        parse_source("dataset:a?part=b")
    with pytest.raises(ValueError, match="the name is missing"):
        parse_source("dataset:?split=b")
    torch.save({"tokens": tokens}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="holds a dict, not one tensor"):
        calibration_data(tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="needs a model"):
        calibration_data("generated")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        calibration_data(TextFile(tmp_path, TEXT))
    with pytest.raises(ValueError, match=r"must be integers \[n\] or \[windows, seqlen\], got torch.float32"):
        calibration_data(tokens.float())
    with pytest.raises(ValueError, match=r"lie between 0 and 900, but the model knows 0 to 17"):
        calibration_data(torch.arange(901), model=model, nsamples=1, seqlen=901)
    with pytest.raises(ValueError, match=r"lie between -1 and 5, but the model knows 0 and up"):
        calibration_data(TokenFile(tmp_path, torch.arange(-1, 6)), nsamples=1, seqlen=7)
    with pytest.raises(ValueError, match="no token ids in a tensor"):
        calibration_data(torch.zeros(0, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="the iterable of batches is empty"):
        calibration_data([])
    with pytest.raises(TypeError, match="cannot be made from a int"):
        calibration_data(3)  # pyright: ignore[reportArgumentType]
