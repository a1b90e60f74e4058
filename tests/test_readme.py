"""The README's examples run as they stand, on a tiny model, and its command lines name options that exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import SolverConfig, aqlm_2x8, quantize_
from aqlm_tensor.cli.app import app

from .tiny_llama import TEXT, write_dense

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [block for language, block in BLOCKS if language == "python"]
COMMANDS = [
    line for language, block in BLOCKS if language == "sh" for line in block.splitlines() if "aqlm-tensor" in line
]
NEEDS_MORE = ("DecodeGraph(", "triton.cudagraphs", "group.WORLD")  # a GPU, or processes
QUANTIZES = ("calibrate(", "quantize_(")
QUICK = SolverConfig(max_rounds=0, kmeans_iterations=1)


def _dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=18,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=1024,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A dense and a quantized folder, and a working folder with a text."""
    tokenizer = AutoTokenizer.from_pretrained(write_dense(tmp_path / "tokenizer"))
    model = _dense()
    for name in ("dense", "quantized"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if name == "dense":
            quantize_(model, aqlm_2x8(solver=QUICK))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("text.txt").write_text(" ".join([TEXT] * 3))
    return {name: tmp_path / name for name in ("dense", "quantized")}


# PEFT asks for what Transformers has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_examples(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {
        "text": TEXT,
        "dense_model": _dense(),
        "fresh_model": _dense(),
        "QUICK": QUICK,
    }
    ran = 0
    for block in PYTHON:
        code = compile(_here(block, folders), f"README: {block.splitlines()[0]}", "exec")
        if any(part in block for part in NEEDS_MORE):
            exec("\n".join(re.findall(r"^from .*|^import .*", block, re.MULTILINE)), names)
            continue
        if any(part in block for part in QUANTIZES):
            names["model"] = _dense()
        exec(code, names)
        if "data" in names:
            names["batches"] = names["data"].batches
        ran += 1
    assert ran >= 10
    printed = capsys.readouterr().out
    for part in ("weight=AQLMTensor(scheme=2x8g8", "bits a weight (at most 2.25)", "loss on held-out batches"):
        assert part in printed


def _here(block: str, folders: dict[str, Path]) -> str:
    """The block with local folders for those on the Hub, on the CPU, and little effort for quantizing."""
    for there, here in (
        ('device="cuda"', 'device="cpu"'),
        ("PVConfig(epochs=8)", "PVConfig(epochs=1)"),
        ("bits=2.25", 'bits=2.25, schemes=("1x8g8", "2x8g8"), windows=4, solver=QUICK'),
    ):
        assert any(there in block for block in PYTHON)
        block = block.replace(there, here)
    block = re.sub(r"(aqlm_\dx\d+\()\)", r"\1solver=QUICK)", block)
    block = re.sub(r'(AQLMWeightConfig\("\w+")', r"\1, solver=QUICK", block)
    block = re.sub(r'^folder = "[^"]+"', f"folder = {str(folders['quantized'])!r}", block, flags=re.MULTILINE)
    return re.sub(r'^dense_folder = "[^"]+"', f"dense_folder = {str(folders['dense'])!r}", block, flags=re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines(line: str) -> None:
    words = shlex.split(line, comments=True)
    command, *given = words[words.index("aqlm-tensor") + 1 :]
    known = typer.main.get_command(app).commands[command]  # pyright: ignore[reportAttributeAccessIssue]
    options = {option for parameter in known.params for option in parameter.opts}
    assert {word for word in given if word.startswith("--")} <= options
